"""PDF pages: rendered one at a time within the pixel budget."""

from __future__ import annotations

import math

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from plume import InputError, Item, pages
from tests.mixed import ENCRYPTED, write_pdf


def test_a_document_gives_its_pages_with_their_numbers(two_page_pdf):
    first, second = pages(two_page_pdf)
    assert (first.page, second.page, first.num_pages) == (1, 2, 2)
    assert first.document == two_page_pdf
    shades = [np.asarray(page.render(10_000)).reshape(-1, 3).mean(axis=0).round() for page in (first, second)]
    assert np.abs(shades[0] - [255, 0, 0]).max() < 3
    assert np.abs(shades[1] - [0, 0, 255]).max() < 3


@pytest.mark.parametrize("max_pixels", [784, 5_000, 50_000, 602_112])
@pytest.mark.parametrize("size", [(595, 842), (842, 595), (100, 700)], ids=str)
def test_a_page_fills_the_pixel_budget_and_never_exceeds_it(tmp_path, max_pixels, size):
    document = pypdfium2.PdfDocument.new()
    document.new_page(*size)
    document.save(tmp_path / "a.pdf")
    (page,) = pages(tmp_path / "a.pdf")
    image = page.render(max_pixels)
    finest = math.prod(side * 200 / 72 for side in size)
    assert 0.8 * min(max_pixels, finest) < image.width * image.height <= max_pixels


def test_a_page_is_an_input_like_any_other(model, plume_folder, two_page_pdf):
    page = pages(two_page_pdf)[1]
    item = model.processor.parse(page)
    assert item.modality == "image"
    assert item.images[0].width * item.images[0].height <= model.processor.limits.pixels[1]
    both = Item.parse({"image": [page, Image.new("RGB", (28, 28))], "text": "compare"})
    assert [image.size for image in both.images][1] == (28, 28)


def test_pages_are_small_when_they_are_listed(tmp_path):
    write_pdf(tmp_path / "long.pdf", ["red"] * 50)
    assert [page.page for page in pages(tmp_path / "long.pdf")] == list(range(1, 51))


FORM = b"""%PDF-1.4
1 0 obj <</Type /Catalog /Pages 2 0 R /AcroForm <</Fields [4 0 R]>>>> endobj
2 0 obj <</Type /Pages /Kids [3 0 R] /Count 1>> endobj
3 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] /Annots [4 0 R]>> endobj
4 0 obj <</Type /Annot /Subtype /Widget /FT /Tx /T (a) /Rect [0 0 100 100] /P 3 0 R /F 4 /AP <</N 5 0 R>>>> endobj
5 0 obj <</Type /XObject /Subtype /Form /BBox [0 0 100 100] /Length 25>> stream
0 0 0 rg 0 0 100 50 re f\n
endstream endobj
trailer <</Root 1 0 R /Size 6>>
%%EOF
"""


def test_what_was_filled_into_a_form_is_drawn(tmp_path):
    (tmp_path / "form.pdf").write_bytes(FORM)
    image = np.asarray(pages(tmp_path / "form.pdf")[0].render(10_000))
    assert image[:40].min() > 200
    assert image[60:].max() < 50


def test_a_large_page_is_scaled_down_and_a_thread_is_refused(tmp_path):
    document = pypdfium2.PdfDocument.new()
    for size in ((14_000, 14_000), (5, 5_000)):
        document.new_page(*size)
    document.save(tmp_path / "odd.pdf")
    large, thread = pages(tmp_path / "odd.pdf")
    assert large.render(10_000).width in (99, 100)
    with pytest.raises(InputError, match="sides may differ by 200 times at most"):
        thread.render(10_000)


BAD = {
    "encrypted.pdf": (ENCRYPTED, "it is encrypted; save it without a password"),
    "text.pdf": (b"no document", "cannot be opened as a PDF"),
    "empty.pdf": (b"", "cannot be opened as a PDF"),
    "missing.pdf": (None, "no file at"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_document_that_cannot_be_read_is_named(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        pages(tmp_path / name, "input 1")
    assert str(caught.value).startswith("input 1: ")
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_a_page_that_cannot_be_drawn_is_named_whatever_goes_wrong(two_page_pdf, monkeypatch):
    monkeypatch.setattr(pypdfium2.PdfPage, "get_size", lambda self: (0, 0))
    with pytest.raises(InputError, match=r"input 4: page 2 of .*two pages.pdf: it cannot be drawn"):
        Item.parse(pages(two_page_pdf)[1], "input 4")


def test_a_document_that_has_gone_is_named_with_its_page(two_page_pdf, tmp_path):
    copy = tmp_path / "copy.pdf"
    copy.write_bytes(two_page_pdf.read_bytes())
    page = pages(copy)[1]
    copy.unlink()
    with pytest.raises(InputError, match=r"input 4: .*copy.pdf"):
        Item.parse(page, "input 4")


def test_what_is_no_document_is_said(tmp_path):
    for raw in (b"%PDF-1.4", None, 5, ["a.pdf"]):
        with pytest.raises(InputError, match=f"a document is a {type(raw).__name__}; expected a path to a PDF"):
            pages(raw)
    pypdfium2.PdfDocument.new().save(tmp_path / "empty.pdf")
    with pytest.raises(
        InputError, match=r"empty\.pdf: it cannot be opened as a PDF \(it is damaged, or holds no page\)"
    ):
        pages(tmp_path / "empty.pdf")
