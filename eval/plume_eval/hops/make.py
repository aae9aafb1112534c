"""Writes a hops data set: pictures, training rows, test rows.

    OUT/task.json       what the set is made of
    OUT/read.jsonl      training pages with everything that stands on them, to learn to read
    OUT/train.jsonl     questions, rationales, targets
    OUT/test.jsonl      the same about pages that no training row shows
    OUT/images/         pages, and one picture per symbol

Rows have the format of UME-sft (`qry` and `pos`, each with `conversations` and `image`), plus the path to follow.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm.auto import tqdm

from plume_eval.hops import page as task
from plume_eval.hops.symbols import Symbol, alphabet, draw_symbol

TargetForm = Literal["name", "picture"]


def write_examples(folder: Path, data: Path) -> None:
    """Write a text, a picture, a clip and a PDF of two pages, for whoever has none at hand.

    Args:
        folder: is made.
        data: of a task; its first pages are what is on the pictures.
    """
    pages = [Image.open(file) for file in sorted((data / "images" / "pages").glob("*.png"))[:4]]
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("red-disc follows blue-square\n", encoding="utf-8")
    pages[0].save(folder / "photo.png")
    pages[0].save(folder / "clip.gif", save_all=True, append_images=pages[1:], duration=500)
    sheets = [page.convert("RGB").resize((300, 300), Image.Resampling.NEAREST) for page in pages[:2]]
    sheets[0].save(folder / "report.pdf", save_all=True, append_images=sheets[1:])


def make_page_task(
    out: Path,
    *,
    num_train: int,
    num_test: int,
    seed: int = 0,
    num_symbols: int = 9,
    num_hops: int = 4,
    show_progress: bool = True,
) -> None:
    """Write the task "page".

    Args:
        out: the folder; must not hold a data set already.
        num_train: training pages; each gets one question and one reading.
        num_test: test pages, different from all training pages.
        seed: of everything random.
        num_symbols: keys on a page, 2 to 36.
        num_hops: how often the table is followed, at least once.
        show_progress: whether to draw a progress bar.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: a setting out of range, or more pages than there are different ones.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; name a new one with --out")
    if num_hops < 1:
        raise ValueError(f"num_hops must be at least 1; received {num_hops}")
    symbols = alphabet(num_symbols)
    rng = random.Random(seed)
    pages = _different_pages(symbols, num_train + num_test, rng)

    (out / "images" / "symbols").mkdir(parents=True, exist_ok=True)
    (out / "images" / "pages").mkdir(exist_ok=True)
    for symbol in symbols:
        draw_symbol(symbol).save(out / _symbol_file(symbol))

    rows: dict[str, list[dict]] = {"read": [], "train": [], "test": []}
    for index, page in enumerate(tqdm(pages, desc="Drawing pages", unit="page", disable=not show_progress)):
        image = f"images/pages/{index:06d}.png"
        task.draw_page(page).save(out / image)
        path = page.path(rng.choice(symbols), num_hops)
        split = "train" if index < num_train else "test"
        rows[split].append(_question_row(image, path, "picture" if index % 2 else "name"))
        if split == "train":
            rows["read"].append(_reading_row(image, page, rng))
    for split, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    settings = {
        "task": "page",
        "num_hops": num_hops,
        "seed": seed,
        "num_train": num_train,
        "num_test": num_test,
    }
    settings["symbols"] = [symbol.name for symbol in symbols]
    settings["words"] = [*task.words(symbols), str(num_hops)]
    (out / "task.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _different_pages(symbols: list[Symbol], count: int, rng: random.Random) -> list[task.Page]:
    """Pages of which no two show the same table, in whatever order."""
    seen: set[frozenset] = set()
    pages = []
    for _ in range(20 * count):
        page = task.make_page(symbols, rng)
        if (table := frozenset(page.rows)) not in seen:
            seen.add(table)
            pages.append(page)
        if len(pages) == count:
            return pages
    raise ValueError(f"{len(symbols)} symbols give fewer than {count} different pages; ask for fewer, or more symbols")


def _question_row(image: str, path: list[Symbol], form: TargetForm) -> dict:
    target = path[-1]
    asked = task.question(path[0], len(path) - 1)
    written = f"<think>{task.rationale(path)}</think><answer>{target.name}</answer>\n<gen_emb>"
    pos = {"conversations": [_human(target.name)]}
    if form == "picture":
        pos = {"conversations": [_human("<image>\n")], "image": [_symbol_file(target)]}
    return {
        "dataset_name": f"hops/page-{form}",
        "qry": {"conversations": [_human(f"<image>\n{asked}"), _gpt(written)], "image": [image]},
        "pos": pos,
        "path": [symbol.name for symbol in path],
    }


def _reading_row(image: str, page: task.Page, rng: random.Random) -> dict:
    rows = rng.sample(page.rows, len(page.rows))
    written = " ".join(f"{key.name} {value.name}." for key, value in rows)
    return {
        "dataset_name": "hops/read",
        "qry": {
            "conversations": [
                _human("<image>\nread the table"),
                _gpt(f"<think>{written}</think>\n<gen_emb>"),
            ],
            "image": [image],
        },
    }


def _human(value: str) -> dict:
    return {"from": "human", "value": value}


def _gpt(value: str) -> dict:
    return {"from": "gpt", "value": value}


def _symbol_file(symbol: Symbol) -> str:
    return f"images/symbols/{symbol.name}.png"
