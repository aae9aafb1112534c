"""Public reasoning sets as hops data sets: bAbI and ProsQA, from the files as they were published.

bAbI (Weston et al., arXiv 1502.05698): stories, questions, answers of one word; the supporting facts are the rationale.
ProsQA (Hao et al., arXiv 2412.06769): graphs of invented concepts, of which two are asked for. Its training file is not
needed: training rows are graphs of our own with the names, the number of nodes and the path lengths of the tuning half.

What is written has the layout of `plume_eval.hops.make`, so that `plume-eval hops run` measures it and `plume-hops`
trains on it. Rows to read ask for the latest fact with a word, for several words in turn, of which each but the first
is named in the rationale: what a supporting fact is found by, with as much to learn from as a row can hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from plume_eval.hops.puzzle import START
from plume_eval.hops.text import graph_puzzle

#: Words that a row to read asks for at most; facts that an easy one tells at most.
_READ_WORDS, _EASY_FACTS = 4, 6
_WORD = re.compile(r"[a-z0-9-]+")
_QUESTION = re.compile(r"is ([a-z]+) an? ([a-z]+) or ([a-z]+)\?")


@dataclass(frozen=True)
class Question:
    """A question about a bAbI story: facts told so far, the question, its answer, and which facts support it."""

    facts: tuple[str, ...]
    asked: str
    answer: str
    support: tuple[int, ...]


def read_babi(file: str | Path) -> Iterator[list[Question]]:
    """The stories of a file of bAbI, each with its questions.

    Args:
        file: `qa<task>_<name>_<split>.txt` as published: `ID text`, or `ID question<TAB>answer<TAB>IDs of facts`.

    Raises:
        ValueError: a line of another form; names file and line.
    """
    facts: dict[int, str] = {}
    questions: list[Question] = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        ordinal, _, rest = line.strip().partition(" ")
        parts = [part.strip() for part in rest.split("\t")]
        if not ordinal.isdigit() or len(parts) not in (1, 3) or not parts[0]:
            raise ValueError(
                f"{file}:{number}: {line!r:.80} is no line of bAbI; expected `ID text` or "
                "`ID question<TAB>answer<TAB>IDs of facts`"
            )
        if int(ordinal) == 1:
            if questions:
                yield questions
            facts, questions = {}, []
        if len(parts) == 1:
            facts[int(ordinal)] = parts[0].lower()
            continue
        asked, answer, support = parts
        if missing := [one for one in support.split() if int(one) not in facts]:
            raise ValueError(f"{file}:{number}: the supporting fact {missing[0]} is not in the story")
        places = {known: place for place, known in enumerate(facts)}
        supporting = tuple(places[int(one)] for one in support.split())
        questions.append(Question(tuple(facts.values()), asked.lower(), answer.lower(), supporting))
    if questions:
        yield questions


def make_babi(
    out: Path,
    data: Path,
    tasks: Sequence[int],
    *,
    max_facts: int | None = None,
    num_validation: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the rows of some tasks; the test rows are the official ones.

    Args:
        out: the folder; must be empty or not there.
        data: holds the published files, `qa<task>_*_{train,test}.txt`.
        tasks: numbers of tasks.
        max_facts: the last so many facts of a story are told, in all splits alike; None: all.
        num_validation: training questions per task, of whole stories, that are held out.
        seed: of the choice of those.

    Returns:
        For each task: the number of rows of each split, and `share_told`, of the test questions whose supporting facts
        are all told.

    Raises:
        FileExistsError: `out` is not empty.
        FileNotFoundError: a file is not there.
        ValueError: a file of another form.
    """
    _check_empty(out)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    counts: dict[str, Any] = {}
    for task in tasks:
        stories = {split: list(read_babi(_find(data, task, split))) for split in ("train", "test")}
        Random(f"{seed}/{task}").shuffle(stories["train"])
        held_out: list[list[Question]] = []
        count = sum(map(len, stories["train"]))
        if num_validation >= count:
            raise ValueError(
                f"task {task} has {count} training questions; received num_validation={num_validation}; hold out fewer"
            )
        answers = {question.answer for of_split in stories.values() for story in of_split for question in story}
        while sum(map(len, held_out)) < num_validation and len(stories["train"]) > 1:
            held_out.append(stories["train"].pop())
        told = {}
        for split, of_split in {**stories, "validation": held_out}.items():
            questions = [question for story in of_split for question in story]
            rows[split] += [_babi_row(task, question, answers, max_facts) for question in questions]
            told[split] = [min(one.support) >= len(one.facts) - (max_facts or len(one.facts)) for one in questions]
        counts[str(task)] = {split: len(known) for split, known in told.items()}
        counts[str(task)]["share_told"] = sum(told["test"]) / len(told["test"])
    rows |= _reading_rows([row["query"]["text"] for row in rows["train"]], "babi", seed)
    settings = {"task": "babi", "tasks": list(tasks), "max_facts": max_facts, "seed": seed, "counts": counts}
    _write(out, rows, settings)
    return counts


