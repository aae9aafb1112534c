"""Rows: what is read from them, and what is said of bad ones."""

from __future__ import annotations

import io
import json
import zlib

import pytest
from PIL import Image

from plume_train.data.records import Records
from plume_train.data.rows import RecordFormat, RowError, Side


def row(**changes):
    good = {
        "dataset_name": "pairs",
        "qry": {
            "conversations": [
                {"from": "human", "value": "<image>\nwhich bird?\n<disc_emb>\nRepresent the above"},
                {"from": "gpt", "value": "<think>It is red.</think><answer>kite</answer>\n<gen_emb>"},
            ],
            "image": ["bird.png"],
        },
        "pos": {"conversations": [{"role": "user", "content": "a red kite"}]},
    }
    return {**good, **changes}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "bird.png")
    return tmp_path


def write(folder, *rows):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.jsonl"


def test_a_row_in_the_published_format_is_read(folder):
    (record,) = Records(write(folder, row()))
    assert record.query.text == "which bird?"
    assert record.query.images == (folder / "bird.png",)
    assert (record.query.rationale, record.query.answer) == ("It is red.", "kite")
    assert record.target.text == "a red kite"
    assert (record.task, record.where) == ("pairs", "pairs.jsonl:1")


def test_rows_are_found_again_by_index_after_blank_and_bad_lines(folder):
    rows = [row(), "", "{broken", row(pos={"conversations": [{"from": "human", "value": "déjà vu"}]}), row()]
    records = Records(write(folder, *rows), on_bad_row="skip")
    assert [record.where for record in records] == ["pairs.jsonl:1", "pairs.jsonl:4", "pairs.jsonl:5"]
    assert records[1].target.text == "déjà vu"
    assert len(records.bad_rows) == 1
    assert "pairs.jsonl:3" in records.bad_rows[0]


