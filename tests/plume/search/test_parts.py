"""Passages of long texts, moments of videos, one result for each file, copies out of the way."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from plume import Index, InputError, Plume
from plume.cli.main import app
from plume.inputs import video as plume_video
from plume.inputs.file_kinds import Kind
from plume.inputs.item import Item
from plume.inputs.video import Sampling, load_video, seconds_of
from plume.search.query import Like
from plume.search.results_page import gallery, place_in_file
from plume.search.rows import Splitter

av = pytest.importorskip("av")

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def write_scenes(path: Path, seconds: int = 4, rate: int = 5) -> Path:
    """A clip of so many seconds of each colour, one after the other."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for colour in COLOURS.values():
            for _ in range(seconds * rate):
                frame = np.full((64, 64, 3), colour, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("library")
    write_scenes(root / "scenes.mp4")
    rng = np.random.default_rng(0)
    words = ["kite", "bird", "table", "blue", "red", "what", "is", "it", "to", "see", "from", "the", "hill"]
    parts = [f"# part {at}\n\n" + ". ".join(" ".join(rng.choice(words, 9)) for _ in range(6)) for at in range(5)]
    (root / "long.md").write_text("\n\n".join(parts) + "\n\nInvoice zebra 77\n")
    (root / "short.txt").write_text("a red kite")
    return root


@pytest.fixture(scope="module")
def index(library, plume, tmp_path_factory) -> Index:
    index = Index.create(tmp_path_factory.mktemp("made") / "index", plume, passage_tokens=40, clip_seconds=4)
    index.update(library, plume, show_progress=False)
    return index


def colours_of(video) -> set[str]:
    means = video.frames.float().mean(dim=(2, 3)).numpy()
    return {min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - mean).sum()) for mean in means}


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ({"start": 0, "end": 3.9}, {"red"}),
        ({"start": 4.1, "end": 7.9}, {"green"}),
        ({"start": 8.1}, {"blue"}),
        ({"end": 6}, {"red", "green"}),
        ({}, {"red", "green", "blue"}),
        ({"start": 3, "end": 9, "fps": 1}, {"red", "green", "blue"}),
    ],
)
def test_a_part_of_a_video_gives_its_own_frames(library, span, expected):
    (video,) = Item.parse({"video": library / "scenes.mp4", **span}, "input").videos
    assert colours_of(video) == expected


def test_parts_of_arrays_and_animations_are_taken_by_time(tmp_path):
    frames = np.concatenate([np.full((10, 32, 32, 3), shade, np.uint8) for shade in (10, 100, 200)])
    timed = {"array": frames, "video_metadata": {"fps": 10}}
    found = load_video(timed, Sampling(start=1.0, end=2.0))
    assert found.frames.float().mean(dim=(1, 2, 3)).tolist() == [100.0] * 8
    with pytest.raises(InputError, match="does not say when its frames appear"):
        load_video(frames, Sampling(start=1.0))
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    found = load_video(tmp_path / "a.gif", Sampling(start=2.0))
    assert found.frames.float().mean(dim=(1, 2, 3)).min() > 190


@pytest.mark.parametrize(
    "span", [{"start": -1}, {"start": 3, "end": 3}, {"end": float("nan")}, {"start": "a"}, {"start": ""}, {"end": True}]
)
def test_spans_that_are_none_are_refused(library, span):
    with pytest.raises(InputError, match="expected seconds, and the end after the start"):
        Item.parse({"video": library / "scenes.mp4", **span}, "input")


def test_a_span_behind_the_end_says_where_that_is(library):
    with pytest.raises(InputError, match=r"no frames from 90 s on; the last one is at 11\.8 s"):
        Item.parse({"video": library / "scenes.mp4", "start": 90}, "input")


def test_the_length_of_a_video_is_known(library, tmp_path):
    assert seconds_of(library / "scenes.mp4") == pytest.approx(12, abs=1e-3)
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    assert seconds_of(tmp_path / "broken.mp4") is None


