"""Python runs this at its start where `plume run` has put the folder on the path: it imports plume, and nothing else.

Another module of this name, which this one hides, is run after it.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import plume  # noqa: F401

_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _HERE]
if (_hidden := PathFinder.find_spec("sitecustomize")) is not None and _hidden.loader is not None:
    sys.modules["sitecustomize"] = module_from_spec(_hidden)
    _hidden.loader.exec_module(sys.modules["sitecustomize"])
