"""Bad input: each error names the input, says what was expected and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plume import InputError, Item
from plume.images import MAX_IMAGE_PIXELS


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (12_000, 12_000)).save(tmp_path / "huge.png")
    Image.new("L", (2, 500)).save(tmp_path / "thread.png")
    return tmp_path


BAD_FILES = {
    "text.png": "cannot be read as an image",
    "empty.png": "cannot be read as an image",
    "cut.jpg": "cannot be read as an image",
    "missing.png": "no file at",
    "huge.png": "scale it down",
    "thread.png": "sides may differ by 200 times at most",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_an_image_that_cannot_be_decoded_safely_is_refused_by_name(files, name):
    with pytest.raises(InputError) as caught:
        Item.parse(files / name, "input 3")
    assert str(caught.value).startswith("input 3: ")
    assert name in str(caught.value)
    assert BAD_FILES[name] in str(caught.value)


BAD_INPUTS = {
    "empty string": ("", "input 7 is empty; expected text that is not blank, an image, a page or a video"),
    "blank string": (" \n", "input 7 is empty"),
    "empty dict": ({}, "input 7 is empty"),
    "number": (3.5, "input 7 is a float; expected a string, a PIL image"),
    "none": (None, "input 7 is a NoneType"),
    "unknown key": ({"txt": "a"}, "input 7 has unknown keys ['txt']; expected"),
    "text of a wrong type": ({"text": 3}, 'input 7: "text" is a int; expected a string'),
    "image of a wrong type": ({"image": 3}, 'input 7: "image" is a int'),
    "image in a list of a wrong type": ({"image": [3]}, "input 7: an image is a int"),
    "broken Unicode": ("a\ud800b", "input 7: the text is not valid Unicode"),
    "own token": ("a <gen_emb> b", "input 7: the text holds '<gen_emb>', a token that plume places itself"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_an_input_that_cannot_be_embedded_is_refused_with_a_remedy(name):
    raw, message = BAD_INPUTS[name]
    with pytest.raises(InputError) as caught:
        Item.parse(raw, "input 7")
    assert message in str(caught.value)


def test_the_limit_on_pixels_is_checked_before_decoding():
    class Huge(Image.Image):
        @property
        def size(self):
            return (MAX_IMAGE_PIXELS, 2)

        def load(self):
            raise AssertionError("decoded")

    with pytest.raises(InputError, match="are not decoded; scale it down"):
        Item.parse(Huge())


def test_images_become_upright_rgb(tmp_path):
    sideways = Image.new("RGBA", (20, 40))
    exif = sideways.getexif()
    exif[0x0112] = 6  # the camera was turned
    sideways.save(tmp_path / "turned.png", exif=exif)
    (image,) = Item.parse(Path(tmp_path / "turned.png")).images
    assert image.mode == "RGB"
    assert image.size == (40, 20)


def test_sixteen_bits_keep_their_shades_and_unknown_ranges_are_refused():
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(4, axis=0)
    (image,) = Item.parse(Image.fromarray(ramp)).images
    assert len(np.unique(np.asarray(image)[..., 0])) == 256
    with pytest.raises(InputError, match="32 bits per pixel"):
        Item.parse(Image.new("F", (28, 28)))


def test_a_closed_image_is_refused(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(InputError, match="input 2"):
        Item.parse(image, "input 2")


def test_an_instruction_of_the_call_yields_to_the_inputs_own():
    assert Item.parse("a").instructed("Find:").instruction == "Find:"
    assert Item.parse({"text": "a", "instruction": "Say:"}).instructed("Find:").instruction == "Say:"