def test_the_frame_that_is_on_the_screen_is_part_of_a_clip(tmp_path):
    """A frame every eight seconds: a clip between two of them shows the first."""
    with av.open(str(tmp_path / "slow.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1)
        for at, colour in enumerate(COLOURS.values()):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8))
            frame.pts = 8 * at
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for start, expected in ((2.0, "red"), (9.5, "green"), (17.0, "blue"), (20.0, "blue")):
        (video,) = Item.parse({"video": tmp_path / "slow.mkv", "start": start, "end": start + 2}, "input").videos
        assert colours_of(video) == {expected}
    whole, *clips = Splitter(clip_seconds=5).documents(tmp_path / "slow.mkv", "slow", Kind.VIDEO)
    assert len(clips) == whole.num_pages - 1 > 3
    for clip in clips:
        Item.parse(clip.raw, "input")


def test_late_clips_decode_no_more_than_early_ones(tmp_path, monkeypatch):
    """Key frames are jumped to, so that what comes before a clip is not decoded."""
    decoded = []
    take = plume_video._PixelBudget.take
    monkeypatch.setattr(plume_video._PixelBudget, "take", lambda self, pixels: (decoded.append(1), take(self, pixels)))
    write_scenes(tmp_path / "long.mp4", seconds=100, rate=10)
    for start in (5, 280):
        decoded.clear()
        (video,) = Item.parse({"video": tmp_path / "long.mp4", "start": start, "end": start + 4}, "input").videos
        assert colours_of(video) == {"red" if start == 5 else "blue"}
        assert len(decoded) < 200


def test_a_part_of_a_message_and_of_no_video(library):
    message = {"type": "video", "video": library / "scenes.mp4", "start": 8.0}
    (video,) = Item.parse({"role": "user", "content": [message]}, "input").videos
    assert colours_of(video) == {"blue"}
    with pytest.raises(InputError, match='has "start" and no "video"'):
        Item.parse({"text": "a kite", "start": 2}, "input")
    with pytest.raises(InputError, match="taken already"):
        Item.parse({"video": video, "start": 2}, "input")


def test_clips_overlap_by_half_and_end_with_the_video(library):
    whole, *clips = Splitter(clip_seconds=4).documents(library / "scenes.mp4", "scenes", Kind.VIDEO)
    assert (whole.page, whole.start, whole.raw) == (0, None, library / "scenes.mp4")
    assert [(clip.page, clip.start) for clip in clips] == [(at + 1, 2.0 * at) for at in range(5)]
    assert clips[-1].end == pytest.approx(12, abs=0.3)
    assert clips[-1].raw["end"] is None
    assert {one.num_pages for one in (whole, *clips)} == {6}
    (alone,) = Splitter(clip_seconds=60).documents(library / "scenes.mp4", "scenes", Kind.VIDEO)
    assert alone.num_pages == 1
    assert len(list(Splitter().documents(library / "scenes.mp4", "scenes", Kind.VIDEO))) == 1


def test_passages_are_parts_of_the_text_within_the_limit(library, plume):
    processor = plume.plume_model.processor
    text = (library / "long.md").read_text()
    found = list(Splitter(40, None, processor.tokenizer).documents(library / "long.md", "long", Kind.TEXT))
    assert len(found) > 5
    assert [one.page for one in found] == list(range(1, len(found) + 1))
    covered = np.zeros(len(text), dtype=bool)
    for one in found:
        passage = text[int(one.start) : int(one.end)]
        heading = re.findall(r"# part \d", text[: int(one.start)])[-1:]
        assert one.raw == "".join(f"{line}\n" for line in heading) + passage
        assert len(processor.tokenizer(passage).input_ids) <= 40
        covered[int(one.start) : int(one.end)] = True
    left = "".join(sign for sign, is_in in zip(text, covered, strict=True) if not is_in)
    assert not re.sub(r"# part \d", "", left).strip()  # headings stand before the passages below them
    (short,) = Splitter(40, None, processor.tokenizer).documents(library / "short.txt", "short", Kind.TEXT)
    assert (short.page, short.start, short.raw) == (0, None, "a red kite")


