"""Bad input: each error names the input, says what was expected and what to do."""

from __future__ import annotations

import base64
import functools
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plume import InputError, Item
from plume.inputs.images import MAX_IMAGE_PIXELS
from plume.inputs.item import list_inputs


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
    "empty string": ("", "input 7: it is empty; expected text that is not blank, an image, a page or a video"),
    "blank string": (" \n", "input 7: it is empty"),
    "empty dict": ({}, "input 7: it is empty"),
    "number": (3.5, "input 7: it is a float; expected a string, a PIL image"),
    "none": (None, "input 7: it is a NoneType"),
    "unknown key": ({"txt": "a"}, "input 7: it has unknown keys ['txt']; expected"),
    "text of a wrong type": ({"text": 3}, 'input 7: "text" is a int; expected a string'),
    "image of a wrong type": ({"image": 3}, 'input 7: "image" is a int'),
    "image in a list of a wrong type": ({"image": [3]}, "input 7: an image is a int"),
    "broken Unicode": ("a\ud800b", "input 7: the text is not valid Unicode"),
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


def parts(item: Item) -> list[str]:
    return [part if isinstance(part, str) else "Video" if part in item.videos else "Image" for part in item.content]


def test_the_dict_of_qwen3_vl_embedding_is_taken_as_it_is(picture, tmp_path):
    picture().save(tmp_path / "demo.jpeg")
    raws = [
        {"text": "A woman plays with her dog.", "instruction": "Retrieve images relevant to the query."},
        {"image": str(tmp_path / "demo.jpeg")},
        {"text": "A dog", "image": [str(tmp_path / "demo.jpeg")], "video": None},
        {"video": [picture()] * 3, "text": None, "fps": None, "max_frames": 2},
    ]
    items = [Item.parse(raw) for raw in raws]
    assert [item.modality for item in items] == ["text", "image", "image+text", "video"]
    assert items[0].instruction == "Retrieve images relevant to the query."
    assert len(items[3].videos[0].frames) == 2


def test_media_of_a_dict_stand_before_its_text_whatever_the_order_of_keys(picture):
    raw = {"text": ["a", "b"], "video": [picture(), picture()], "image": [picture(), picture()]}
    assert parts(Item.parse(raw)) == ["Video", "Image", "Image", "a", "b"]


def test_chat_messages_keep_the_order_of_their_parts(picture, tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    user = [
        {"type": "text", "text": "between "},
        {"type": "image", "image": picture()},
        {"type": "text", "text": " and "},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "video", "video": [picture(), picture()]},
    ]
    messages = [{"role": "system", "content": "Compare:"}, {"role": "user", "content": user}]
    item = Item.parse(messages)
    assert parts(item) == ["between ", "Image", " and ", "Image", "Image", "Image", "Video"]
    assert item.instruction == "Compare:"
    assert np.array_equal(item.images[1], item.images[2])
    assert parts(Item.parse({"role": "user", "content": "red"})) == ["red"]


def test_an_image_behind_a_url_is_downloaded(picture, tmp_path):
    picture().save(tmp_path / "a.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (image,) = Item.parse({"image": f"{address}/a.png"}).images
        with pytest.raises(InputError, match=r"input 3: http://.*/b.png: it cannot be downloaded .*404"):
            Item.parse({"image": f"{address}/b.png"}, "input 3")
        server.shutdown()
    assert np.array_equal(image, picture())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"role": "assistant", "content": "a"}, "a message of role 'assistant'"),
        ({"role": "user", "content": 3}, "the content of a message is 3"),
        ({"role": "user", "content": [{"type": "audio", "audio": "x"}]}, "a part of type 'audio'"),
        ({"role": "user", "content": [{"type": "image"}]}, "a part of type 'image' without content"),
        ({"role": "user", "content": [{"type": "image", "base64": "%"}]}, "not valid base64"),
        ({"role": "user", "content": []}, "is empty"),
        ({"video": [Path("a.png")], "fps": -1}, "'fps' is -1; expected a number above 0"),
        (
            {"image": np.zeros((4, 4), np.float32)},
            "an image is float32 of shape (4, 4); expected uint8 [H, W], [H, W, C]",
        ),
        (Path("report.pdf"), "pass plume.pages('report.pdf')"),
        (Path("archive.zip"), "of no kind that plume reads"),
        (Path("latin.txt"), "is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_composed_input_is_said(raw, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("report.pdf", "archive.zip"):
        Path(name).write_bytes(b"x")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="input 5") as caught:
        Item.parse(raw, "input 5")
    assert message in str(caught.value)


def test_a_large_image_is_reduced_as_it_is_loaded_to_what_the_image_processor_makes_of_it(model, picture):
    """Waiting inputs then hold no more pixels than the model looks at; the patches are the same to the bit."""
    processor = model.processor
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 56 * 56}
    large = picture(300, 170)
    (small,) = processor.parse(large).images
    assert small.width * small.height <= 56 * 56
    assert torch.equal(processor.pack_media([small])["pixel_values"], processor.pack_media([large])["pixel_values"])
    assert processor.parse(picture(30, 30)).images[0].size == (30, 30)


def test_a_path_is_read_by_its_name_and_a_string_never_is(tmp_path, picture):
    (tmp_path / "note.txt").write_text("a kite", encoding="utf-8-sig")
    picture().save(tmp_path / "a.PNG")
    assert Item.parse(tmp_path / "note.txt").text == "a kite"
    assert Item.parse(tmp_path / "a.PNG").modality == "image"
    assert Item.parse(str(tmp_path / "a.PNG")).modality == "text"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.zeros(4, 4, 3, dtype=torch.bfloat16), "an image is torch.bfloat16"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.bfloat16), "a video is torch.bfloat16"),
        ({"bytes": "/etc/hostname"}, '"bytes" is a str; expected the bytes of a file'),
        ({"image": {"bytes": "/etc/hostname"}}, '"bytes" is a str'),
        ({"text": np.array(["a", "b"])}, '"text" is a ndarray'),
        ({"video": "clip.mp4", "max_frames": float("inf")}, "'max_frames' is inf"),
        ({"video": {"array": np.zeros((2, 28, 28, 3), np.uint8), "video_metadata": "fast"}}, '"video_metadata"'),
        ({"video": {"array": np.zeros((2, 28, 28, 3), np.uint8), "video_metadata": {"fps": -1}}}, '"video_metadata"'),
    ],
)
def test_pixels_files_and_settings_of_a_wrong_type_are_refused_as_inputs(raw, message):
    with pytest.raises(InputError, match=message):
        Item.parse(raw)


def test_files_are_taken_in_every_form_that_holds_one(picture, tmp_path):
    image = picture(40, 30)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    text = base64.b64encode(content).decode()
    expected = image.convert("RGB").tobytes()
    forms = [
        memoryview(content),
        {"path": str(tmp_path / "a.png")},
        {"image": {"path": str(tmp_path / "a.png")}},
        {"image": f"DATA:image/png;BASE64,{text}"},
        {"image": f" data:image/png;base64,{text}==="},
        {"image": f"file://localhost{tmp_path}/a.png"},
    ]
    for form in forms:
        assert Item.parse(form).images[0].tobytes() == expected, form


def test_an_open_file_is_no_list_of_inputs(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    with (tmp_path / "a.txt").open() as file, pytest.raises(InputError, match=r"open file .* its lines"):
        list_inputs(file)


def test_arrays_of_arrow_are_lists_of_python_objects():
    pa = pytest.importorskip("pyarrow")
    assert list_inputs(pa.array(["a", "b"])) == (["a", "b"], False)
