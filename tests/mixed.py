"""A folder of files of every kind, sound and broken, for the tests of indexing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

COLOURS = ["red", "green", "blue", "black", "white", "orange", "purple", "grey"]

#: What is wrong with each broken file, as the report must say it.
BROKEN = {
    "broken/cut.jpg": "cannot be read as an image",
    "broken/empty.png": "cannot be read as an image",
    "broken/text called.png": "cannot be read as an image",
    "broken/bomb.png": "too large to decode safely (Image size (400000000 pixels)",
    "broken/cut.gif": "cannot be read as an image",
    "broken/encrypted.pdf": "encrypted",
    "broken/cut.pdf": "cannot be opened as a PDF",
    "broken/empty.pdf": "cannot be opened as a PDF",
    "broken/sound only.mp4": "no video stream",
    "broken/no frames.mkv": "no frames",
    "broken/cut.mp4": "cannot be decoded as a video",
    "broken/empty.mp4": "cannot be decoded as a video",
    "broken/blank.txt": "is empty",
    "broken/latin.txt": "not UTF-8",
    "broken/long.txt": "tokens, the model takes 4096",
    "broken/loop.txt": "Too many levels of symbolic links",
    "broken/nowhere.png": "No such file",
    "broken/up": "a link to a folder",
}

ENCRYPTED = b"""%PDF-1.4
1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj
2 0 obj <</Type /Pages /Kids [3 0 R] /Count 1>> endobj
3 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 99 99]>> endobj
4 0 obj <</Filter /Standard /V 1 /R 2 /P -4 /O (01234567890123456789012345678901) \
/U (01234567890123456789012345678901)>> endobj
trailer <</Root 1 0 R /Encrypt 4 0 R /ID [(a) (a)] /Size 5>>
%%EOF
"""


def write_clip(path: Path, shades: list[int], codec: str = "mpeg4") -> None:
    """A clip with one grey frame per shade."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for shade in shades:
            frame = np.full((48, 64, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def write_sound(path: Path, with_video: bool) -> None:
    """A file with sound and, if asked for, a video stream that no frame was written to."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        if with_video:
            video = container.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())


def write_pdf(path: Path, colours: list[str]) -> None:
    """A document with one plain page per colour."""
    sheets = [Image.new("RGB", (60, 80), colour) for colour in colours]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], resolution=72)


def write_mixed_folder(root: Path, num_sound: int = 181) -> int:
    """Write sound files of every kind below `root`, and the broken ones; returns the number of rows they make."""
    places = [root / "notes", root / "Bilder und Fotos", root / "видео", root / "docs" / "deep er"]
    for place in places:
        place.mkdir(parents=True)
    rows = 0
    rng = np.random.default_rng(0)
    for number in range(num_sound):
        colour = COLOURS[number % len(COLOURS)]
        kind = ("txt", "png", "jpg", "gif", "md", "png", "pdf", "mp4", "txt", "jpg")[number % 10]
        place = places[{"txt": 0, "md": 0, "png": 1, "jpg": 1, "gif": 2, "mp4": 2, "pdf": 3}[kind]]
        path = place / f"{number:03} {colour} é.{kind}"
        rows += 1
        if kind in ("txt", "md"):
            path.write_text(f"a {colour} kite, number {number}", encoding="utf-8")
        elif kind in ("png", "jpg"):
            Image.fromarray(rng.integers(0, 256, (40 + number % 30, 60, 3), dtype=np.uint8)).save(path)
        elif kind == "gif":
            frames = [Image.new("RGB", (40, 40), (number, 10 * index, 0)) for index in range(12)]
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
        elif kind == "mp4":
            write_clip(path, [(number + 20 * index) % 256 for index in range(10)])
        else:
            colours = [COLOURS[(number + page) % len(COLOURS)] for page in range(2 + number % 3)]
            write_pdf(path, colours)
            rows += len(colours) - 1
    (places[0] / "a copy.txt").write_text("a red kite, number 0", encoding="utf-8")
    (root / ".hidden.txt").write_text("not to be indexed")
    (root / "archive.zip").write_bytes(b"PK")
    write_broken(root / "broken", sound=places[1] / "001 green é.png")
    return rows + 1


def write_broken(folder: Path, sound: Path) -> None:
    """One broken file of each kind; their names are the keys of `BROKEN`."""
    folder.mkdir()
    Image.effect_noise((200, 200), 50).save(folder / "cut.jpg")
    write_clip(folder / "cut.mp4", list(range(0, 250, 5)))
    write_pdf(folder / "cut.pdf", ["red"])
    frames = [Image.effect_noise((50, 50), 50) for _ in range(3)]
    frames[0].save(folder / "cut.gif", save_all=True, append_images=frames[1:])
    for name, share in (("cut.jpg", 0.5), ("cut.mp4", 0.5), ("cut.pdf", 0.2), ("cut.gif", 0.001)):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: max(int(len(content) * share), 4)])
    for name in ("empty.png", "empty.pdf", "empty.mp4"):
        (folder / name).write_bytes(b"")
    (folder / "text called.png").write_text("this is no picture")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "encrypted.pdf").write_bytes(ENCRYPTED)
    write_sound(folder / "sound only.mp4", with_video=False)
    write_sound(folder / "no frames.mkv", with_video=True)
    (folder / "blank.txt").write_text("  \n")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "long.txt").write_text("z " * 5000)
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "up").symlink_to(folder.parent, target_is_directory=True)
    (folder / "link.png").symlink_to(sound)