def test_rows_of_parts_are_embedded_once_and_stay(index, library, plume):
    rows = index.store.rows(["name", "page", "num_pages", "start", "end", "text"])
    of_text = [row for row in rows if row["name"] == "long.md"]
    assert len(of_text) == of_text[0]["num_pages"] > 5
    assert {row["text"] for row in of_text} == {
        one.raw for one in index.identity.splitter(plume).documents(library / "long.md", "", Kind.TEXT)
    }
    assert len([row for row in rows if row["name"] == "scenes.mp4"]) == 6
    again = index.update(library, plume, show_progress=False)
    assert (again.embedded, again.unchanged) == (0, 3)


def test_a_moment_is_found_by_what_it_shows(index, library, plume):
    """A clip of one scene is as the same frames given by hand; the hit says where it is."""
    query = {"video": library / "scenes.mp4", "start": 8.0}
    best = index.search(query, plume, top_k=1)[0]
    assert best.score > 0.9999
    assert (best.start, best.end) == (8.0, pytest.approx(12, abs=0.3))
    assert best.page is None
    assert place_in_file(best) == f"#t=8,{best.end:g}"
    assert f"#t=8,{best.end:g}" in gallery([best], "blue")
    assert f"8 to {best.end:g} s" in gallery([best], "blue")
    said = best.to_dict()
    assert said["start"] == 8.0


def test_words_are_found_in_their_passage(index, library, plume):
    hit = index.search("kite", plume, text="zebra", top_k=1)[0]
    text = (library / "long.md").read_text()
    assert "zebra" in hit.excerpt
    assert "zebra" in text[int(hit.start) : int(hit.end)]


def test_each_file_is_shown_once_by_its_best_part(index, plume):
    every = index.search("a red kite", plume, top_k=100)
    best = {hit.path: hit.score for hit in reversed(every)}
    grouped = index.search("a red kite", plume, top_k=100, group_by="file")
    assert {hit.path: hit.score for hit in grouped} == pytest.approx(best)
    assert len(grouped) == 3
    assert [hit.score for hit in grouped] == sorted(best.values(), reverse=True)
    assert len(index.search("a red kite", plume, top_k=3, group_by="file")) == 3  # rows are fetched until there are
    assert len(index.search("kite", plume, top_k=9, group_by="file", hybrid=0.5)) == 3
    with pytest.raises(ValueError, match="group_by is 'page'"):
        index.search("a red kite", plume, group_by="page")


def test_copies_are_left_out(index, plume):
    every = index.search("a red kite", plume, top_k=100)
    units = np.stack([hit.vector / np.linalg.norm(hit.vector) for hit in every])
    least = float(np.quantile((units @ units.T)[np.triu_indices(len(units), 1)], 0.9))
    kept: list[int] = []
    for at, unit in enumerate(units):
        if all(units[other] @ unit < least for other in kept):
            kept.append(at)
    found = index.search("a red kite", plume, top_k=100, collapse=least)
    assert [hit.row for hit in found] == [every[at].row for at in kept]
    assert 1 < len(found) < len(every)
    few = index.search("a red kite", plume, top_k=len(found) - 1, collapse=least)
    assert [hit.row for hit in few] == [hit.row for hit in found][:-1]
    with pytest.raises(ValueError, match="collapse is 2"):
        index.search("a red kite", plume, collapse=2)


def test_what_is_like_a_part_or_the_whole(index, library):
    whole = index.search(Like(library / "scenes.mp4"), top_k=100)
    assert len([hit for hit in whole if hit.path.endswith("scenes.mp4")]) == 5
    clip = next(hit for hit in whole if hit.start is not None)
    others = index.search(Like(clip), top_k=100)
    assert clip.row not in [hit.row for hit in others]
    assert len(others) == len(whole)
    with pytest.raises(ValueError, match="pages or passages; say which one"):
        index.search(Like(library / "long.md"))
    assert index.search(Like(library / "long.md", page=2), top_k=1)


