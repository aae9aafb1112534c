"""From the rows of a task to its queries, candidates and labels.

Each parser knows one layout of rows and media. What is wrong with the data is collected, never repaired: the task is
then scored on what is left, and its score is marked as incomplete.

The rules are those of VLM2Vec-V2's evaluation, with these differences: an image that candidates show with different
captions is a candidate for each caption, also in tasks that retrieve images by text; and MomentSeeker never shows a
frame of the right clip in place of a query image that is missing, as the published PLUME evaluation does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from plume_eval.mmeb.content import Content, StoredImage
from plume_eval.mmeb.rows import MissingDataError, Rows, media_root, read_rows
from plume_eval.mmeb.tasks import Task, class_names

#: Tasks whose published pools list some candidates twice; elsewhere that is a fault.
_LISTED_TWICE = ("RefCOCO-Matching",)
#: Groups whose prompts the published PLUME evaluation leaves out.
_BARE_GROUPS = ("VDRv1", "VDRv2", "OOD")
MVBENCH = (
    "action_antonym",
    "action_count",
    "action_localization",
    "action_prediction",
    "action_sequence",
    "character_order",
    "counterfactual_inference",
    "egocentric_navigation",
    "episodic_reasoning",
    "fine_grained_action",
    "fine_grained_pose",
    "moving_attribute",
    "moving_count",
    "moving_direction",
    "object_existence",
    "object_interaction",
    "object_shuffle",
    "scene_transition",
    "state_change",
    "unexpected_action",
)
_MOMENT_PROMPTS = {
    "text": "Find the clip that corresponds to the given text:",
    "image": "Select the video clip that aligns with the given text and image:",
    "video": "Find the clip that corresponds to the given sentence and video segment:",
}

Named = tuple[str, Content]
"""A candidate and its name, by which it is known in pools and labels."""


@dataclass
class TaskData:
    """Queries and candidates of a task.

    queries: in the order of the rows. candidates: by name. labels: of each query, grades by name.
    pools: names of each query's candidates; None: all of them.
    problems: what is wrong with the data, a line for each kind of fault. notes: what a reader should know.
    revisions: of the rows.
    """

    task: Task
    queries: list[Content] = field(default_factory=list)
    candidates: dict[str, Content] = field(default_factory=dict)
    labels: list[dict[str, int]] = field(default_factory=list)
    pools: list[list[str]] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)


class Faults:
    """Faults of each kind, how many, and the first of them."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count: Counter[str] = Counter()

    def add(self, kind: str, example: object) -> None:
        """Count one.

        Args:
            kind: the fault, in the plural.
            example: where it is.
        """
        self._first.setdefault(kind, str(example))
        self._count[kind] += 1

    def lines(self) -> list[str]:
        """A line for each kind."""
        return [f"{count} {kind}, the first: {self._first[kind]}" for kind, count in self._count.items()]


