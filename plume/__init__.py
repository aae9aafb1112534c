"""Reasoning-quality multimodal embeddings at single-pass cost.

`Plume` is the user's object, `PlumeModel` the model. After `import plume`, `AutoModel` and `SentenceTransformer` open
its checkpoints. Names are imported when they are first used, so that importing the package takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plume.registration import register_when_needed
from plume.version import __version__

if TYPE_CHECKING:
    from plume.config import PlumeConfig
    from plume.embedder.plume import Plume
    from plume.engine.engine import Engine
    from plume.inputs.errors import InputError
    from plume.inputs.item import Item
    from plume.inputs.pages import Page, pages
    from plume.inputs.processor import PlumeProcessor
    from plume.inputs.video import Video
    from plume.model.interface import PlumeOutput
    from plume.model.model import PlumeModel
    from plume.search.index import Index
    from plume.tracing.trace import trace

register_when_needed()

_HOMES = {
    "Engine": "plume.engine.engine",
    "Index": "plume.search.index",
    "InputError": "plume.inputs.errors",
    "Item": "plume.inputs.item",
    "Page": "plume.inputs.pages",
    "Plume": "plume.embedder.plume",
    "PlumeConfig": "plume.config",
    "PlumeModel": "plume.model.model",
    "PlumeOutput": "plume.model.interface",
    "PlumeProcessor": "plume.inputs.processor",
    "Video": "plume.inputs.video",
    "pages": "plume.inputs.pages",
    "trace": "plume.tracing.trace",
}

__all__ = [
    "Engine",
    "Index",
    "InputError",
    "Item",
    "Page",
    "Plume",
    "PlumeConfig",
    "PlumeModel",
    "PlumeOutput",
    "PlumeProcessor",
    "Video",
    "__version__",
    "pages",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plume' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
