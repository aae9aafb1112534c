"""Tells transformers of plume's classes, as soon as somebody has imported transformers.

`AutoModel` and `SentenceTransformer` open plume's checkpoints after `import plume`. That needs the classes, which take
seconds to import, while `plume --help` should answer at once. So importing plume imports nothing: a finder waits until
transformers is loaded, by plume or by anybody else, and registers then.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoProcessor` know plume's classes."""
    from transformers import AutoConfig, AutoModel, AutoProcessor

    from plume.config import PlumeConfig
    from plume.inputs.processor import PlumeProcessor
    from plume.model.model import PlumeModel

    # Where sentence-transformers looks for the version of what a folder requires, if that is on the path only.
    sys.modules.setdefault("plume_embed", sys.modules["plume"])
    AutoConfig.register(PlumeConfig.model_type, PlumeConfig, exist_ok=True)
    AutoModel.register(PlumeConfig, PlumeModel, exist_ok=True)
    AutoProcessor.register(PlumeConfig, PlumeProcessor, exist_ok=True)


def register_when_needed() -> None:
    """Register now if transformers is loaded, else right after it."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Registration())


class _Registration(importlib.abc.MetaPathFinder):
    """Finds what others find; after the outermost import that has loaded transformers it registers, once.

    A module of plume may be what imports transformers. It is incomplete then, and registering waits for it.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._finding = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if self._finding or (fullname != "transformers" and not fullname.startswith("plume.")):
            return None
        self._finding = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self._depth += 1
            try:
                execute(module)
            finally:
                self._depth -= 1
            if self._depth == 0 and "transformers" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
