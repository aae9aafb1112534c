"""Writes a hops data set of one family: pictures or clips, training rows, held-out rows.

    OUT/task.json             what the set is made of
    OUT/read.jsonl            what is shown in training rows, sentence by sentence, to learn to read
    OUT/read_easy.jsonl       less at a time, to begin with; families that are hard to read have it
    OUT/train.jsonl           questions, rationales, targets
    OUT/validation.jsonl      the same about other puzzles, to tune with
    OUT/test.jsonl            the same about others again
    OUT/control.jsonl         without reasoning: a caption, and the picture of what it names
    OUT/control_test.jsonl    the same about other pictures
    OUT/media/                what the rows show, and a picture of every symbol

Rows are plume's own (train/README.md), plus what an evaluation needs: `form`, `num_hops`, `path`, `hard_negatives`,
`guesses`. All symbols are candidates, the hard negatives among them. A puzzle depends on the seed and its number alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, product
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from PIL import Image
from tqdm.auto import tqdm

from plume_eval.hops.image import IMAGE
from plume_eval.hops.page import PAGE
from plume_eval.hops.puzzle import START, Difficulty, Family, Puzzle, Scene, Shown
from plume_eval.hops.text import TEXT
from plume_eval.hops.video import VIDEO

TargetForm = Literal["name", "picture"]

FAMILIES: dict[str, Family] = {family.name: family for family in (PAGE, IMAGE, VIDEO, TEXT)}

#: Puzzles that are drawn for one record until it is given up that they are new.
_TRIES = 50
_SYMBOLS_OF_A_CAPTION = 4
#: What a question calls a start that it shows.
SHOWN = "this one"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is written, and how hard it is.

    num_train, num_validation, num_test: records of each split.
    min_hops, max_hops: as many records of each number of hops between them.
    num_symbols, num_distractors: see `Difficulty`; None takes the family's.
    forms: of the family; None takes all.
    composed_share: of the questions about something seen, how many show their start instead of naming it.
    """

    num_train: int = 4000
    num_validation: int = 256
    num_test: int = 512
    min_hops: int = 1
    max_hops: int = 6
    num_symbols: int | None = None
    num_distractors: int | None = None
    forms: tuple[str, ...] | None = None
    composed_share: float = 0.25


def make_task(
    out: Path, family_name: str, sizes: Sizes | None = None, *, seed: int = 0, show_progress: bool = True
) -> None:
    """Write the data set of a family.

    Args:
        out: the folder; must be empty or not there.
        family_name: of `FAMILIES`.
        sizes: how much, and how hard.
        seed: of everything random.
        show_progress: whether to draw a progress bar.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: a setting out of range, or more puzzles than there are different ones.
    """
    sizes = sizes or Sizes()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; name a new one with --out")
    writer = _Writer(out, FAMILIES[family_name], sizes, seed)
    puzzles = writer.puzzles()
    bar = tqdm(puzzles, desc=f"Drawing {family_name}", unit="record", total=writer.total, disable=not show_progress)
    rows: dict[str, list[dict]] = {"read": [], "train": [], "validation": [], "test": []}
    for index, (puzzle, form) in enumerate(bar):
        split = writer.split(index)
        media = writer.save(puzzle, index, out / "media")
        if is_composed := writer.is_composed(puzzle, index):
            media = {**media, "image": [*media.get("image", []), _symbol_file(puzzle.path[0])]}
        rows[split].append(writer.question_row(puzzle, form, media, is_composed))
        if split == "train":
            told = (f"{SHOWN} {puzzle.path[0]}.", *puzzle.reading) if is_composed else puzzle.reading
            rows["read"].append(writer.reading_row(puzzle, told, media, f"read-{family_name}-{puzzle.form}"))
    rows["read_easy"] = writer.easy_rows()
    rows["control"], rows["control_test"] = writer.captions()
    for name, lines in rows.items():
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (out / "task.json").write_text(json.dumps(writer.settings(), indent=2) + "\n", encoding="utf-8")