@dataclass
class _Reading:
    """A task that is being read: `add` takes a query with its pool."""

    task: Task
    root: Path
    from_hub: bool
    bare: bool
    faults: Faults = field(default_factory=Faults)
    data: TaskData = field(init=False)
    _rows: dict[str, Rows] = field(default_factory=dict)
    _absent: set[str] = field(default_factory=set)
    _frames: dict[Path, tuple[Path, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = TaskData(self.task, pools=[] if self.task.pool == "local" else None)

    def rows(self, part: str = "") -> Sequence[dict[str, Any]]:
        """The rows of a part of the task."""
        if part not in self._rows:
            found: Rows = read_rows(self.task, self.root, part, from_hub=self.from_hub)
            self._rows[part] = found
            if found.revision not in self.data.revisions:
                self.data.revisions.append(found.revision)
        return self._rows[part].rows

    def source(self, part: str) -> str:
        """What tells the files of a part apart."""
        return self._rows[part].source

    def check_presence(self) -> None:
        """Raise what is missing altogether, rows and media in one message."""
        part = {"pages": "queries", "video_question": MVBENCH[0] if self.task.name == "MVBench" else ""}
        told = []
        for look in (lambda: self.rows(part.get(self.task.parser, "")), lambda: self.media):
            try:
                look()
            except MissingDataError as error:
                told.append(str(error))
        if told:
            raise MissingDataError("; ".join(told))

    @property
    def media(self) -> Path:
        """The folder of images or frames; pages are in rows."""
        return self.root if self.task.parser == "pages" else media_root(self.task, self.root)

    def each(self, read: Callable[[str, dict[str, Any]], None], part: str = "", most: int | None = None) -> None:
        """Hand every row, and how messages call it, to a reader; a row that it cannot read is a fault.

        Args:
            read: takes a row.
            part: of the task.
            most: rows that are read; None: all.
        """
        for number, row in enumerate(islice(self.rows(part), most)):
            where = f"row {number}" + (f" of {part}" if part else "")
            try:
                read(where, row)
            except KeyError as error:
                self.faults.add("rows that lack a field", f"{where}: {error}")
            except (TypeError, ValueError, IndexError, AttributeError) as error:
                self.faults.add("rows that cannot be read", f"{where}: {error}")

    def candidate(self, name: str, content: Content) -> bool:
        """Take a candidate; False if its files are not there."""
        if name in self.data.candidates or name in self._absent:
            return name not in self._absent
        if missing := content.missing:
            self.faults.add("candidates whose files are missing", missing)
            self._absent.add(name)
            return False
        self.data.candidates[name] = content
        return True

    def add(self, where: str, query: Content, pool: Iterable[Named] | None, labels: Mapping[str, int]) -> None:
        """Take a query, its candidates if it has its own, and its labels."""
        names = None if pool is None else self._names(where, pool)
        if missing := query.missing:
            self.faults.add("queries whose files are missing", f"{where}: {missing}")
            return
        among = self.data.candidates if names is None else names
        there = {name: grade for name, grade in labels.items() if name in among}
        if len(there) < len(labels):
            absent = next(name for name in labels if name not in there)
            self.faults.add("queries with a label that their pool does not hold", f"{where}: {absent}")
        if not there:
            if not labels:
                self.faults.add("queries without a label", where)
            return
        self.data.queries.append(query)
        self.data.labels.append(there)
        if self.data.pools is not None:
            assert names is not None
            self.data.pools.append(names)

    def _names(self, where: str, pool: Iterable[Named]) -> list[str]:
        """Names of a pool's candidates, each once."""
        names: dict[str, bool] = {}
        for name, content in pool:
            if name not in names:
                names[name] = self.candidate(name, content)
            elif self.task.name not in _LISTED_TWICE:
                self.faults.add("places of a pool that list a candidate again", f"{where}: {name}")
        return [name for name, is_there in names.items() if is_there]

    def frames(self, folder: Path) -> tuple[Path, ...]:
        """The saved frames of a video in order, or its file `<folder>.mp4`; else a file that is missing."""
        if folder not in self._frames:
            files = [file for file in folder.iterdir() if file.suffix in _SUFFIXES] if folder.is_dir() else []
            self._frames[folder] = tuple(sorted(files, key=_natural)) or (folder.parent / f"{folder.name}.mp4",)
        return self._frames[folder]


def read_task(task: Task, root: Path, *, from_hub: bool = False, prompts: str = "vlm2vec") -> TaskData:
    """Queries, candidates and labels of a task, and what is wrong with them.

    Args:
        task: which one.
        root: local copy of TIGER-Lab/MMEB-V2, see `rows.py`.
        from_hub: whether rows that are not there are downloaded.
        prompts: "vlm2vec", or "plume_published", whose evaluation leaves out the prompts of ViDoRe, ViDoSeek and
            MMLongBench.

    Raises:
        MissingDataError: rows or media are not there at all.
        ValueError: unknown prompts.
    """
    if prompts not in ("vlm2vec", "plume_published"):
        raise ValueError(f'prompts must be "vlm2vec" or "plume_published"; received {prompts!r}')
    reading = _Reading(task, root, from_hub, prompts == "plume_published" and task.group in _BARE_GROUPS)
    reading.check_presence()
    try:
        _PARSERS[task.parser](reading)
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:  # columns of another name or type
        raise MissingDataError(f"its rows are not those of {task.repository}: {error}") from error
    data = reading.data
    for place, pool in enumerate(data.pools or ()):
        expected = task.num_candidates if task.name not in _LISTED_TWICE else None
        if len(pool) == 1 or expected not in (None, len(pool)):
            kind = "pools of another size" + (f" than {expected}" if expected else "")
            reading.faults.add(kind, f"query {place}: {len(pool)}")
    data.problems = reading.faults.lines()
    if task.revision and (other := [one for one in data.revisions if one not in ("", task.revision)]):
        data.problems.append(f"its rows are of revision {other[0]}; expected {task.revision}")
    elif task.revision and "" in data.revisions:
        data.notes.append(f"the local copy does not say of which revision it is; the table has {task.revision}")
    if (found := len(data.queries)) != task.num_queries:
        data.problems.append(f"{found} queries; expected {task.num_queries}")
    if data.pools is None and task.num_candidates not in (None, len(data.candidates)):
        # Of videos to retrieve the table has the number of rows, of which several may show one.
        told = data.notes if task.group == "V-RET" else data.problems
        told.append(f"{len(data.candidates)} candidates; expected {task.num_candidates}")
    return data


def _image_to_text(reading: _Reading) -> None:
    root = reading.media

    def read(where: str, row: dict[str, Any]) -> None:
        query = Content(
            _instruction(reading, where, row), row["qry_text"] or "", root / row["qry_img_path"], ending="\n"
        )
        texts = row["tgt_text"]
        reading.add(where, query, [(text, Content(text=text)) for text in texts], {texts[0]: 1} if texts else {})

    reading.each(read)


def _text_to_image(reading: _Reading) -> None:
    root = reading.media
    ending = "\n\n" if reading.task.name == "VisDial" else "\n"

    def read(where: str, row: dict[str, Any]) -> None:
        pool = _pictures(root, row)
        query = Content(_instruction(reading, where, row), row["qry_text"] or "", ending=ending)
        reading.add(where, query, pool, {pool[0][0]: 1} if pool else {})

    reading.each(read)


def _image_to_image(reading: _Reading) -> None:
    root = reading.media

    def read(where: str, row: dict[str, Any]) -> None:
        pool = _pictures(root, row)
        query = Content(
            _instruction(reading, where, row), row["qry_text"] or "", root / row["qry_img_path"], ending="\n"
        )
        reading.add(where, query, pool, {pool[0][0]: 1} if pool else {})

    reading.each(read)


def _pictures(root: Path, row: Mapping[str, Any]) -> list[Named]:
    """Images with a caption each; one that is shown with two captions is two candidates."""
    instruction = _without_token(row["tgt_inst"])
    captions = row["tgt_text"] or [""] * len(row["tgt_img_path"])
    return [
        (
            f"{path}:{caption.strip().strip(chr(34))}".strip(":"),
            Content(instruction, caption, root / path, ending="\n"),
        )
        for path, caption in zip(row["tgt_img_path"], captions, strict=True)
    ]


def _instruction(reading: _Reading, where: str, row: Mapping[str, Any]) -> str:
    """What the row tells a model to do with the query; a row that says something else than the table is a fault."""
    told, expected = _without_token(row["qry_inst"]), reading.task.query_prompt
    if not f"{told} {row['qry_text'] or ''}".startswith(expected):
        reading.faults.add(f"rows that do not begin with {expected!r}", f"{where}: {told!r}")
    return told


def _without_token(instruction: str | None) -> str:
    return (instruction or "").replace("<|image_1|>", "").strip()


def _video_class(reading: _Reading) -> None:
    task, root = reading.task, reading.media
    for name in class_names(task):
        reading.candidate(name, Content(text=name))

    def read(where: str, row: dict[str, Any]) -> None:
        query = Content(task.query_prompt, frames=reading.frames(root / str(row["video_id"])))
        reading.add(where, query, None, {row["pos_text"]: 1})

    reading.each(read)


def _video_choice(reading: _Reading) -> None:
    task, root = reading.task, reading.media

    def read(where: str, row: dict[str, Any]) -> None:
        query = Content(task.query_prompt, frames=reading.frames(root / str(row["video_id"])))
        reading.add(where, query, [(text, Content(text=text)) for text in row["neg_text"]], {row["pos_text"]: 1})

    reading.each(read, most=task.num_queries)  # the file is longer


def _text_to_video(reading: _Reading) -> None:
    task, root = reading.task, reading.media

    def candidate(where: str, row: dict[str, Any]) -> None:
        name = Path(str(row[task.id_field])).stem
        reading.candidate(name, Content(task.candidate_prompt, frames=reading.frames(root / name)))

    def read(where: str, row: dict[str, Any]) -> None:
        text = row[task.text_field]
        query = Content(task.query_prompt, text if isinstance(text, str) else text[0])
        reading.add(where, query, None, {Path(str(row[task.id_field])).stem: 1})

    reading.each(candidate)
    reading.each(read)


def _video_question(reading: _Reading) -> None:
    task, root = reading.task, reading.media
    for part in MVBENCH if task.name == "MVBench" else ("",):

        def read(where: str, row: dict[str, Any], part: str = part) -> None:
            video, text, options, right = _QUESTIONS[task.name](row)
            query = Content(task.query_prompt, text, frames=reading.frames(root / part / video))
            reading.add(where, query, [(option, Content(text=option)) for option in options], {right: 1})

        reading.each(read, part)


Question = tuple[str, str, list[str], str]
"""Name of the video, text of the question, answers to choose from, and the right one."""


def _lettered(question: str, options: Sequence[str]) -> tuple[str, list[str]]:
    lettered = [f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(options)]
    return f"{question}\nOptions:\n" + "\n".join(lettered), lettered


def _mvbench(row: Mapping[str, Any]) -> Question:
    text, lettered = _lettered(row["question"], row["candidates"])
    right = lettered[row["candidates"].index(row["answer"])] if row["answer"] in row["candidates"] else row["answer"]
    return str(row["video"]), text, lettered, right


def _video_mme(row: Mapping[str, Any]) -> Question:
    options = row["options"]
    bare = [_without_letter(option) for option in options]
    return str(row["videoID"]), "\n".join([row["question"], *options]), bare, bare["ABCDEFGH".index(row["answer"])]


def _nextqa(row: Mapping[str, Any]) -> Question:
    options = [row[f"a{place}"] for place in range(5)]
    return str(row["video"]), _lettered(row["question"], options)[0], options, options[int(row["answer"])]


def _egoschema(row: Mapping[str, Any]) -> Question:
    bare = [_without_letter(option) for option in row["option"]]
    return str(row["video_idx"]), row["question"] + " ".join(row["option"]), bare, bare[int(row["answer"])]


def _activitynetqa(row: Mapping[str, Any]) -> Question:
    return f"v_{row['video_name']}", f"{row['question']}? (A) yes; (B) no.", ["yes", "no"], row["answer"]


def _without_letter(option: str) -> str:
    """An option without its letter and the full stops around it.

    Example:
        >>> _without_letter("B. A dog.")
        'A dog'
    """
    return re.sub(r"^[A-Z]\.\s*", "", option).strip(".").strip()


_QUESTIONS: dict[str, Callable[[Mapping[str, Any]], Question]] = {
    "MVBench": _mvbench,
    "Video-MME": _video_mme,
    "NExTQA": _nextqa,
    "EgoSchema": _egoschema,
    "ActivityNetQA": _activitynetqa,
}


def _moment(reading: _Reading) -> None:
    task, root = reading.task, reading.media

    def read(where: str, row: dict[str, Any]) -> None:
        folder = root / Path(row["video_path"]).stem
        there = folder.iterdir() if folder.is_dir() else ()
        clips = sorted((path for path in there if path.is_dir() and path.name != "query"), key=_natural)
        pool = [
            (f"{folder.name}/{clip.name}", Content(task.candidate_prompt, frames=reading.frames(clip)))
            for clip in clips
        ]
        query = Content(task.query_prompt, row["query"], frames=reading.frames(folder / "query"))
        right = {name: 1 for name, _ in pool if name.rpartition("/")[2].startswith("positive")}
        reading.add(where, query, pool, right)

    reading.each(read)


def _momentseeker(reading: _Reading) -> None:
    task, root = reading.task, reading.media

    def read(where: str, row: dict[str, Any]) -> None:
        shown = row["input_frames"] or ""
        kind = "video" if shown.endswith(".mp4") else "image" if shown else "text"
        query = Content(
            _MOMENT_PROMPTS[kind],
            row["query"],
            image=root / f"query_{shown}" if kind == "image" else None,
            frames=reading.frames(_clip(root, shown)) if kind == "video" else (),
        )
        right, wrong = (
            [_clip(root, one["output_path"]) for one in row[f"{side}_frames"]] for side in ("positive", "negative")
        )
        pool = [(clip.name, Content(task.candidate_prompt, frames=reading.frames(clip))) for clip in (*right, *wrong)]
        reading.add(where, query, pool, {clip.name: 1 for clip in right})

    reading.each(read)


def _clip(root: Path, video: str) -> Path:
    return root / "video_frames" / video.replace("/", "_").split(".mp4")[0]


def _pages(reading: _Reading) -> None:
    task, data = reading.task, reading.data
    query_prompt, page_prompt = ("", "") if reading.bare else (task.query_prompt, task.candidate_prompt)
    corpus: Any = reading.rows("corpus")
    source, empty = reading.source("corpus"), _rows_without_image(corpus)
    for index, name in enumerate(map(str, corpus["corpus-id"])):
        if index in empty:
            reading.faults.add("pages without an image", name)
        elif name in data.candidates:
            reading.faults.add("pages whose id another page has", name)
        else:
            page = StoredImage(corpus, index, f"page {name} of {task.name}", source)
            data.candidates[name] = Content(page_prompt, image=page)
    grades: dict[str, dict[str, int]] = {}

    def grade(where: str, row: dict[str, Any]) -> None:
        if (found := int(row["score"])) > 0:
            of_query = grades.setdefault(str(row["query-id"]), {})
            of_query[str(row["corpus-id"])] = max(found, of_query.get(str(row["corpus-id"]), 0))

    def read(where: str, row: dict[str, Any]) -> None:
        reading.add(where, Content(query_prompt, row["query"]), None, grades.get(str(row["query-id"]), {}))

    reading.each(grade, "qrels")
    reading.each(read, "queries")


def _rows_without_image(rows: Any) -> set[int]:
    """Rows whose column "image" holds no file, without reading those that do."""
    import pyarrow.compute

    column = rows.data.column("image")
    pc: Any = pyarrow.compute
    is_null = pc.or_(pc.is_null(column), pc.is_null(pc.struct_field(column, "bytes")))
    return set(np.flatnonzero(is_null.to_numpy(zero_copy_only=False)).tolist())


_PARSERS: dict[str, Callable[[_Reading], None]] = {
    "image_to_text": _image_to_text,
    "text_to_image": _text_to_image,
    "image_to_image": _image_to_image,
    "video_class": _video_class,
    "video_choice": _video_choice,
    "text_to_video": _text_to_video,
    "video_question": _video_question,
    "moment": _moment,
    "momentseeker": _momentseeker,
    "pages": _pages,
}
_SUFFIXES = (".jpg", ".jpeg", ".png")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Numbers by value: frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
