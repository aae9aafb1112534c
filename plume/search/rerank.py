"""A second look at the best results, by a model that reads query and result together.

A reranker is any function from a query and hits to scores, larger is better: `Index.search(rerank=...)` calls it with
the best rows and orders them by what it says. `CrossEncoderReranker` is one for every `CrossEncoder` of
sentence-transformers, for text or for text and images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from plume.inputs.errors import InputError
from plume.inputs.file_kinds import Kind
from plume.inputs.images import load_image
from plume.inputs.item import Item, read_text
from plume.inputs.pages import pages
from plume.search.query import inputs_of
from plume.search.ranking import Hit

# Of a page that has no words.
_PAGE_PIXELS = 768 * 28 * 28

Reranker = Callable[[Any, Sequence[Hit]], Sequence[float]]
"""Scores of hits for a query, larger is better; NaN where one cannot be judged, which then stands behind the others."""


def reranked(query: Any, hits: Sequence[Hit], rerank: Reranker) -> list[Hit]:
    """Hits in the order of a reranker's scores; those that it cannot judge follow in their own order.

    Raises:
        ValueError: another number of scores than of hits.
    """
    if not hits:
        return []
    scores = np.asarray(rerank(query, hits), dtype=np.float64)
    if scores.shape != (len(hits),):
        raise ValueError(f"the reranker gave scores of shape {list(scores.shape)} for {len(hits)} hits")
    order = np.argsort(-scores, kind="stable")  # NaN stands last
    return [replace(hits[at], rerank_score=None if np.isnan(scores[at]) else float(scores[at])) for at in order]


class CrossEncoderReranker:
    """Scores by a `CrossEncoder` of sentence-transformers, of what the files hold now.

    Texts and pages of PDFs with words are given as text, images and pages without as pictures. What is not there any
    more, and videos, are not judged.
    """

    def __init__(self, model: Any, *, batch_size: int = 8, **kwargs: Any):
        """Open a model, if it is not one already.

        Args:
            model: a `CrossEncoder`, or the name or folder of one.
            batch_size: pairs per pass.
            kwargs: as for `CrossEncoder`, for example `device`.
        """
        if isinstance(model, (str, Path)):
            from sentence_transformers import CrossEncoder

            model = CrossEncoder(str(model), **kwargs)
        self.model, self.batch_size = model, batch_size

    def __call__(self, query: Any, hits: Sequence[Hit]) -> list[float]:
        """Scores of hits for a text, or for an input with an image."""
        documents = [document_of(hit) for hit in hits]
        judged = [at for at, document in enumerate(documents) if document is not None]
        scores = np.full(len(hits), np.nan)
        if judged:
            asked = asked_of(query)
            pairs = [(asked, documents[at]) for at in judged]
            scores[judged] = self.model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
        return scores.tolist()


def asked_of(query: Any) -> Any:
    """What is wanted of a query, as sentence-transformers takes it: a text, or a dict with an image and perhaps a text.

    Raises:
        ValueError: nothing that a model could read, or more than one image.
    """
    items = [Item.parse(part, "the query") for part, is_wanted in inputs_of(query) if is_wanted]
    text = " ".join(item.text for item in items if item.text)
    images = [image for item in items for image in item.images]
    if len(images) > 1 or not (images or text):
        raise ValueError("a reranker reads words or one image that are wanted; this query has none, or more images")
    return {"image": images[0], **({"text": text} if text else {})} if images else text


def document_of(hit: Hit) -> Any:
    """What a hit shows, as text or as a picture; None where it cannot be read, or is a video."""
    if not hit.is_there:
        return None
    path = Path(hit.path)
    try:
        if hit.kind == Kind.TEXT:
            if not path.is_file():  # of a table
                return hit.excerpt or None
            text = read_text(path, hit.path)
            return text if hit.start is None or hit.end is None else text[int(hit.start) : int(hit.end)]
        if hit.kind == Kind.PDF and hit.page is not None:
            page = next(page for page in pages(path, hit.path) if page.page == hit.page)
            return page.text().strip() or page.render(_PAGE_PIXELS)
        return load_image(path, hit.path) if hit.kind == Kind.IMAGE else None
    except (InputError, OSError, StopIteration):
        return None
