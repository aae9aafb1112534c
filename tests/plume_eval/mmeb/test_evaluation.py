"""All 78 tasks on miniatures of their layouts: what is found, what is reported, what a stopped run leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from plume_eval.mmeb import tasks as tasks_module
from plume_eval.mmeb.content import Content, Keys
from plume_eval.mmeb.embedders import MODES, PlumeEmbedder
from plume_eval.mmeb.parsers import read_task
from plume_eval.mmeb.run import Evaluation, Settings
from plume_eval.mmeb.tasks import all_tasks, find_tasks
from plume_eval.mmeb.vectors import EmbeddedShard
from tests.plume_eval.mmeb.miniature import make_miniature, miniature_tasks, num_queries, write_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mmeb") / "data"
    make_miniature(root)
    return root


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Rows are cached by their path and time; another run's must not be met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def one(name: str):
    return next(task for task in miniature_tasks() if task.name == name)


class Fake:
    """Gives a vector that depends on the words and media alone, and counts what it has embedded."""

    name = "fake"
    settings: dict = {"model": "fake"}  # noqa: RUF012
    runs_with: dict = {}  # noqa: RUF012
    dimension = 8

    def __init__(self, fails_after: int | None = None):
        self.seen: list[str] = []
        self._keys = Keys(Path("/"))
        self._fails_after = fails_after

    def embed(self, contents, side):
        if self._fails_after is not None and len(self.seen) >= self._fails_after:
            raise KeyboardInterrupt
        self.seen += [f"{side} {self._keys.of(content)}" for content in contents]
        rows = []
        for content in contents:
            seed = int(self._keys.of(content), 16) % 2**32
            vector = np.random.default_rng(seed).standard_normal(8)
            rows.append(vector / np.linalg.norm(vector))
        return EmbeddedShard(np.array(rows, dtype=np.float32))


def test_the_table_has_the_78_tasks_of_the_papers():
    assert len({task.name for task in all_tasks()}) == 78
    counts = {modality: sum(task.modality == modality for task in all_tasks()) for modality in tasks_module.MODALITIES}
    assert counts == {"image": 36, "video": 18, "visdoc": 24}
    assert {task.metric for task in all_tasks() if task.modality == "visdoc"} == {"ndcg_linear@5"}
    fixed = [task.name for task in all_tasks() if task.labels == "page-fixed"]
    assert fixed == ["ViDoSeek-page", "MMLongBench-page"]


@pytest.mark.parametrize("task", miniature_tasks(), ids=lambda task: task.name)
def test_every_layout_is_read_whole(data, task):
    found = read_task(task, data)
    assert found.problems == []
    assert len(found.queries) == num_queries(task)
    if found.pools is not None:
        assert all(set(labels) <= set(pool) for labels, pool in zip(found.labels, found.pools, strict=True))
    assert all(set(labels) <= set(found.candidates) for labels in found.labels)
    fixed = task.query_prompt.strip()
    if fixed:
        assert all(query.words.startswith(fixed) for query in found.queries)


def test_what_the_parsers_make_of_rows(data):
    def first(name: str) -> tuple[Content, list[str], dict[str, int]]:
        found = read_task(one(name), data)
        return found.queries[0], (found.pools or [list(found.candidates)])[0], found.labels[0]

    query, pool, labels = first("MVBench")
    assert query.words.endswith("Question:  what is red?\nOptions:\n(A) a kite\n(B) a table")
    assert (pool, labels) == (["(A) a kite", "(B) a table"], {"(B) a table": 1})
    query, pool, labels = first("Video-MME")
    assert query.words.endswith("what is it 0?\nA. A kite.\nB. A table.\nC. Red.\nD. Blue.")
    assert (pool, labels) == (["A kite", "A table", "Red", "Blue"], {"A table": 1})
    assert first("EgoSchema")[0].words.endswith(
        "Question:  what is it 0?A. A kite. B. A table. C. Red. D. Blue. E. None."
    )
    assert first("ActivityNetQA")[1:] == (["yes", "no"], {"yes": 1})
    assert [frame.name for frame in first("K700")[0].frames] == ["frame_8.jpg", "frame_9.jpg", "frame_10.jpg"]
    assert len(first("K700")[1]) == 700
    _, pool, labels = first("QVHighlight")
    assert (len(pool), labels) == (4, {"clip0/positive_clip": 1})
    assert len(first("MomentSeeker")[2]) == 2  # any of several clips is right
    assert first("ViDoSeek-doc")[2] == {"0": 3, "4": 2}  # the highest grade of a page that is listed twice
    assert first("ViDoSeek-page")[2] == {"0": 1}  # a grade of 0 is no label
    assert first("MSVD")[0].words.endswith("a red kite 0")
    assert read_task(one("MSVD"), data).candidates["clip0"].is_video_file


def test_the_published_plume_evaluation_leaves_some_prompts_out(data):
    assert read_task(one("ViDoSeek-page"), data, prompts="plume_published").queries[0].instruction == ""
    assert read_task(one("VisRAG_PlotQA"), data, prompts="plume_published").queries[0].instruction != ""


def copied(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def rewrite(file: Path, change) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, change(rows))


def broken(data: Path, kind: str) -> str:
    """Damage one thing; returns the task that it concerns."""
    frames = data / "video-tasks" / "frames"
    rows = data / "video-tasks" / "data"
    if kind == "missing query":
        shutil.rmtree(frames / "video_cls" / "HMDB51" / "clip1")
        return "HMDB51"
    if kind == "missing candidate":
        shutil.rmtree(frames / "video_ret/data/ziyan/video_retrieval/DiDeMo/frames/clip2")
        return "DiDeMo"
    if kind == "corrupt image":
        (data / "image-tasks" / "CIRR" / "query_1.png").write_bytes(b"no image")
        return "CIRR"
    if kind == "corrupt candidate":
        (data / "image-tasks" / "NIGHTS" / "candidate_1.png").write_bytes(b"no image")
        return "NIGHTS"
    if kind == "label absent":
        rewrite(rows / "ucf101.jsonl", lambda listed: [{**listed[0], "pos_text": "NoSuchClass"}, *listed[1:]])
        return "UCF101"
    if kind == "duplicate":
        rewrite(rows / "ssv2.jsonl", lambda listed: [{**row, "neg_text": [*row["neg_text"], "red"]} for row in listed])
        return "SmthSmthV2"
    if kind == "fewer rows":
        rewrite(rows / "breakfast.jsonl", lambda listed: listed[:2])
        return "Breakfast"
    if kind == "other revision":
        notes = data / "visdoc-tasks/data/tabfquad_test_subsampled_beir/.cache/huggingface/download"
        notes.mkdir(parents=True)
        (notes / "README.md.metadata").write_text("0" * 40 + "\netag\n1.0\n")
        return "ViDoRe_tabfquad"
    shutil.rmtree(data / "VATEX")
    return "VATEX"


EXPECTED = {
    "missing query": "1 queries whose files are missing, the first: row 1: neither frames in ",
    "missing candidate": "1 candidates whose files are missing",
    "corrupt image": "1 queries that could not be embedded, the first: ",
    "corrupt candidate": "1 candidates that could not be embedded, the first: ",
    "label absent": "1 queries with a label that their pool does not hold, the first: row 0: NoSuchClass",
    "duplicate": "3 places of a pool that list a candidate again, the first: row 0: red",
    "fewer rows": "2 queries; expected 3",
    "other revision": f"its rows are of revision {'0' * 40}; expected 61a2224bcd29b7b261a4892ff4c8bea353527a31",
    "missing rows": "run `hf download --repo-type dataset VLM2Vec/VATEX --local-dir ",
}


@pytest.mark.parametrize("kind", list(EXPECTED))
def test_a_fault_is_told_and_marks_its_task_alone(data, tmp_path, plume_folder, kind):
    root = copied(data, tmp_path)
    name = broken(root, kind)
    embedder = PlumeEmbedder(str(plume_folder), device="cpu", num_latent_steps=1)
    bad, good = Evaluation(embedder, root, tmp_path / "out").run([one(name), one("ActivityNetQA")])
    assert not bad["is_complete"]
    assert any(EXPECTED[kind] in problem for problem in bad["problems"]), bad["problems"]
    assert good["is_complete"]
    assert good["score"] is not None


def test_a_query_image_of_momentseeker_is_never_replaced(data, tmp_path):
    root = copied(data, tmp_path)
    (root / "video-tasks/frames/video_mret/MomentSeeker/query_images/film/frame_1.jpg").unlink()
    found = read_task(one("MomentSeeker"), root)
    assert len(found.queries) == 2
    assert "1 queries whose files are missing" in found.problems[0]


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("k700", {"pos_text": None}, "1 queries with a label that their pool does not hold, the first: row 1: None"),
        ("qvhighlight", {"video_path": None}, "1 rows that cannot be read, the first: row 1: "),
        ("qvhighlight", {"query": None}, "1 rows that cannot be read, the first: row 1: its text is None"),
        ("ssv2", {"neg_text": ["red", None]}, "1 rows that cannot be read, the first: row 1: its text is None"),
        ("momentseeker_1k6", {"positive_frames": [{}]}, "1 rows that lack a field, the first: row 1: 'output_path'"),
    ],
)
def test_a_row_that_cannot_be_read_is_told_and_the_others_are_read(data, tmp_path, name, changed, expected):
    root = copied(data, tmp_path)
    file = root / "video-tasks" / "data" / f"{name}.jsonl"
    rewrite(file, lambda rows: [rows[0], {**rows[1], **changed}, rows[2]])
    (task,) = [task for task in miniature_tasks() if task.rows == name]
    found = read_task(task, root)
    assert len(found.queries) == 2
    assert any(problem.startswith(expected) for problem in found.problems), found.problems


def test_no_fields_at_all_is_a_problem_and_no_crash(data, tmp_path):
    root = copied(data, tmp_path)
    (root / "video-tasks/data/k700.jsonl").write_text('{"video_id": "a\\u2028b"}\n\n', encoding="utf-8")
    (result,) = Evaluation(Fake(), root, tmp_path / "out").run([one("K700")])
    assert result["problems"][0] == "1 rows that lack a field, the first: row 0: 'pos_text'"
    assert result["score"] is None


def test_a_page_without_an_image_is_told(data, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = copied(data, tmp_path)
    file = root / "visdoc-tasks/data/tabfquad_test_subsampled_beir/corpus/test-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[3]["image"]["bytes"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    found = read_task(one("ViDoRe_tabfquad"), root)
    assert found.problems == ["1 pages without an image, the first: 3"]
    assert len(found.candidates) == 5


def test_columns_of_another_name_or_type_are_told(data, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = copied(data, tmp_path)
    file = root / "visdoc-tasks/data/tabfquad_test_subsampled_beir/corpus/test-00000-of-00001.parquet"
    for rows in ([{"id": 0, "image": {"bytes": b"", "path": ""}}], [{"corpus-id": 0, "image": "page.png"}]):
        pq.write_table(pa.Table.from_pylist(rows), file)
        bad, good = Evaluation(Fake(), root, tmp_path / "out").run([one("ViDoRe_tabfquad"), one("ActivityNetQA")])
        assert bad["problems"][0].startswith("its rows are not those of vidore/tabfquad_test_subsampled_beir: ")
        assert good["is_complete"]


def test_rows_come_from_the_hub_at_their_revision(data, tmp_path, monkeypatch):
    """The network is put in: what is asked of it, and what is noted."""
    import huggingface_hub

    root = copied(data, tmp_path)
    asked, load = [], datasets.load_dataset

    def hub(path, config=None, split=None, revision=None, **local):
        if local:
            return load(path, split=split, **local)
        asked.append((path, config, split, revision))
        file = data / "NExTQA" / "MC" / "test-00000-of-00001.parquet"
        return load("parquet", data_files=[str(file)], split="train")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: SimpleNamespace(sha="f" * 40))
    shutil.rmtree(root / "NExTQA")
    found = read_task(one("NExTQA"), root, from_hub=True)
    assert (len(found.queries), found.revisions) == (3, ["f" * 40])
    read_task(replace(one("NExTQA"), revision="a" * 40), root, from_hub=True)
    assert asked == [("VLM2Vec/NExTQA", "MC", "test", one_letter * 40) for one_letter in "fa"]


def test_fewer_candidates_than_expected_are_told(data, tmp_path):
    """Else a score would rise with every candidate that is missing."""
    root = copied(data, tmp_path)
    media = root / "video-tasks/frames/video_mret/QVHighlight"
    shutil.rmtree(media / "clip1" / "negative_clip_2")
    task = replace(one("QVHighlight"), num_candidates=4)
    assert read_task(task, root).problems == ["1 pools of another size than 4, the first: query 1: 3"]
    for clip in media.glob("*/negative_clip_*"):
        shutil.rmtree(clip)
    assert read_task(one("QVHighlight"), root).problems == ["3 pools of another size, the first: query 0: 1"]
    task = replace(one("ViDoRe_tabfquad"), num_candidates=70)
    assert read_task(task, root).problems == ["6 candidates; expected 70"]


def test_rows_that_change_on_disk_are_read_anew(data, tmp_path):
    import pyarrow.parquet as pq

    root = copied(data, tmp_path)
    file = root / "MMEB_Test_Instruct" / "GQA" / "test-00000-of-00001.parquet"
    assert len(read_task(one("GQA"), root).queries) == 3
    pq.write_table(pq.read_table(file).slice(0, 2), file)
    assert len(read_task(one("GQA"), root).queries) == 2


def test_captions_keep_their_quotes_and_names_do_not(data, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = copied(data, tmp_path)
    file = root / "MMEB_Test_Instruct" / "RefCOCO-Matching" / "test-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[0]["tgt_text"][0] = '"the red kite"'
    pq.write_table(pa.Table.from_pylist(rows), file)
    found = read_task(one("RefCOCO-Matching"), root)
    ((name, _),) = found.labels[0].items()
    assert name.endswith(":the red kite")
    assert found.candidates[name].words.endswith('"the red kite"')


def result_files(folder: Path) -> dict[str, str]:
    """Results without the seconds."""
    found = {}
    for file in sorted(folder.rglob("*.json*")):
        text = file.read_text()
        if file.suffix == ".json":
            result = json.loads(text)
            for side in result.get("cost", {}).values():
                side["seconds"] = 0
            text = json.dumps(result)
        found[str(file.relative_to(folder))] = text
    return found


def test_all_tasks_run(data, tmp_path, plume_folder):
    embedder = PlumeEmbedder(str(plume_folder), device="cpu", num_latent_steps=1)
    results = Evaluation(embedder, data, tmp_path).run(miniature_tasks())
    assert len(results) == 78
    assert all(result["is_complete"] for result in results)


def test_a_stopped_run_ends_with_the_files_of_one_that_was_not(data, tmp_path):
    tasks = find_small(["I-GD", "V-CLS", "V-MRET", "VDRv2"])
    uninterrupted = Fake()
    whole = Evaluation(uninterrupted, data, tmp_path / "whole", Settings(shard_size=7))
    whole.run(tasks)

    seen = []
    for fails_after in (30, 100, None):
        embedder = Fake(fails_after)
        try:
            Evaluation(embedder, data, tmp_path / "stopped", Settings(shard_size=7)).run(tasks)
        except KeyboardInterrupt:
            assert fails_after is not None
        seen += embedder.seen
    assert result_files(tmp_path / "stopped" / "fake") == result_files(whole.folder)
    assert seen == uninterrupted.seen  # nothing twice


def test_an_error_is_tried_again_by_the_next_run(data, tmp_path):
    class Failing(Fake):
        def embed(self, contents, side):
            shard = super().embed(contents, side)
            if side == "query":
                shard.vectors[0], shard.errors[0] = np.nan, "no memory"
            return shard

    (first,) = Evaluation(Failing(), data, tmp_path).run([one("HMDB51")])
    assert "1 queries that could not be embedded" in first["problems"][0]
    again = Fake()
    (second,) = Evaluation(again, data, tmp_path).run([one("HMDB51")])
    assert second["is_complete"]
    assert {key.split()[0] for key in again.seen} == {"query"}


def test_vectors_that_are_gone_are_made_again_where_they_are_needed(data, tmp_path):
    Evaluation(Fake(), data, tmp_path).run(find_small(["OK-VQA"]))
    shutil.rmtree(tmp_path / "vectors")
    results = Evaluation(Fake(), data, tmp_path).run(find_small(["OK-VQA", "GQA"]))
    assert all(result["is_complete"] for result in results)


def test_what_tasks_share_is_embedded_once(data, tmp_path):
    embedder = Fake()
    Evaluation(embedder, data, tmp_path).run(find_small(["V-RET", "I-QA"]))
    assert len(embedder.seen) == len(set(embedder.seen))
    answers = sum("blue table" in content.words for content in read_task(one("GQA"), data).candidates.values())
    assert answers == 5  # which all ten question tasks of the miniature have
    assert len(embedder.seen) < sum(map(len, (read_task(task, data).candidates for task in find_small(["I-QA"])))) + 60


def find_small(names: list[str]):
    wanted = {task.name for task in find_tasks(names)}
    return [task for task in miniature_tasks() if task.name in wanted]


def test_another_model_does_not_get_the_vectors_of_the_first(data, tmp_path):
    Evaluation(Fake(), data, tmp_path).run(find_small(["GQA"]))
    other = Fake()
    other.settings = {"model": "other"}
    with pytest.raises(ValueError, match="holds vectors of other settings: model was 'fake' and is 'other'"):
        Evaluation(other, data, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_a_checkpoint(data, tmp_path, plume_folder, mode):
    embedder = PlumeEmbedder(str(plume_folder), mode=mode, device="cpu", max_new_tokens=4)
    evaluation = Evaluation(embedder, data, tmp_path)
    results = evaluation.run(find_small(["CIRR", "HMDB51", "ViDoRe_tabfquad"]))
    steps = {"latent": 4, "single_pass": 0, "anchor": 0, "explicit": 4}[mode]
    for result in results:
        assert result["is_complete"]
        assert result["cost"]["query"]["reasoning_steps"] == pytest.approx(steps, abs=1 if mode == "explicit" else 0)
    ranking = (evaluation.folder / "rankings" / "CIRR.jsonl").read_text().splitlines()
    assert ("written" in json.loads(ranking[0])) == (mode == "explicit")


def test_queries_and_candidates_may_have_different_steps(data, tmp_path, plume_folder):
    embedder = PlumeEmbedder(str(plume_folder), num_latent_steps=3, document_latent_steps=0, device="cpu")
    (result,) = Evaluation(embedder, data, tmp_path).run(find_small(["ViDoRe_tabfquad"]))
    cost = result["cost"]
    assert (cost["query"]["reasoning_steps"], cost["document"]["reasoning_steps"]) == (3, 0)
    assert embedder.name.endswith("_latent_K3-0")


@pytest.mark.parametrize(
    "settings", [Settings(truncate_dim=4), Settings(precision="int8"), Settings(precision="binary")]
)
def test_smaller_vectors_use_the_same_vectors(data, tmp_path, settings):
    Evaluation(Fake(), data, tmp_path).run(find_small(["GQA"]))
    embedder = Fake()
    evaluation = Evaluation(embedder, data, tmp_path, settings)
    (result,) = evaluation.run(find_small(["GQA"]))
    assert embedder.seen == []
    assert result["is_complete"]
    assert evaluation.folder.name == f"fake{settings.suffix}"


def test_classes_of_several_templates_are_means_of_sentences(data, tmp_path):
    Evaluation(Fake(), data, tmp_path).run(find_small(["Breakfast", "ActivityNetQA"]))
    embedder = Fake()
    settings = Settings(templates=("{}", "a video of {}."))
    results = Evaluation(embedder, data, tmp_path, settings).run(find_small(["Breakfast", "ActivityNetQA"]))
    assert [result["num_candidates"] for result in results] == [10, 2]
    evaluation = Evaluation(Fake(), data, tmp_path / "other", settings)
    (task,) = find_small(["Breakfast"])
    words = [content.words for content in evaluation._documents(read_task(task, data))]
    assert words[:2] == ["cereal", "a video of cereal."]
    assert len(words) == 20


def test_quantised_candidates_are_near_the_whole_ones(data, tmp_path):
    import torch

    evaluation = Evaluation(Fake(), data, tmp_path, Settings(precision="int8"))
    vectors = torch.nn.functional.normalize(torch.randn(200, 8), dim=-1)
    _, candidates = evaluation._compress(vectors[:3], vectors)
    assert (candidates - vectors).abs().max() < 2 / 255
    with pytest.raises(ValueError, match="truncate_dim=9 is more than the 8 numbers"):
        Evaluation(Fake(), data, tmp_path, Settings(truncate_dim=9))