def test_an_index_remembers_how_it_splits(index, library, plume, tmp_path):
    opened = Index.open(index.path)
    assert (opened.identity.passage_tokens, opened.identity.clip_seconds) == (40, 4.0)
    with pytest.raises(ValueError, match="passage_tokens=40"):
        Index.create(index.path, plume, passage_tokens=50, clip_seconds=4)
    with pytest.raises(ValueError, match="passage_tokens is 3; expected 16 to"):
        Index.create(tmp_path / "new", plume, passage_tokens=3)
    for seconds in (0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"expected at least 1\.0 s"):
            Index.create(tmp_path / "new", plume, clip_seconds=seconds)
    with pytest.raises(TypeError, match="expected a int"):
        Index.create(tmp_path / "new", plume, passage_tokens=30.5)


def test_the_command_line_makes_and_shows_parts(library, plume_folder, tmp_path):
    base = ["--model", str(plume_folder)]
    made = CliRunner().invoke(
        app,
        ["index", str(library), *base, "--out", str(tmp_path / "i"), "--passage-tokens", "40", "--clip-seconds", "4"],
    )
    assert made.exit_code == 0, made.output
    words = ["search", "a red kite", *base, "--index", str(tmp_path / "i")]
    shown = CliRunner().invoke(app, [*words, "--top-k", "60"])
    assert "scenes.mp4#t=2,6" in shown.output.replace("\n", "")
    grouped = CliRunner().invoke(app, [*words, "--group-by", "file", "--json"])
    assert len({json.loads(line)["path"] for line in grouped.stdout.splitlines()}) == 3


def test_an_index_without_these_columns_gets_them(plume, library, tmp_path):
    """Rows of format 2 as it was first: no column for the start and the end."""
    index = Index.create(tmp_path / "index", plume)
    index.update(library, plume, show_progress=False)
    index.store._table.drop_columns(["start", "end"])
    old = Index.open(tmp_path / "index")
    assert old.search("a red kite", plume)[0].start is None
    (library.parent / "more").mkdir(exist_ok=True)
    (library.parent / "more" / "new.txt").write_text("a blue table")
    assert old.update(library.parent / "more", plume, show_progress=False).embedded == 1
    assert len(Index.open(tmp_path / "index").search("a red kite", plume, top_k=9)) == 4


def test_passages_that_a_table_held_keep_their_texts(plume, library, tmp_path):
    """Rows of passages from a table are given to a file of the same text, which can be looked for by its words."""
    import hashlib

    index = Index.create(tmp_path / "index", plume, passage_tokens=40)
    text = (library / "long.md").read_text()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "copy.md").write_text(text)
    sha = hashlib.sha256(text.encode()).hexdigest()
    parts = list(index.identity.splitter(plume).documents(text, "row", Kind.TEXT))
    vectors = plume.encode_document([one.raw for one in parts], show_progress_bar=False)
    index.store.add(
        {
            "root": "table:t", "name": "0", "path": "table:t/0", "kind": "text", "page": one.page, "start": one.start,
            "end": one.end, "num_pages": one.num_pages, "sha256": sha, "size": 1, "mtime_ns": 1, "text": one.raw,
            "excerpt": one.raw[:9], "thumbnail": b"", "vector": vector,
        }
        for one, vector in zip(parts, vectors, strict=True)
    )  # fmt: skip
    report = index.update(tmp_path / "notes", plume, show_progress=False)
    assert (report.embedded, report.reused) == (0, len(parts))
    rows = [row for row in index.store.rows(["name", "text"]) if row["name"] == "copy.md"]
    assert {row["text"] for row in rows} == {one.raw for one in parts}
