"""Images of every mode, format and layout: their transparency, what decodes them, what is refused."""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from plume import InputError, Item, PlumeModel
from plume.inputs.images import load_image
from plume.random_models import SHORT_STRINGS

GREY = (200, 100, 50)


def shape_on_nothing(draw: str, mode: str = "RGBA") -> Image.Image:
    """A black ellipse or rectangle; what is around it is transparent, and black beneath."""
    image = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    getattr(ImageDraw.Draw(image), draw)((8, 8, 47, 47), fill=(0, 0, 0, 255))
    if mode == "P":
        palette = Image.new("P", image.size, 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, mask=image.getchannel("A"))
        palette.info["transparency"] = 0
        return palette
    if mode in ("L", "RGB", "I;16"):  # one shade is transparent
        array = np.where(np.asarray(image)[..., 3] > 0, 0, 1)
        if mode == "RGB":
            keyed = Image.fromarray(np.repeat(array[..., None], 3, axis=2).astype(np.uint8))
        else:
            keyed = Image.fromarray(array.astype(np.uint16 if mode == "I;16" else np.uint8))
        keyed.info["transparency"] = (1, 1, 1) if mode == "RGB" else 1
        return keyed
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


def corner(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((2, 2))


MODES = ["RGBA", "LA", "PA", "La", "RGBa", "P", "L", "RGB", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_transparent_pixels_show_the_background_in_every_mode(mode):
    for background, expected in (("white", (255,) * 3), ("#c86432", GREY), (None, None)):
        found = load_image(shape_on_nothing("rectangle", mode), background=background)
        assert found.mode == "RGB"
        assert found.getpixel((28, 28)) == (0, 0, 0)
        if expected is not None:
            assert corner(found) == expected
        elif mode not in ("La", "RGBa"):  # which store nothing beneath
            assert max(corner(found)) <= 1


FORMATS = {
    "png": ["RGBA", "LA", "P", "L", "RGB"],
    "webp": ["RGBA"],
    "tiff": ["RGBA", "LA"],
    "gif": ["P"],
    "avif": ["RGBA"],
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in FORMATS.items() for mode in modes])
def test_transparent_pixels_show_the_background_in_every_format(tmp_path, suffix, mode):
    image, file = shape_on_nothing("ellipse", mode), tmp_path / f"a.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "avif" else {}
    image.save(
        file, **lossless, **({"transparency": image.info["transparency"]} if "transparency" in image.info else {})
    )
    (found,) = Item.parse(file).images
    assert min(corner(found)) >= 250
    assert max(found.getpixel((28, 28))) <= 5


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_frames_of_an_animation_stand_on_the_background(tmp_path, suffix):
    frames = [shape_on_nothing("ellipse"), shape_on_nothing("rectangle")]
    settings = {"lossless": True} if suffix == "webp" else {"disposal": 2}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100, **settings)
    (video,) = Item.parse(tmp_path / f"a.{suffix}").videos
    first, second = (video.picture(share).resize((56, 56)) for share in (0.0, 0.9))
    assert min(corner(first)) >= 250
    assert min(corner(second)) >= 250
    assert not np.array_equal(first, second)


def test_shapes_on_a_transparent_ground_have_vectors_of_their_own_unless_the_checkpoint_drops_it(backbone_folder):
    inputs = [shape_on_nothing("ellipse"), shape_on_nothing("rectangle")]
    for background, differ in (("white", True), (None, False)):
        model = PlumeModel.from_backbone(str(backbone_folder), background=background, **SHORT_STRINGS)
        items = [model.processor.parse(one) for one in inputs]
        first, second = model(**model.processor.encode(items)).embedding
        assert torch.allclose(first, second, atol=1e-5) is not differ


def test_a_background_that_is_no_colour_is_refused(backbone_folder):
    with pytest.raises(ValueError, match="background must be None or a colour"):
        PlumeModel.from_backbone(str(backbone_folder), background="transparent-ish")


def test_photos_of_telephones_are_read(tmp_path, picture):
    pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    for suffix, form in ((".heic", "HEIF"), (".HIF", "HEIF"), (".avif", "AVIF"), (".jfif", "JPEG")):
        smooth.save(tmp_path / f"a{suffix}", form)
        (image,) = Item.parse(tmp_path / f"a{suffix}").images
        assert np.abs(np.asarray(image).astype(int) - np.asarray(smooth)).mean() < 4, suffix


