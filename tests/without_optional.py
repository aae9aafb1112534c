"""Imported first, it makes a machine look like a GPU machine without the optional packages; also a pytest plugin."""

from __future__ import annotations

import sys

ABSENT = {
    "av",
    "datasets",
    "deepspeed",
    "faiss",
    "lancedb",
    "matplotlib",
    "mteb",
    "pandas",
    "pillow_heif",
    "pyarrow",
    "pypdfium2",
    "pytrec_eval",
    "tensorboard",
}


class _Hiding:
    """A finder of modules and distributions that does not find the absent ones."""

    def __init__(self, own):
        self.own = own

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.own.find_spec(name, path, target)

    def find_distributions(self, *context):
        own = getattr(self.own, "find_distributions", None)
        found = own(*context) if own else ()
        return (one for one in found if one.metadata["Name"].replace("-", "_") not in ABSENT)

    def __getattr__(self, name):
        return getattr(self.own, name)


sys.meta_path[:] = [_Hiding(finder) for finder in sys.meta_path]