def make_prosqa(out: Path, file: Path, *, num_train: int = 20_000, seed: int = 0) -> dict[str, Any]:
    """Write generated training rows, and the two halves of a published file: one to tune with, one to test with.

    Args:
        out: the folder; must be empty or not there.
        file: `prosqa_valid.json` as published, or another file of its form.
        num_train: graphs to train on; none of them is one of the file's.
        seed: of the graphs.

    Returns:
        The number of rows of each split.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: a file of another form.
    """
    _check_empty(out)
    published = json.loads(file.read_text(encoding="utf-8"))
    rows = [_prosqa_row(row, f"{file}: question {index}") for index, row in enumerate(published)]
    known = {row["query"]["text"].rpartition(". ")[0] for row in rows}
    halves = {"validation": rows[::2], "test": rows[1::2]}
    symbols = [name for row in published[::2] for name in row["idx_to_symbol"]]
    names = sorted({name for name in symbols if name.islower()})
    people = sorted({name.lower() for name in symbols if not name.islower()})
    sizes = [len(row["idx_to_symbol"]) for row in published[::2]]
    lengths = [len(row["steps"]) for row in published[::2]]
    rng, made = Random(f"{seed}/prosqa"), []
    while len(made) < num_train:
        puzzle = graph_puzzle(names, people, rng.choice(sizes), rng.choice(lengths), rng)
        if puzzle.facts.removesuffix(".") in known:
            continue
        question = puzzle.question.replace(START, puzzle.path[0]).replace("which is", "is")
        made.append(
            _row(
                f"{puzzle.facts} {question}",
                " ".join(puzzle.sentences),
                list(puzzle.path),
                "graph",
                [puzzle.answer, puzzle.beyond],
                puzzle.places,
            )
        )
    every = {"train": made, **halves}
    counts = {split: len(of_split) for split, of_split in every.items()}
    settings = {"task": "prosqa", "file": file.name, "num_train": num_train, "seed": seed}
    _write(out, every | _reading_rows([row["query"]["text"] for row in made], "prosqa", seed), settings)
    return counts


def _reading_rows(texts: Sequence[str], name: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows that ask for the latest facts with some words: in the end of a story, of any length, and in a short one."""
    rows: dict[str, list[dict[str, Any]]] = {"read": [], "read_easy": []}
    for index, text in enumerate(texts):
        rng = Random(f"{seed}/{name}/read/{index}")
        facts = [f"{fact}." for fact in text.split(". ")[:-1]]  # what is asked is the last part
        for split, most in (("read", len(facts)), ("read_easy", _EASY_FACTS)):
            told = facts[-rng.randint(1, most) :]
            latest = {word: fact for fact in told for word in _WORD.findall(fact) if len(word) > 2}
            first, *others = rng.sample(sorted(latest), min(_READ_WORDS, len(latest)))
            found = [latest[first], *(f"{word} {latest[word]}" for word in others)]
            query = {"text": f"{' '.join(told)} read {first}", "rationale": " ".join(found)}
            rows[split].append({"task": f"hops/{split.replace('_', '-')}-{name}", "query": query})
    return rows


def _find(data: Path, task: int, split: str) -> Path:
    found = sorted(data.glob(f"qa{task}_*_{split}.txt"))
    if not found:
        raise FileNotFoundError(f"{data} holds no qa{task}_*_{split}.txt; name the folder with the published files")
    return found[0]


def _babi_row(task: int, question: Question, answers: set[str], max_facts: int | None) -> dict[str, Any]:
    facts = question.facts[-max_facts:] if max_facts else question.facts
    places = [word for fact in facts for word in _WORD.findall(fact) if word in answers]
    path = [""] * len(question.support) + [question.answer]
    text = " ".join([*facts, question.asked.rstrip("?")])
    rationale = " ".join(question.facts[place] for place in question.support)
    return _row(text, rationale, path, f"task {task}", sorted(answers), places)


def _prosqa_row(row: Any, where: str) -> dict[str, Any]:
    missing = {"question", "answer", "steps"} - set(row if isinstance(row, dict) else ())
    if missing:
        raise ValueError(f"{where} has no {sorted(missing)[0]!r}; expected a list of ProsQA's questions")
    facts, _, asked = row["question"].lower().rpartition(". ")
    found = _QUESTION.fullmatch(asked)
    if found is None:
        raise ValueError(f"{where} asks {asked!r}; expected 'Is A a B or C?'")
    answer = row["answer"].lower().rstrip(".").split()[-1]
    path = [found[1], *(step.lower().rstrip(".").split()[-1] for step in row["steps"])]
    sentences = " ".join(f"{name}." for name in path[1:])
    places = [fact.split()[-1] for fact in facts.split(". ")] + [found[2], found[3]]
    choices = [answer, *{found[2], found[3]} - {answer}]
    return _row(f"{facts}. {asked.rstrip('?')}", sentences, path, "graph", choices, places)


def _row(
    text: str, rationale: str, path: list[str], form: str, choices: Sequence[str], places: Sequence[str]
) -> dict[str, Any]:
    answer = path[-1]
    shown = [places[0], places[-1], max(places, key=list(places).count)] if places else [""] * 3
    return {
        "task": f"hops/{form.replace(' ', '-')}",
        "query": {"text": text, "rationale": rationale, "answer": answer},
        "target": answer,
        "form": form,
        "num_hops": len(path) - 1,
        "path": path,
        "choices": list(choices),
        "hard_negatives": [name for name in choices if name != answer],
        "guesses": dict(zip(("first shown", "last shown", "most often shown"), shown, strict=True)),
    }


def _write(out: Path, rows: dict[str, list[dict]], settings: dict[str, Any]) -> None:
    every = [row for of_split in rows.values() for row in of_split]
    words = dict.fromkeys(
        word
        for row in every
        for word in _WORD.findall(f"{row['query']['text']} {row['query']['rationale']} {row.get('target', '')}")
    )
    symbols = sorted({name for row in every for name in row.get("choices", ())})
    out.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in of_split)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    whole = {**settings, "symbols": symbols, "words": list(words)}
    (out / "task.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; name a new one with --out")
