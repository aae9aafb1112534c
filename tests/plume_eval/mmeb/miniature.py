"""A miniature of MMEB-V2: each layout of rows and media with a few rows, in the formats of the real ones."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from plume_eval.mmeb.parsers import MVBENCH
from plume_eval.mmeb.tasks import Task, all_tasks, class_names

NUM_ROWS, NUM_CANDIDATES = 3, 4


def miniature_tasks() -> list[Task]:
    """The tasks, with the numbers of the miniature."""
    return [replace(task, num_queries=num_queries(task), num_candidates=None) for task in all_tasks()]


def num_queries(task: Task) -> int:
    return len(MVBENCH) if task.name == "MVBench" else NUM_ROWS


def make_miniature(root: Path) -> None:
    """Write all 78."""
    (root / "MMEB_Test_Instruct").mkdir(parents=True)
    images = [task for task in all_tasks() if task.modality == "image"]
    _write_readme(root / "MMEB_Test_Instruct", {task.name: "test" for task in images})
    for task in all_tasks():
        {"image": _image_task, "video": _video_task, "visdoc": _page_task}[task.modality](root, task)


def picture(seed: int) -> Image.Image:
    return Image.new("RGB", (28, 28), (seed * 37 % 256, seed * 91 % 256, seed * 53 % 256))


def _save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


def _write_readme(folder: Path, configs: Mapping[str, str]) -> None:
    lines = ["---", "configs:"]
    for config, split in configs.items():
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _image_task(root: Path, task: Task) -> None:
    rows = []
    for number in range(NUM_ROWS):
        paths = [f"{task.name}/candidate_{(number + place) % 5}.png" for place in range(NUM_CANDIDATES)]
        row: dict[str, Any] = {
            "qry_inst": f"<|image_1|>\n{task.query_prompt}",
            "qry_text": f"red kite {number}",
            "qry_img_path": f"{task.name}/query_{number}.png",
            "tgt_text": [f"blue table {(number + place) % 5}" for place in range(NUM_CANDIDATES)],
            "tgt_img_path": [""] * NUM_CANDIDATES,
        }
        if task.parser != "image_to_text":
            row |= {"tgt_inst": f"<|image_1|>\n{task.candidate_prompt}", "tgt_img_path": paths}
            for path in paths:
                _save(root / "image-tasks" / path, hash_of(path))
            if task.name not in ("WebQA", "EDIS", "OVEN", "RefCOCO-Matching"):
                row["tgt_text"] = [""] * NUM_CANDIDATES
        if task.parser != "text_to_image":
            _save(root / "image-tasks" / row["qry_img_path"], number)
        rows.append(row)
    _write_parquet(root / "MMEB_Test_Instruct" / task.name / "test-00000-of-00001.parquet", rows)


def hash_of(text: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(text))


def _frames(folder: Path, seed: int, count: int = 3) -> None:
    for number in range(count):
        _save(folder / f"frame_{number + 8:d}.jpg", seed + number)  # 8, 9, 10: numbers, not letters, order them


def _video_task(root: Path, task: Task) -> None:
    places = {"V-CLS": "video_cls", "V-QA": "video_qa", "V-MRET": "video_mret"}
    media = root / "video-tasks" / "frames" / places.get(task.group, "video_ret/data/ziyan/video_retrieval")
    media = media / task.folder / ("frames" if task.group == "V-RET" else "")
    if task.name == "MVBench":
        for part in MVBENCH:
            _frames(media / part / "clip.mp4", hash_of(part))
            row = {"question": "what is red?", "video": "clip.mp4", "candidates": ["a kite", "a table"]}
            file = root / "MVBench" / "json" / f"{part}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([{**row, "answer": "a table"}]))
        return
    rows = [_video_row(task, media, number) for number in range(NUM_ROWS)]
    if task.group in ("V-CLS", "V-MRET") or task.name == "ActivityNetQA":
        write_lines(root / "video-tasks" / "data" / f"{task.rows}.jsonl", rows)
    else:
        folder = root / task.repository.rpartition("/")[2]
        if task.name in ("DiDeMo", "MSR-VTT", "MSVD"):
            part = f"_{task.config.removeprefix('test_')}" if task.config else ""
            write_lines(folder / f"{task.name.lower().replace('-', '')}_test{part}.json", rows)
        else:
            _write_parquet(folder / (task.config or "data") / f"{task.split}-00000-of-00001.parquet", rows)


def _video_row(task: Task, media: Path, number: int) -> dict[str, Any]:
    if task.group == "V-CLS":
        _frames(media / f"clip{number}", hash_of(task.name) + number)
        of_task = ["red", "blue", "kite"] if task.parser == "video_choice" else class_names(task)
        row = {"video_id": f"clip{number}", "pos_text": of_task[number]}
        return {**row, "neg_text": of_task} if task.parser == "video_choice" else row
    if task.group == "V-RET":
        name = f"clip{number}"
        if task.name == "MSVD":  # a file in place of saved frames
            _video_file(media / f"{name}.mp4", number)
        else:
            _frames(media / name, hash_of(task.name) + number)
        caption = f"a red kite {number}"
        named = f"videos/{name}.mp4" if task.name == "DiDeMo" else name
        return {task.id_field: named, task.text_field: [caption, "b"] if task.name in ("MSVD", "VATEX") else caption}
    if task.name == "MomentSeeker":
        return _moment_row(media, number)
    if task.group == "V-MRET":
        folder = media / f"clip{number}"
        _frames(folder / "query", number)
        _frames(folder / "positive_clip", number + 40)
        for place in range(3):
            _frames(folder / f"negative_clip_{place}", number + 80 + place)
        return {"query": f"the kite is red {number}", "video_path": f"videos/clip{number}.mp4"}
    name = "v_7" if task.name == "ActivityNetQA" else "7"
    _frames(media / name, hash_of(task.name))
    options = ["A. A kite.", "B. A table.", "C. Red.", "D. Blue.", "E. None."]
    bare = {f"a{place}": f"answer {place}" for place in range(5)}
    return {
        "Video-MME": {"question": f"what is it {number}?", "videoID": "7", "options": options[:4], "answer": "B"},
        "NExTQA": {"question": f"what is it {number}", "video": 7, "answer": number, **bare},
        "EgoSchema": {"question": f"what is it {number}?", "video_idx": "7", "option": options, "answer": str(number)},
        "ActivityNetQA": {"question": f"is it red {number}", "video_name": "7", "answer": ("yes", "no")[number % 2]},
    }[task.name]


def _moment_row(media: Path, number: int) -> dict[str, Any]:
    shown = ("", "images/film/frame_1.jpg", "videos/ego/1_2.mp4")[number]
    if shown.endswith(".jpg"):
        _save(media / f"query_{shown}", number)
    if shown.endswith(".mp4"):
        _frames(media / "video_frames" / "videos_ego_1_2", number)
    clips = [f"videos/ego/{number}_{place}.mp4" for place in range(4)]
    for place, clip in enumerate(clips):
        _frames(media / "video_frames" / clip.replace("/", "_").removesuffix(".mp4"), number * 10 + place)
    return {
        "query": f"red {number}",
        "input_frames": shown,
        "positive_frames": [{"output_path": clip} for clip in clips[:2]],
        "negative_frames": [{"output_path": clip} for clip in clips[2:]],
    }


def _video_file(file: Path, seed: int) -> None:
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 64, 64
        for number in range(4):
            image = picture(seed + number).resize((64, 64))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


def _page_task(root: Path, task: Task) -> None:
    folder = root / "visdoc-tasks" / "data" / task.repository.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    _write_readme(folder, dict.fromkeys(("corpus", "queries", "qrels"), task.split))
    graded = task.name.endswith("-doc")

    def page(number: int) -> dict[str, Any]:
        file = io.BytesIO()
        picture(hash_of(task.name) + number).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": f"{number}.png"}

    name = f"{task.split}-00000-of-00001.parquet"
    corpus = [{"corpus-id": number, "image": page(number)} for number in range(6)]
    table = pa.Table.from_pylist(corpus)
    features = {"info": {"features": {"corpus-id": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}}}}
    (folder / "corpus").mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / "corpus" / name)
    queries = [{"query-id": number, "query": f"which kite is red {number}"} for number in range(NUM_ROWS)]
    _write_parquet(folder / "queries" / name, queries)
    qrels = [{"query-id": number, "corpus-id": number, "score": 3 if graded else 1} for number in range(NUM_ROWS)]
    qrels += [{"query-id": 0, "corpus-id": 4, "score": 2 if graded else 0}]
    qrels += [{"query-id": 0, "corpus-id": 0, "score": 1}]  # again, of a lower grade
    _write_parquet(folder / "qrels" / name, qrels)