SIDE = row()["qry"]
BAD = {
    "no target": (row(pos=None), "no target ('pos'); add one"),
    "no query": (row(qry=None), "no query ('qry')"),
    "missing file": (row(qry={**SIDE, "image": ["gone.png"]}), "names gone.png, but there is no file"),
    "images without tags": (
        row(pos={"conversations": [{"from": "human", "value": "x"}], "image": "bird.png"}),
        "has 1 images but its text holds 0 <image>",
    ),
    "unclosed answer": (
        row(qry={**SIDE, "conversations": [SIDE["conversations"][0], {"from": "gpt", "value": "<answer>x"}]}),
        "<answer> is not closed by </answer>; close it",
    ),
    "empty side": (row(pos={"conversations": [{"from": "human", "value": " "}]}), "neither text nor media"),
    "no conversations": (row(pos={"text": "x"}), "has no list 'conversations'"),
    "unknown role": (row(pos={"conversations": [{"from": "cat", "value": "x"}]}), "role 'cat'"),
    "videos without tags": (row(pos={**SIDE, "video": ["a.png"]}), "has 1 videos but its text holds 0 <video>"),
    "image of a wrong type": (row(qry={**SIDE, "image": 5}), "'qry': an image is a int; expected a path"),
    "file that is no image": (row(qry={**SIDE, "image": ["pairs.jsonl"]}), "cannot be read as an image"),
    "video tag": (
        row(pos={"conversations": [{"from": "human", "value": "<video>x"}]}),
        "has 0 videos but its text holds 1 <video>",
    ),
    "read-out in the rationale": (
        row(
            qry={
                **SIDE,
                "conversations": [SIDE["conversations"][0], {"from": "gpt", "value": "<think>a<gen_emb></think>"}],
            }
        ),
        "'qry': the rationale holds '<gen_emb>'",
    ),
    "no object": ("[1]", "a list; expected an object"),
    "broken JSON": ('{"qry": ', "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line_with_a_remedy(folder, name):
    bad, message = BAD[name]
    file = write(folder, row(), bad)
    with pytest.raises(RowError) as caught:
        Records(file)
    assert str(caught.value).startswith("pairs.jsonl:2")
    assert message in str(caught.value)
    records = Records(file, on_bad_row="skip")
    assert len(records) == 1
    assert message in records.bad_rows[0]


def test_unclosed_answers_and_missing_targets_are_read_where_that_is_asked_for(folder):
    written = {"from": "gpt", "value": "<think>a</think><answer>b\n<gen_emb>"}
    file = write(folder, row(qry={**SIDE, "conversations": [SIDE["conversations"][0], written]}, pos=None))
    row_format = RecordFormat(media_root=folder, needs_target=False, unclosed_answer="accept")
    (record,) = Records(file, row_format=row_format)
    assert record.target is None
    assert record.query.answer == "b\n<gen_emb>"


def test_a_line_that_is_not_utf8_is_a_bad_row_like_others(folder):
    file = write(folder, row())
    file.write_bytes(file.read_bytes() + b"\n\xff\xfe\n")
    with pytest.raises(RowError, match=r"pairs\.jsonl:2: not UTF-8"):
        Records(file)
    assert len(Records(file, on_bad_row="skip")) == 1


def test_a_file_without_a_usable_row_is_an_error(folder):
    with pytest.raises(RowError, match="no usable row"):
        Records(write(folder, "nonsense"), on_bad_row="skip")


# The other formats.


def read_one(folder, written, **format_fields):
    (folder / "rows.jsonl").write_text(json.dumps(written) + "\n", encoding="utf-8")
    (record,) = Records(folder / "rows.jsonl", row_format=RecordFormat(**format_fields))
    return record


def test_a_row_in_our_own_format_is_read(folder):
    record = read_one(
        folder,
        {
            "query": {"text": "which bird?", "image": "bird.png", "rationale": "It is red.", "answer": "kite"},
            "target": "a red kite",
            "negatives": ["a robin", {"image": ["bird.png"], "text": "a wren"}],
            "task": "birds",
        },
    )
    bird = folder / "bird.png"
    assert record.query == Side("which bird?", (bird,), (), "It is red.", "kite")
    assert record.target == Side("a red kite")
    assert record.negatives == (Side("a robin"), Side("a wren", (bird,)))
    assert record.task == "birds"


def test_instructions_and_groups_are_read_and_tell_rows_apart(folder):
    row = {"query": {"text": "bird", "instruction": "Find:"}, "target": {"text": "kite", "instruction": "It is:"}}
    record = read_one(folder, row | {"batch_group": 3})
    assert (record.query.instruction, record.target.instruction, record.batch_group) == ("Find:", "It is:", 3)
    columns = {"query_text": "bird", "query_instruction": "Find:", "target_text": "kite"}
    assert read_one(folder, columns).query == record.query
    plain = read_one(folder, {"query": "bird", "target": "kite"})
    assert plain.batch_group is None
    for name in ("key", "content_key"):
        assert getattr(record.query, name) != getattr(plain.query, name)
    assert record.digest != plain.digest
    for wrong in (1.5, True, ["a"]):
        with pytest.raises(RowError, match=r"'batch_group' is a \w+; expected a number or a name"):
            read_one(folder, row | {"batch_group": wrong})
    with pytest.raises(RowError, match="'instruction' is a int; expected a string"):
        read_one(folder, {"query": {"text": "bird", "instruction": 5}, "target": "kite"})


def test_the_targets_of_a_task_that_has_few_are_its_labels(folder):
    lines = [{"query": f"q{row}", "target": f"t{row % 3}", "task": "few"} for row in range(6)]
    lines += [{"query": f"q{row}", "target": f"t{row}", "task": "many"} for row in range(6)]
    lines[0]["target"] = {"text": "t0", "rationale": "So.", "answer": "t0"}
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Records(file, max_labels=3).labels == {"few": [Side("t0"), Side("t1"), Side("t2")]}
    assert Records(file, max_labels=2).labels == Records(file).labels == {}


def test_queries_with_several_labels_are_known_by_their_keys(folder):
    pairs = [("a", "x"), ("a", "y"), ("a", "x"), ("b", "x"), ("c", "z")]
    lines = [{"query": query, "target": target, "task": "t"} for query, target in pairs]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = {"t": {Side("a").key: tuple(sorted((Side("x").key, Side("y").key)))}}
    assert Records(file, max_labels=3).right_labels == expected
    assert Records(file, max_labels=2).right_labels == {}


def test_a_row_of_columns_is_read(folder):
    record = read_one(
        folder,
        {
            "query_text": "which bird?",
            "query_image": "bird.png",
            "query_rationale": "Red.",
            "target_text": "kite",
            "target_image": None,
            "negative_text": ["robin", "wren"],
            "other": 5,
        },
    )
    assert record.query == Side("which bird?", (folder / "bird.png",), (), "Red.")
    assert record.target == Side("kite")
    assert record.negatives == (Side("robin"), Side("wren"))
    assert record.task == "rows"  # the file's name, where a row names none


@pytest.mark.parametrize("place", ["parquet", "folder", "json"])
def test_hugging_face_data_and_json_arrays_are_read_like_lines(folder, place):
    datasets = pytest.importorskip("datasets")
    rows = [{"query_text": f"bird {i}", "target_text": f"kite {i}", "task": "birds"} for i in range(3)]
    if place == "json":
        data = folder / "rows.json"
        data.write_text(json.dumps(rows))
    elif place == "parquet":
        data = folder / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(data)
    else:
        data = folder / "saved"
        picture = Image.open(folder / "bird.png")
        with_images = datasets.Dataset.from_list([{**row, "query_image": picture} for row in rows])
        with_images.cast_column("query_image", datasets.Image()).save_to_disk(data)
    records = Records(data)
    assert [record.target.text for record in records] == ["kite 0", "kite 1", "kite 2"]
    assert records.tasks == ["birds"] * 3
    if place == "folder":
        assert records[0].query.images[0].size == (28, 28)
        assert records[0].query.key != records[1].query.key
        assert records[0].query.key == Records(data)[0].query.key


@pytest.mark.parametrize(
    ("video", "clips"),
    [
        ("clip.mp4", [["clip.mp4"]]),
        (["1.png", "2.png"], [["1.png", "2.png"]]),
        ([["1.png", "2.png"], ["3.png"]], [["1.png", "2.png"], ["3.png"]]),
        (["clip.mp4", "clip.mp4"], [["clip.mp4"], ["clip.mp4"]]),
    ],
    ids=["a file", "frames", "two lists of frames", "two files"],
)
def test_videos_are_files_or_frames(folder, video, clips):
    for name in ("clip.mp4", "1.png", "2.png", "3.png"):
        (folder / name).touch()
    record = read_one(folder, {"query": {"video": video}, "target": "x"})
    assert record.query.videos == tuple(tuple(folder / name for name in clip) for clip in clips)


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("task", ["dataset_name", "dataset", "subset", "source", "task_name"])
def test_aliases_of_the_published_format(folder, name, task):
    turns = [{"role": "user", "content": "<image>\nx"}, {"role": "assistant", "content": "<think>A.</think>"}]
    record = read_one(folder, {"qry": [{"conversations": turns, name: "bird.png", task: "t"}], "pos": row()["pos"]})
    assert (record.task, record.query.rationale) == ("t", "A.")


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("./bird.png", None),
        ("birds/bird.png", "data_path"),
        ("../bird.png", "root"),
        ("images/a.jpg", None),
        ("b.jpgg", None),
    ],
)
def test_media_of_the_published_format_are_found(folder, path, root):
    for place in ("birds/bird.png", "MMEB-train/images/a.jpg", "b.jpg"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28)).save(folder / place)
    turns = [{"from": "human", "value": "<image>x"}]
    roots = {root: str(folder / "birds" if path.startswith("..") else folder)} if root else {}
    media_root = folder / "elsewhere" if root else folder
    media_root.mkdir(exist_ok=True)
    record = read_one(
        folder, {"qry": {"conversations": turns, "image": path, **roots}, "pos": row()["pos"]}, media_root=media_root
    )
    assert record.query.images[0].exists()


