"""Pages of PDF documents, rendered one at a time when they are embedded."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from plume.inputs.errors import InputError, located, no_file
from plume.inputs.images import check_size

#: Pages are rendered to fill the pixel budget, but not finer than this.
MAX_DPI = 200
_POINTS_PER_INCH = 72
# PDFium is not safe to call from two threads.
_PDFIUM = threading.Lock()


@dataclass(frozen=True)
class Page:
    """One page of a document; an input like any other, rendered when it is embedded.

    document: the file.
    page: counted from 1.
    num_pages: of the document.
    """

    document: Path
    page: int
    num_pages: int

    def render(self, max_pixels: int, name: str = "the input") -> Image.Image:
        """The page as an RGB image of at most `max_pixels` pixels and `MAX_DPI`.

        Raises:
            InputError: the document cannot be opened, or the page cannot be drawn.
        """
        where = f"{name}: page {self.page} of {self.document}"
        with _PDFIUM, _opened(self.document, name) as document:
            try:
                document.init_forms()  # else what people filled in is not drawn
                page = document[self.page - 1]
                width, height = page.get_size()
                scale = min(MAX_DPI / _POINTS_PER_INCH, math.sqrt(max_pixels / (width * height)))
                # PDFium rounds sides up, which must not exceed the budget.
                while math.ceil(width * scale) * math.ceil(height * scale) > max_pixels:
                    scale *= 0.999
                check_size((math.ceil(width * scale), math.ceil(height * scale)), where)
                bitmap = page.render(scale=scale, rev_byteorder=True)
                image = bitmap.to_pil().convert("RGB")
                bitmap.close()
                page.close()
            except InputError:
                raise
            except Exception as error:  # broken documents raise anything
                raise InputError(where, f"it cannot be drawn ({error}); replace the file") from None
        return image

    def text(self, name: str = "the input") -> str:
        """The characters that the page holds; empty where it is a picture of a page.

        Raises:
            InputError: the document cannot be opened, or the page cannot be read.
        """
        with _PDFIUM, _opened(self.document, name) as document:
            try:
                page = document[self.page - 1]
                written = page.get_textpage()
                text = written.get_text_bounded()
                written.close()
                page.close()
            except Exception as error:  # broken documents raise anything
                where = f"{name}: page {self.page} of {self.document}"
                raise InputError(where, f"its text cannot be read ({error}); replace the file") from None
        return "\n".join(text.split("\r\n")).strip()


def pages(path: str | os.PathLike, name: str = "the input") -> list[Page]:
    """The pages of a PDF file, none of them rendered yet.

    Raises:
        InputError: no such file, not a PDF, encrypted, or without pages.

    Example:
        >>> [page.page for page in pages(getfixture("two_page_pdf"))]
        [1, 2]
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            name, f"a document is a {type(path).__name__}; expected a path to a PDF: save its content to a file"
        )
    path = Path(path)
    with _PDFIUM, _opened(path, name) as document:
        total = len(document)
    if not total:
        raise InputError(located(name, path), "it has no pages; replace the file")
    return [Page(path, number, total) for number in range(1, total + 1)]


def _opened(path: Path, name: str) -> Any:
    try:
        import pypdfium2
    except ImportError:
        raise InputError(name, f"reading {path} needs pypdfium2; pip install 'plume-embed[pdf]'") from None
    if not path.is_file():
        raise no_file(name, path, "a PDF")
    try:
        return pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        # PDFium says more of some files, but of one without pages that all went well, or what it said of the last one.
        is_locked = "password" in str(error).lower()
        reason = "it is encrypted; save it without a password" if is_locked else "it is damaged, or holds no page"
        raise InputError(located(name, path), f"it cannot be opened as a PDF ({reason})") from None