class _Writer:
    """One data set."""

    def __init__(self, out: Path, family: Family, sizes: Sizes, seed: int):
        if not 1 <= sizes.min_hops <= sizes.max_hops:
            raise ValueError(
                f"hops must be at least 1, and no more at least than at most; received min_hops={sizes.min_hops} and "
                f"max_hops={sizes.max_hops}"
            )
        if unknown := [form for form in sizes.forms or () if form not in family.forms]:
            raise ValueError(f"{family.name} has no form {unknown[0]!r}; its forms are {', '.join(family.forms)}")
        self.out, self.family, self.sizes, self.seed = out, family, sizes, seed
        num_symbols = family.num_symbols if sizes.num_symbols is None else sizes.num_symbols
        self.difficulty = Difficulty(
            num_symbols=num_symbols,
            num_hops=sizes.max_hops,
            max_hops=sizes.max_hops,
            num_distractors=family.num_distractors if sizes.num_distractors is None else sizes.num_distractors,
        )
        self.symbols: Sequence[Shown] = family.symbols(num_symbols)
        self.names = [symbol.name for symbol in self.symbols]
        family.check(self.difficulty)
        self.forms = sizes.forms or family.forms
        self.total = sizes.num_train + sizes.num_validation + sizes.num_test
        (out / "media" / "symbols").mkdir(parents=True, exist_ok=True)
        for symbol in self.symbols:
            symbol.draw().save(out / _symbol_file(symbol.name))

    def split(self, index: int) -> str:
        """Where a record belongs."""
        if index < self.sizes.num_train:
            return "train"
        return "validation" if index < self.sizes.num_train + self.sizes.num_validation else "test"

    def puzzles(self) -> Iterator[tuple[Puzzle, TargetForm]]:
        """As many of each form, number of hops and form of the target; no two show the same."""
        seen = set()
        hops = range(self.sizes.min_hops, self.sizes.max_hops + 1)
        kinds = list(product(hops, self.forms, get_args(TargetForm)))
        for index in range(self.total):
            num_hops, form, target_form = kinds[index % len(kinds)]
            for attempt in range(_TRIES):
                rng = Random(f"{self.seed}/{self.family.name}/{index}/{attempt}")
                puzzle = self.family.make(form, self.symbols, replace(self.difficulty, num_hops=num_hops), rng)
                if puzzle.key not in seen:
                    seen.add(puzzle.key)
                    yield puzzle, target_form
                    break
            else:
                raise ValueError(
                    f"{len(self.symbols)} symbols give fewer than {self.total} different puzzles; ask for fewer "
                    "records, or more symbols"
                )

    def save(self, scene: Scene, index: int, media: Path) -> dict[str, Any]:
        """Save what is shown below a folder; the row's keys for it."""
        pictures = scene.draw()
        if not pictures:
            return {}
        folder = media / f"{index // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.family.medium == "video":
            file = folder / f"{index:06d}.gif"
            first, *rest = pictures
            first.save(file, save_all=True, append_images=rest, duration=500, loop=0, disposal=1, optimize=False)
            return {"video": str(file.relative_to(self.out))}
        file = folder / f"{index:06d}.png"
        pictures[0].save(file)
        return {"image": [str(file.relative_to(self.out))]}

    def is_composed(self, puzzle: Puzzle, index: int) -> bool:
        """Whether a question shows its start instead of naming it; stories have nothing to show."""
        return not puzzle.facts and Random(f"{self.seed}/composed/{index}").random() < self.sizes.composed_share

    def question_row(self, puzzle: Puzzle, form: TargetForm, media: dict, is_composed: bool) -> dict[str, Any]:
        """A question with its reasoning and its answer."""
        start = SHOWN if is_composed else puzzle.path[0]
        text = " ".join(part for part in (puzzle.facts, puzzle.question.replace(START, start)) if part)
        return {
            "task": f"hops/{self.family.name}-{puzzle.form}-{form}",
            "query": {**media, "text": text, "rationale": " ".join(puzzle.sentences), "answer": puzzle.answer},
            "target": _target(puzzle.answer, form),
            "form": puzzle.form,
            "num_hops": len(puzzle.path) - 1,
            "path": list(puzzle.path),
            **({"choices": [puzzle.answer, puzzle.beyond]} if puzzle.form == "graph" else {}),
            "hard_negatives": [name for name in puzzle.hard_negatives if name in self.names],
            "guesses": puzzle.guesses,
        }

    def reading_row(self, scene: Scene, told: Sequence[str], media: dict, task: str) -> dict[str, Any]:
        """What is shown, sentence by sentence."""
        return {
            "task": f"hops/{task}",
            "query": {**media, "text": f"{scene.facts} read".strip(), "rationale": " ".join(told)},
        }

    def easy_rows(self) -> list[dict[str, Any]]:
        """Reading rows of a few symbols, as many as of puzzles, where the family has some."""
        rows = []
        for index in range(self.sizes.num_train if self.family.easy else 0):
            assert self.family.easy is not None
            scene = self.family.easy(self.symbols, Random(f"{self.seed}/{self.family.name}/easy/{index}"))
            media = self.save(scene, index, self.out / "media" / "easy")
            rows.append(self.reading_row(scene, scene.reading, media, f"read-easy-{self.family.name}"))
        return rows

    def captions(self) -> tuple[list[dict], list[dict]]:
        """Captions and their pictures: training rows, an eighth as many as questions, and test rows."""
        rng, seen, rows = Random(f"{self.seed}/captions"), set(), []
        num_train, num_test = max(self.sizes.num_train // 8, 1), max(self.sizes.num_test // 2, 1)
        folder = self.out / "media" / "captions"
        folder.mkdir()
        for number in count():
            named = tuple(rng.choices(self.symbols, k=_SYMBOLS_OF_A_CAPTION))
            if named in seen:
                if number > _TRIES * (num_train + num_test):
                    raise ValueError(f"{len(self.symbols)} symbols give too few captions; ask for fewer records")
                continue
            seen.add(named)
            file = folder / f"{len(rows):06d}.png"
            _draw_together(named).save(file)
            rows.append(
                {
                    "task": f"hops/control-{self.family.name}",
                    "query": {"text": " ".join(symbol.name for symbol in named)},
                    "target": {"image": str(file.relative_to(self.out))},
                }
            )
            if len(rows) == num_train + num_test:
                break
        return rows[:num_train], rows[num_train:]

    def settings(self) -> dict[str, Any]:
        """What the set is made of, and the words that a tokenizer should know."""
        sizes = {
            name: value for name, value in vars(self.sizes).items() if name.startswith(("num_t", "num_v", "m", "c"))
        }
        numbers = [str(number) for number in range(max(20, self.sizes.max_hops + self.difficulty.num_distractors + 2))]
        return {
            "task": self.family.name,
            "seed": self.seed,
            **sizes,
            "num_distractors": self.difficulty.num_distractors,
            "forms": list(self.forms),
            "symbols": self.names,
            "words": list(dict.fromkeys([*self.names, *self.family.words, "read", "this", "one", *numbers])),
        }


def write_examples(folder: Path, data: Path) -> None:
    """Write a text, a picture, a clip and a PDF of two pages, for whoever has none at hand.

    Args:
        folder: is made.
        data: of a task; its first pictures are what is on them.
    """
    pages = [Image.open(file) for file in sorted((data / "media" / "000").glob("*.png"))[:4]]
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("red-disc follows blue-square\n", encoding="utf-8")
    pages[0].save(folder / "photo.png")
    frames = [page.resize(pages[0].size, Image.Resampling.NEAREST) for page in pages]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
    sheets = [page.convert("RGB").resize((300, 300), Image.Resampling.NEAREST) for page in pages[:2]]
    sheets[0].save(folder / "report.pdf", save_all=True, append_images=sheets[1:])


def _target(name: str, form: TargetForm) -> Any:
    return name if form == "name" else {"image": _symbol_file(name)}


def _symbol_file(name: str) -> str:
    return f"media/symbols/{name}.png"


def _draw_together(symbols: Sequence[Shown]) -> Image.Image:
    """Four pictures in two rows."""
    width, height = symbols[0].draw().size
    picture = Image.new("RGB", (2 * width, 2 * height))
    for place, symbol in enumerate(symbols):
        picture.paste(symbol.draw(), (place % 2 * width, place // 2 * height))
    return picture
