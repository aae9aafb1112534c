"""Reasoning-quality multimodal embeddings at single-pass cost.

`Plume` is the user's object, `PlumeModel` the model. Importing this package registers the model with
transformers, so that `AutoModel` and `SentenceTransformer` open its checkpoints.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from plume.config import PlumeConfig
from plume.documents import Page, pages
from plume.images import InputError
from plume.inputs import Item
from plume.model import PlumeModel, PlumeOutput
from plume.processor import PlumeProcessor
from plume.version import __version__
from plume.video import Video

if TYPE_CHECKING:
    from plume.embedder import Plume

AutoConfig.register(PlumeConfig.model_type, PlumeConfig, exist_ok=True)
AutoModel.register(PlumeConfig, PlumeModel, exist_ok=True)
AutoProcessor.register(PlumeConfig, PlumeProcessor, exist_ok=True)

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    # sentence-transformers takes seconds to import, and only the embedder needs it.
    if name == "Plume":
        from plume.embedder import Plume

        return Plume
    raise AttributeError(f"module 'plume' has no attribute {name!r}")