OWN_BAD = {
    "a misspelt field": ({"query": {"txt": "a"}, "target": "b"}, "unknown key 'txt'; known are text, image"),
    "no target": ({"query": "a"}, "no target ('target')"),
    "a number": ({"query": 5, "target": "b"}, "'query' is a int; expected a text or an object"),
    "a text that is none": ({"query": {"text": 5}, "target": "b"}, "'text' is a int; expected a string"),
    "an empty negative": ({"query": "a", "target": "b", "negatives": [{"text": ""}]}, "negative 0 has neither text"),
    "a missing medium": ({"query": {"image": "gone.png"}, "target": "b"}, "names gone.png, but there is no file"),
}


@pytest.mark.parametrize("name", OWN_BAD)
def test_a_bad_row_in_our_own_format_is_named(folder, name):
    written, message = OWN_BAD[name]
    with pytest.raises(RowError) as caught:
        read_one(folder, written)
    assert str(caught.value).startswith("rows.jsonl:1")
    assert message in str(caught.value)


def test_several_files_are_one_data_set(folder):
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"query": name, "target": "x"}) + "\n")
    records = Records([folder / "one.jsonl", folder / "two.jsonl"])
    assert [(record.task, record.query.text) for record in records] == [("one", "one"), ("two", "two")]


