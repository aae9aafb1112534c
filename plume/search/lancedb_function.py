"""Plume as an embedding function of LanceDB, for tables of your own that embed what is added and what is searched for.

Importing this module registers it as "plume". A table remembers the function by that name, so that a program which
opens the table imports this module first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lancedb.embeddings
import numpy as np
import pyarrow as pa
from pydantic import PrivateAttr

from plume.embedder.plume import Plume


@lancedb.embeddings.register("plume")
class PlumeEmbeddings(lancedb.embeddings.EmbeddingFunction):
    """Vectors of a checkpoint: rows as documents, what is searched for as queries.

    model: a folder or a Hub name. column: what a string of the source column is: a text, or the path or URL of an image
    or video; bytes are the content of one. num_latent_steps: K; None is the checkpoint's own. truncate_dim: numbers of
    a vector to keep. device: None takes the best that there is.

    A query is whatever `Plume.encode_query` takes: a string is words, whatever the column holds.

    Example:
        >>> from lancedb.embeddings import get_registry
        >>> kite = get_registry().get("plume").create(model=str(getfixture("plume_folder")), device="cpu")
        >>> kite.ndims()
        64
    """

    model: str
    column: Literal["text", "image", "video"] = "text"
    num_latent_steps: int | None = None
    truncate_dim: int | None = None
    device: str | None = None
    max_retries: int = 0  # of LanceDB, which would embed a bad row again for minutes
    _plume: Plume | None = PrivateAttr(default=None)

    def ndims(self) -> int:
        """Length of the vectors."""
        return self._loaded().get_embedding_dimension()

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        """The vector of what is searched for, alone in a list."""
        return [self._loaded().encode_query(query, num_latent_steps=self.num_latent_steps, show_progress_bar=False)]

    def compute_source_embeddings(self, rows: Any, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        """Vectors of values of the source column."""
        values = rows.to_pylist() if isinstance(rows, (pa.Array, pa.ChunkedArray)) else rows
        single = isinstance(values, (str, bytes)) or not isinstance(values, Iterable)
        inputs = [self._input(value) for value in ([values] if single else values)]
        vectors = self._loaded().encode_document(
            inputs, num_latent_steps=self.num_latent_steps, show_progress_bar=False
        )
        return list(vectors)

    def _input(self, value: Any) -> Any:
        if isinstance(value, str) and self.column == "text":
            return value
        kind = "image" if self.column == "text" else self.column
        return {kind: value} if isinstance(value, (str, bytes)) else value

    def _loaded(self) -> Plume:
        if self._plume is None:
            self._plume = Plume(self.model, device=self.device, truncate_dim=self.truncate_dim)
        return self._plume
