"""`plume-train vectors` and `plume-train mine`: vectors by content, hard negatives of any kind, groups for batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from plume import Plume
from plume_train.data.records import Records
from plume_train.data.vectors import VectorStore
from plume_train.mine import Pairs, mine
from plume_train.run import train
from plume_train.vectors import vectors
from tests.plume_train.runs import settings

WORDS = ["red", "kite", "blue", "bird", "table"]


@pytest.fixture
def data(tmp_path):
    """Ten rows of two tasks: texts to texts, with an equal query and an equal target, and texts to pictures."""
    lines = [{"query": f"what is {word}", "target": word, "task": "words"} for word in WORDS]
    lines += [{"query": "what is red", "target": "a red kite", "task": "words"}]  # two right answers
    lines += [{"query": "which bird", "target": "bird", "task": "words"}]
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (56, 56), colour).save(tmp_path / f"{colour}.png")
        side = {"text": colour, "instruction": "Find:", "rationale": "It is so. Really."}
        lines += [{"query": side, "target": {"image": f"{colour}.png"}, "task": "pictures"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def written(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_vectors_are_those_of_each_side_by_its_content(data, plume_folder, tmp_path):
    assert vectors([str(data), "--model", str(plume_folder), "--out", str(tmp_path / "v"), "--num-latent-steps", "2",
                    "--document-latent-steps", "1"]) == 0  # fmt: skip
    store, records, plume = VectorStore(tmp_path / "v"), Records(data), Plume(plume_folder)
    assert store.about["num_latent_steps"] == [2, 1]
    rows = [records[index] for index in range(len(records))]
    found, known = store.find("query", [row.query for row in rows])
    assert known.all()
    assert np.allclose(found[1], plume.encode("what is kite", num_latent_steps=2), atol=1e-5)
    instructed = plume.encode({"text": "red", "instruction": "Find:"}, num_latent_steps=2)
    assert np.allclose(found[7], instructed, atol=1e-5)
    found, _ = store.find("target", [row.target for row in rows])
    assert np.allclose(found[8], plume.encode(Image.open(tmp_path / "blue.png"), num_latent_steps=1), atol=1e-5)
    assert (tmp_path / "v" / "target.keys").stat().st_size == 8 * 9  # "bird" is one of two rows


def test_vectors_go_on_where_they_stopped_and_embed_nothing_twice(data, plume_folder, tmp_path, monkeypatch):
    command = [str(data), "--model", str(plume_folder), "--out", str(tmp_path / "v")]
    monkeypatch.setattr("plume_train.vectors.WINDOW", 3)
    whole = Plume.encode_query
    calls = []

    def stops(self, inputs, **settings):
        calls.append(len(inputs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, inputs, **settings)

    monkeypatch.setattr(Plume, "encode_query", stops)
    with pytest.raises(KeyboardInterrupt):
        vectors(command)
    with (tmp_path / "v" / "query.vectors").open("ab") as file:
        file.write(b"half a vector")
    assert vectors(command) == 0
    assert sum(calls) == 3 + 3 + 6  # of nine distinct queries; the second three were asked for twice
    assert vectors(command) == 0
    assert sum(calls) == 12
    first = VectorStore(tmp_path / "v")
    queries = [Records(data)[index].query for index in range(10)]
    found, known = first.find("query", queries)
    assert known.all()
    assert np.allclose(found, Plume(plume_folder).encode([q.text for q in queries[:7]] + [
        {"text": q.text, "instruction": q.instruction} for q in queries[7:]]), atol=1e-5)  # fmt: skip
    # Data that have been moved keep their vectors, since what files hold counts.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (data, *data.parent.glob("*.png")):
        (moved / file.name).write_bytes(file.read_bytes())
    assert first.find("target", [Records(moved / data.name)[index].target for index in range(10)])[1].all()


def test_a_folder_of_other_vectors_is_refused(data, plume_folder, tmp_path):
    command = [str(data), "--model", str(plume_folder), "--out", str(tmp_path / "v")]
    vectors(command)
    with pytest.raises(ValueError, match=r"holds vectors whose num_latent_steps is .*; received \[1, 1\]; choose"):
        vectors([*command, "--num-latent-steps", "1"])
    with pytest.raises(ValueError, match="holds no vectors; expected a folder that `plume-train vectors` wrote"):
        VectorStore(tmp_path)


def test_vectors_of_any_embedder_are_taken_row_by_row(data, tmp_path):
    generator = np.random.default_rng(0)
    for name in ("queries", "targets"):
        np.save(tmp_path / f"{name}.npy", generator.normal(size=(10, 6)))
    files = [str(tmp_path / f"{name}.npy") for name in ("queries", "targets")]
    for _ in range(2):  # the second time nothing is added
        assert vectors([str(data), "--rows", *files, "--out", str(tmp_path / "v")]) == 0
        assert (tmp_path / "v" / "query.keys").stat().st_size == 8 * 9
    found, known = VectorStore(tmp_path / "v").find("query", [Records(data)[3].query])
    expected = np.load(files[0])[3]
    assert known.all()
    assert np.allclose(found[0], expected / np.linalg.norm(expected), atol=1e-6)
    np.save(tmp_path / "targets.npy", generator.normal(size=(10, 6)))
    with pytest.raises(ValueError, match="holds vectors whose fingerprint is"):  # of another embedder
        vectors([str(data), "--rows", *files, "--out", str(tmp_path / "v")])
    np.save(tmp_path / "targets.npy", generator.normal(size=(9, 6)))
    with pytest.raises(ValueError, match=r"targets.npy has the shape \[9, 6\]; expected \[10, D\], a vector for each"):
        vectors([str(data), "--rows", *files, "--out", str(tmp_path / "w")])


def test_any_model_of_sentence_transformers_makes_vectors(data, tmp_path, monkeypatch):
    asked = []

    class Counts:
        """Opened by name, as a model on the Hub would be."""

        def get_embedding_dimension(self):
            return 3

        def encode_query(self, inputs, **settings):
            assert settings["normalize_embeddings"]
            asked.extend(inputs)
            return np.array([[len(str(one)), 1, 0] for one in inputs], dtype=np.float32)

        encode_document = encode_query

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "modules.json").write_text("[]")
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda name: Counts())
    assert issubclass(Plume, SentenceTransformer)
    assert vectors([str(data), "--model", str(tmp_path / "other"), "--out", str(tmp_path / "v")]) == 0
    found, _ = VectorStore(tmp_path / "v").find("query", [Records(data)[0].query])
    assert found[0].tolist() == [len("what is red"), 1, 0]
    assert "Find: red" in asked  # an instruction stands before the text
    with pytest.raises(ValueError, match="is no plume checkpoint, and takes no latent steps"):
        vectors(
            [str(data), "--model", str(tmp_path / "other"), "--out", str(tmp_path / "w"), "--num-latent-steps", "1"]
        )


def test_negatives_are_the_nearest_targets_of_the_task_that_are_no_positives(data, plume_folder, tmp_path):
    out = tmp_path / "mined.jsonl"
    command = [str(data), "--model", str(plume_folder), "--out", str(out), "--relative-margin", "none"]
    assert mine([*command, "--num-negatives", "2"]) == 0
    rows, plume = written(out), Plume(plume_folder)
    targets = ["red", "kite", "blue", "bird", "table", "a red kite"]
    by_hand = plume.encode(targets)
    for row, query in zip(rows[:7], [*[f"what is {word}" for word in WORDS], "what is red", "which bird"], strict=True):
        cosines = dict(zip(targets, (by_hand @ plume.encode(query)).tolist(), strict=True))
        positives = {"what is red": {"red", "a red kite"}}.get(query, {row["target"]})
        others = sorted((name for name in targets if name not in positives), key=lambda name: -cosines[name])
        assert row["negatives"] == others[:2]
        assert row["negative_scores"] == pytest.approx([cosines[name] for name in others[:2]], abs=1e-4)
        assert row["margin"] == pytest.approx(cosines[row["target"]] - cosines[others[0]], abs=1e-4)
    assert all("image" in one for row in rows[7:] for one in row["negatives"])
    assert rows[7]["query"]["rationale"] == "It is so. Really."
    # What it has written is data: mined again it is the same, and a model trains on it.
    again = tmp_path / "again.jsonl"
    mine([str(out), "--model", str(plume_folder), "--out", str(again), "--relative-margin", "none",
          "--num-negatives", "2"])  # fmt: skip
    assert written(again) == rows
    assert Records(out).has_negatives


def test_negatives_as_near_as_the_own_pair_are_left_out(data, plume_folder, tmp_path):
    for name, told in (("all", "none"), ("far", "0.05")):
        mine([str(data), "--model", str(plume_folder), "--out", str(tmp_path / f"{name}.jsonl"),
              "--relative-margin", told])  # fmt: skip
    left_out = 0
    for row, other in zip(written(tmp_path / "all.jsonl"), written(tmp_path / "far.jsonl"), strict=True):
        own = row["margin"] + row["negative_scores"][0]
        near = [score for score in row["negative_scores"] if score > own - 0.05 * abs(own)]
        left_out += len(near)
        assert len(other.get("negatives", [])) == len(row["negatives"]) - len(near)
        assert all(score <= own - 0.05 * abs(own) + 1e-4 for score in other.get("negative_scores", []))
    assert left_out


def test_rows_of_columns_keep_their_form(tmp_path, plume_folder):
    file, out = tmp_path / "columns.jsonl", tmp_path / "mined.jsonl"
    lines = [{"query_text": f"what is {word}", "target_text": word, "target_answer": "so"} for word in WORDS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine([str(file), "--model", str(plume_folder), "--out", str(out), "--relative-margin", "none"])
    assert written(out)[0]["query_text"] == "what is red"
    assert [one.text for one in Records(out)[0].negatives] == [one["text"] for one in written(out)[0]["negatives"]]
    assert len(Records(out)[0].negatives) == 4


def test_columns_of_negatives_give_way_to_what_was_mined(tmp_path, plume_folder):
    file, out = tmp_path / "columns.jsonl", tmp_path / "mined.jsonl"
    lines = [{"query_text": f"what is {word}", "target_text": word, "negative_text": ["old"]} for word in WORDS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine([str(file), "--model", str(plume_folder), "--out", str(out), "--relative-margin", "none"])
    assert "old" not in {one.text for row in Records(out) for one in row.negatives}


def test_groups_are_rows_that_are_near_each_other():
    """Three clusters in the plane, of four rows each: whatever group is asked for lies within one."""
    generator = np.random.default_rng(0)
    centres = np.repeat([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 4, axis=0)
    points = centres + generator.normal(scale=0.05, size=(12, 3))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    pairs = Pairs.of(points, points, range(12), range(12))
    for size in (2, 4):
        groups = pairs.groups(size, num_near=3)
        assert None not in groups
        for group in set(groups):
            members = [row for row, of_row in enumerate(groups) if of_row == group]
            assert len(members) == size
            assert len({row // 4 for row in members}) == 1
    assert set(pairs.groups(5, num_near=3)) == {None}  # no five rows are near each other
    # Rows of an equal query or target are no negatives of each other, and so are of no use in one group.
    twice = Pairs.of(points, points, [row // 2 for row in range(12)], range(12))
    groups = twice.groups(2, num_near=3)
    for group in set(groups) - {None}:
        assert len({row // 2 for row in range(12) if groups[row] == group}) == 2


def test_groups_are_written_and_trained_together(tmp_path, start, hops_folder, plume_folder):
    out = hops_folder / "mined.jsonl"
    mine([str(hops_folder / "train.jsonl"), "--model", str(plume_folder), "--out", str(out), "--group-size", "2"])
    try:
        records = Records(out)
        assert any(group is not None for group in records.groups)
        train(settings(tmp_path, start, hops_folder, train_file=str(out), num_negatives=2, max_steps=2))
    finally:
        out.unlink()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pairs.jsonl", "--model", "m", "--out", "pairs.jsonl"], "expected a file .jsonl that is not the data"),
        (["pairs.jsonl", "--model", "m", "--out", "o.jsonl", "--group-size", "1"], "--group-size 0 or at least 2"),
        (["pairs.jsonl", "--out", "o.jsonl"], "one of the arguments --model --vectors is required"),
    ],
)
def test_what_cannot_be_mined_is_said(words, told, capsys):
    with pytest.raises(SystemExit):
        mine(words)
    assert told in " ".join(capsys.readouterr().err.split())


def test_rows_without_a_place_for_negatives_are_refused(tmp_path, plume_folder):
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "<answer>a</answer>"}]
    row = {"qry": {"conversations": turns}, "pos": {"conversations": turns}, "dataset_name": "a"}
    (tmp_path / "ume.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="holds rows of UME-sft, which have no place for negatives"):
        mine([str(tmp_path / "ume.jsonl"), "--model", str(plume_folder), "--out", str(tmp_path / "o.jsonl")])