def test_a_broken_image_of_a_hugging_face_data_set_is_a_bad_row(folder):
    datasets = pytest.importorskip("datasets")
    good = (folder / "bird.png").read_bytes()
    rows = [{"query_image": {"bytes": image, "path": None}, "target_text": "x"} for image in (good, b"no image")]
    data = datasets.Dataset.from_list(rows).cast_column("query_image", datasets.Image())
    data.save_to_disk(folder / "saved")
    with pytest.raises(RowError, match=r"saved:2.*an image cannot be read"):
        Records(folder / "saved")
    (record,) = Records(folder / "saved", on_bad_row="skip")
    assert record.query.images[0].size == (28, 28)


def test_rows_of_a_task_have_targets_all_or_none(folder):
    lines = [{"query": "a", "target": "b"}, {"query": "c"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RowError, match=r"rows\.jsonl:2 has no target, unlike the rows of task 'rows' before it"):
        Records(folder / "rows.jsonl", row_format=RecordFormat(needs_target=False))


def test_a_json_file_of_lines_is_named(folder):
    (folder / "rows.json").write_text('{"query": "a", "target": "b"}\n' * 2)
    with pytest.raises(RowError, match=r"rows\.json: not a JSON array .* \.jsonl"):
        Records(folder / "rows.json")


def test_rows_that_break_parsers_are_named_and_cost_no_others(folder):
    deep = '{"query": ' + "[" * 3000 + "]" * 3000 + ', "target": "a"}'
    lines = [
        json.dumps({"query": "a", "target": "b"}),
        deep,
        '{"query": "a", "target": ' + "9" * 5000 + "}",
        '{"query": {"text": ' * 5000 + "1" + "}}" * 5000,
        json.dumps({"query": {"text": "a", "image": "x" * 5000}, "target": "b"}),
        json.dumps({"query": {"text": "a", "image": "a\0b.png"}, "target": "b"}),
        json.dumps({"query": "c", "target": "d"}),
    ]
    file = folder / "odd.jsonl"
    file.write_text("\n".join(lines) + "\n")
    records = Records(file, on_bad_row="skip")
    assert [record.query.text for record in records] == ["a", "c"]
    assert [row.partition(": ")[0] for row in records.bad_rows] == [f"odd.jsonl:{number}" for number in range(2, 7)]
    for number in range(2, 7):
        (folder / "one.jsonl").write_text(lines[number - 1] + "\n")
        with pytest.raises(RowError, match=r"one\.jsonl:1"):
            Records(folder / "one.jsonl")
    for whole in ("[" * 3000 + "]" * 3000, "[" + "9" * 5000 + "]"):
        (folder / "odd.json").write_text(whole)
        with pytest.raises(RowError, match=r"odd\.json"):
            Records(folder / "odd.json")


def test_media_can_be_restricted_to_their_root(folder):
    inside, outside = folder / "data", folder / "elsewhere"
    for place in (inside / "images", outside):
        place.mkdir(parents=True)
        Image.new("RGB", (56, 56)).save(place / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "folder").symlink_to(outside, target_is_directory=True)
    ways = ["images/a.png", "images/../images/a.png"]
    forbidden = [str(outside / "a.png"), "../elsewhere/a.png", "link.png", "folder/a.png"]
    for path in (*ways, *forbidden):
        for side in ({"image": path}, {"image": ["images/a.png", path]}, {"video": [path, path]}):
            file = inside / "rows.jsonl"
            file.write_text(json.dumps({"query": side, "target": "b"}) + "\n")
            assert len(Records(file)) == 1
            restricted = RecordFormat(media_root_only=True)
            if path in ways:
                assert len(Records(file, row_format=restricted)) == 1
                continue
            with pytest.raises(RowError, match=r"which lies outside .*data; move it there"):
                Records(file, row_format=restricted)
    published = {"qry": {"conversations": [{"from": "human", "value": "<image>a"}], "image": "a.png"}, "pos": "b"}
    published = {**published, "pos": published["qry"], "data_path": str(outside)}
    file.write_text(json.dumps(published) + "\n")
    assert len(Records(file)) == 1
    with pytest.raises(RowError, match="which lies outside"):
        Records(file, row_format=RecordFormat(media_root_only=True))


def test_rows_name_files_and_never_addresses(folder):
    for address in ("http://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        (folder / "rows.jsonl").write_text(json.dumps({"query": {"image": address}, "target": "b"}) + "\n")
        with pytest.raises(RowError, match="but there is no file"):
            Records(folder / "rows.jsonl")


@pytest.mark.parametrize("inside", [True, False])
def test_the_bytes_of_an_image_are_bytes_and_never_a_place(folder, inside):
    Image.new("RGB", (8, 8)).save(folder / "secret.png")
    side = {"image": {"bytes": str(folder / "secret.png")}}
    with pytest.raises(RowError, match="'bytes' are a str; expected bytes"):
        RecordFormat(media_root=folder / "media", media_root_only=inside).read({"query": side, "target": "a"}, "f:1")


def encoded(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_embedded_images_and_the_middle_of_files_are_part_of_what_tells_rows_apart(folder):
    read = RecordFormat(media_root=folder).read
    embedded = [{"query": {"image": {"bytes": encoded(colour)}}, "target": "a"} for colour in ("red", "blue", "red")]
    red, blue, again = (read(row, "f:1") for row in embedded)
    assert red.digest == again.digest != blue.digest
    assert red.query.key == again.query.key != blue.query.key
    content = bytearray(encoded("red") + bytes(2000))  # what follows the picture is never looked at by Pillow
    digests = set()
    for place in (None, len(content) // 2):
        if place is not None:
            content[place] ^= 1
        (folder / "a.png").write_bytes(content)
        digests.add(read({"query": {"image": "a.png"}, "target": "a"}, "f:1").digest)
    assert len(digests) == 2


def test_broken_embedded_images_and_what_is_no_text_are_bad_rows_and_stop_nothing(folder):
    bomb = bytearray(encoded("red"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bomb)
    rows = [
        {"query": {"image": "bomb.png"}, "target": "a"},
        {"query": {"image": "\udc80.png"}, "target": "a"},
        {"query": {"video": ["\udc80.png"]}, "target": "a"},
        {"query": "a", "target": "b", "task": "\udc80"},
        {"qry": {"conversations": [{"from": ["human"], "value": "a"}]}, "pos": {"conversations": []}},
        {"qry": {"conversations": [{"from": {"human": 1}, "value": "a"}]}, "pos": {"conversations": []}},
        {"query": "a", "target": "b"},
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    records = Records(folder / "rows.jsonl", on_bad_row="skip")
    assert len(records) == 1
    assert [line.partition(": ")[0] for line in records.bad_rows] == [f"rows.jsonl:{n}" for n in range(1, 7)]
    with pytest.raises(RowError, match="cannot be read"):
        RecordFormat().read({"query": {"image": {"bytes": bytes(bomb)}}, "target": "a"}, "f:1")


@pytest.fixture
def kept_scans(tmp_path, monkeypatch):
    """Scans of files of any size are kept, in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("plume_train.data.scan_cache.FROM_BYTES", 0)
    return tmp_path / "cache" / "plume"


def told(records):
    """All that a run asks of records before it reads rows."""
    names = ("tasks", "groups", "bad_rows", "has_negatives", "has_instructions", "digest", "labels")
    return {name: getattr(records, name) for name in names} | {"uniform": records.uniform_tasks()}


def test_a_large_file_is_scanned_once(folder, kept_scans, monkeypatch):
    lines = [
        {"query": {"text": "a", "instruction": "Find:"}, "target": "b", "task": "one", "batch_group": 3},
        {"query": "a", "target": 5},
        {"query": {"image": "bird.png"}, "target": "b", "negatives": ["c"], "task": "one"},
        {"query": "x", "target": {"image": "bird.png"}, "task": "two"},
    ]
    file = folder / "rows.jsonl"
    file.write_text("\n" + "".join(json.dumps(line) + "\n" for line in lines))
    (folder / "more.jsonl").write_text(json.dumps({"query": "m", "target": "n", "task": "two"}) + "\n")
    both = [file, folder / "more.jsonl"]
    plain = {}
    for data in (file, both):
        monkeypatch.setattr("plume_train.data.scan_cache.FROM_BYTES", 2**30)
        plain[str(data)] = told(Records(data, on_bad_row="skip"))
        assert not kept_scans.exists() or data is both
        monkeypatch.setattr("plume_train.data.scan_cache.FROM_BYTES", 0)
        assert told(Records(data, on_bad_row="skip")) == plain[str(data)]
    assert len(list(kept_scans.iterdir())) == 2
    read = RecordFormat.read
    monkeypatch.setattr(RecordFormat, "read", None)
    for data in (file, both):
        again = Records(data, on_bad_row="skip")
        assert told(again) == plain[str(data)]
    monkeypatch.setattr(RecordFormat, "read", read)
    assert [again[index].query.text for index in range(4)] == ["a", "", "x", "m"]
    with pytest.raises(RowError, match=r"rows.jsonl:3"):  # another way to read it is scanned anew
        Records(file)


def test_a_scan_that_is_old_or_damaged_is_made_anew(folder, kept_scans):
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"query": "a", "target": "b"}) + "\n")
    first = Records(file)
    (kept,) = kept_scans.iterdir()
    kept.write_bytes(kept.read_bytes()[:-40])
    assert told(Records(file)) == told(first)
    with file.open("a") as lines:
        lines.write(json.dumps({"query": "c", "target": "d"}) + "\n")
    assert len(Records(file)) == 2
    assert Records(file, max_labels=5).labels["rows"] == [Side("b"), Side("d")]
    kept_scans.chmod(0o500)
    try:
        (folder / "other.jsonl").write_text(json.dumps({"query": "e", "target": "f"}) + "\n")
        assert len(Records(folder / "other.jsonl")) == 1  # nothing can be kept, and nothing is lost
    finally:
        kept_scans.chmod(0o700)


def test_rows_of_a_task_have_targets_all_or_none_also_from_a_kept_scan(folder, kept_scans):
    (folder / "with.jsonl").write_text(json.dumps({"query": "a", "target": "b", "task": "t"}) + "\n")
    (folder / "without.jsonl").write_text(json.dumps({"query": "a", "task": "t"}) + "\n")
    row_format = RecordFormat(needs_target=False)
    for name in ("with", "without"):
        Records(folder / f"{name}.jsonl", row_format=row_format)
    assert len(list(kept_scans.iterdir())) == 2
    with pytest.raises(RowError, match="has no target, unlike the rows of task 't' before it"):
        Records([folder / "with.jsonl", folder / "without.jsonl"], row_format=row_format)
    # What a file lost to the one before it is not lost where it is read alone.
    lines = [{"query": "a", "task": "t"}, {"query": "b", "task": "u"}]
    (folder / "second.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skip = {"row_format": row_format, "on_bad_row": "skip"}
    assert len(Records([folder / "with.jsonl", folder / "second.jsonl"], **skip)) == 2
    assert len(Records(folder / "second.jsonl", **skip)) == 2
    assert len(Records(folder / "second.jsonl", **skip)) == 2