LAYOUTS = {
    "grey": lambda a: a[..., 0],
    "grey with an axis": lambda a: a[..., :1],
    "height, width, channels": lambda a: a,
    "channels, height, width": lambda a: a.transpose(2, 0, 1),
    "a tensor": lambda a: torch.from_numpy(a.transpose(2, 0, 1).copy()),
    "opaque": lambda a: np.concatenate([a, np.full_like(a[..., :1], 255)], axis=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_pixels_are_images_in_every_layout(layout):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    raw = LAYOUTS[layout](pixels)
    expected = pixels[..., :1].repeat(3, axis=2) if "grey" in layout else pixels
    for one in (raw, {"image": raw}):
        (image,) = Item.parse(one).images
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 40, 3), np.uint8), "nobody can tell which; pass PIL images"),
        (np.zeros((2, 3, 40, 3), np.uint8), "nobody can tell which; pass PIL images"),
        (np.zeros((40, 40, 3), np.float32), "is float32 of shape (40, 40, 3); expected uint8"),
        (np.zeros((40, 40, 5), np.uint8), "of shape (40, 40, 5); expected uint8"),
        (np.zeros((0, 40, 3), np.uint8), "of shape (0, 40, 3); expected uint8"),
        (torch.zeros(3, 40, 40), "is float32 of shape (3, 40, 40); expected uint8"),
        (np.zeros((1, 2, 3, 40, 40), np.uint8), "of shape (1, 2, 3, 40, 40); expected uint8"),
        (np.zeros(7, np.uint8), "an image is uint8 of shape (7,); expected uint8"),
    ],
    ids=str,
)
def test_an_array_that_is_no_image_or_can_be_read_in_two_ways_is_refused(array, message):
    with pytest.raises(InputError) as caught:
        Item.parse(array, "input 3")
    assert str(caught.value).startswith("input 3: ")
    assert message in str(caught.value)


def test_bytes_and_the_dicts_of_data_sets_are_images(tmp_path, picture):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    whole = buffer.getvalue()
    ways = [
        whole,
        bytearray(whole),
        {"bytes": whole, "path": "somewhere.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"image": whole},
        {"image": [{"bytes": whole, "path": None}]},
    ]
    for raw in ways:
        (image,) = Item.parse(raw).images
        assert np.array_equal(image, picture())
    with pytest.raises(InputError, match="input 2: it cannot be read as an image"):
        Item.parse(b"no image", "input 2")


def data_uris(content: bytes) -> dict[str, str]:
    plain = base64.b64encode(content).decode()
    lines = "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    return {
        "plain": f"data:image/png;base64,{plain}",
        "with line breaks": f"data:image/png;base64,{lines}\n",
        "percent-encoded": f"data:image/png;base64,{urllib.parse.quote(plain, safe='')}",
        "of the URL-safe alphabet": f"data:image/png;base64,{base64.urlsafe_b64encode(content).decode()}",
        "without padding": f"data:image/png;base64,{base64.urlsafe_b64encode(content).decode().rstrip('=')}",
        "percent-encoded lines": f"data:image/png;charset=utf-8;base64,{urllib.parse.quote(lines)}",
        "not in base64": f"data:image/png,{urllib.parse.quote_from_bytes(content)}",
    }


@pytest.mark.parametrize("way", data_uris(b""))
def test_data_uris_are_read_as_browsers_read_them(picture, way):
    for seed in range(3):  # other contents end in other paddings and use other letters
        buffer = io.BytesIO()
        picture(40 + seed, 40, seed).save(buffer, "PNG")
        (image,) = Item.parse({"image": data_uris(buffer.getvalue())[way]}).images
        assert np.array_equal(image, picture(40 + seed, 40, seed))
    with pytest.raises(InputError, match=r"input 4: .* is not valid base64"):
        Item.parse({"image": "data:image/png;base64,%%%%"}, "input 4")


def test_content_that_starts_programs_is_refused_whatever_the_name_says(tmp_path, monkeypatch):
    def ghostscript(*args, **kwargs):
        raise AssertionError("started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "EPS")
    (tmp_path / "photo.png").write_bytes(buffer.getvalue())
    for raw in (tmp_path / "photo.png", buffer.getvalue(), {"image": str(tmp_path / "photo.png")}):
        with pytest.raises(InputError, match="no image of a format that plume reads"):
            Item.parse(raw)


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for raw in ({"image": str(tmp_path / "pipe.png")}, {"video": str(tmp_path / "zero.mp4")}, {"image": "/dev/zero"}):
        with pytest.raises(InputError, match="is not a plain file"):
            Item.parse(raw)
    with pytest.raises(InputError, match="is not a plain file"):
        Item.parse({"image": str(tmp_path)})
    assert not Path(tmp_path / "pipe.png").is_file()


@pytest.mark.parametrize("size", [(1600, 1200), (1203, 1601), (2400, 700)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_reduced_within_a_bound(tmp_path, size, orientation, monkeypatch):
    """Of the size that the full decode has, and less than one level of 256 away from it on average."""
    coarse = np.random.default_rng(0).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    exif = photo.getexif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "a.jpg", quality=92, exif=exif)
    for most in (784 * 200, 784 * 900):
        found = load_image(tmp_path / "a.jpg", pixels=(3136, most))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plume.inputs.images._decode_reduced", lambda image, pixels: image)
            expected = load_image(tmp_path / "a.jpg", pixels=(3136, most))
        assert found.size == expected.size
        distance = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
        assert distance.mean() < 1
        assert distance.max() < 24
    small = load_image(tmp_path / "a.jpg", pixels=(3136, size[0] * size[1]))
    assert np.array_equal(small, load_image(tmp_path / "a.jpg"))


def test_a_transparent_colour_of_sixteen_bits_is_the_reduced_one(tmp_path):
    image = Image.new("RGB", (2, 1), (16, 32, 48))
    image.putpixel((1, 0), (200, 0, 0))
    image.info["transparency"] = (0x10AB, 0x20CD, 0x30EF)  # as Pillow reads the key of a PNG of 16 bits
    seen = load_image(image)
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert seen.getpixel((1, 0)) == (200, 0, 0)
    assert image.info["transparency"] == (0x10AB, 0x20CD, 0x30EF)
