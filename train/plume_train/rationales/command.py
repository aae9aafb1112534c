"""`plume-train rationales DATA --out FILE --base-url URL --model NAME`: rows with rationales, from rows without."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import openai
import yaml
from tqdm.auto import tqdm

from plume.inputs.errors import InputError
from plume.terminal import Parser, counted, is_watched, say
from plume_train.data.read import add_row_flags, check_writable, read_rows
from plume_train.data.records import Records
from plume_train.rationales.answers import RejectedError, check_answer, read_answer
from plume_train.rationales.batches import BatchRun, Pending, keys_of
from plume_train.rationales.finds import Finder
from plume_train.rationales.journal import Journal
from plume_train.rationales.questions import Question, SideName, num_tokens
from plume_train.rationales.server import NOT_ASKED, BudgetError, NoAnswerError, Server, ServerError, Spent

#: Questions that are looked at to estimate a run, and answers after which the estimate is told anew.
NUM_SAMPLED = 20
#: How often a question is asked whose answers are rejected.
MOST_TRIES = 3

Judge = Callable[[str, Question], dict[str, Any]]
"""What the journal keeps of what was written about a question; raises RejectedError where it is not taken."""

_NO_ANSWER = "the server did not answer; asked again next time"


def rationales(argv: Sequence[str]) -> int:
    """Ask a model for the rationales that rows lack, and write the rows with them.

    Args:
        argv: the command line behind `rationales`.

    Returns:
        0, or 1 where a server's error ended it; what was answered is kept.

    Raises:
        ValueError, OSError: what cannot be honoured, said before anything is asked.
    """
    options = _parse(argv)
    out = Path(options.out)
    answers = out.with_suffix(".answers.jsonl")
    if out.exists() and not answers.exists():
        raise ValueError(f"{out} exists, and no answers beside it ({answers.name}); name another file with --out")
    media_root = Path(options.media_root or Path(options.data).parent)
    records = read_rows(options.data, options)
    check_writable(records, options.data)
    questions = list(_questions(records, options))
    journal = Journal(answers)
    keys = [question.key(model=options.model) for question in questions]
    asked = {key: question for key, question in zip(keys, questions, strict=True) if key not in journal.known}
    pending = Pending(_pending_file(journal))
    waiting = keys_of(pending.batches) & asked.keys()
    if waiting and not options.batch:
        raise ValueError(
            f"{counted(len(waiting), 'question')} about these rows are under way in batches; say --batch to wait for "
            f"them, or remove {_pending_file(journal)} to ask again"
        )
    missing = [pair for pair in asked.items() if pair[0] not in waiting][: options.limit]
    spent = Spent(tuple(options.price) if options.price else None, options.budget)
    spent.leave_out(entry.get("tokens", (0, 0)) for entry in journal.known.values())
    spent.leave_out(one.tokens for one in pending.rejected.values())
    say(
        f"{counted(len(questions), 'side')} without a rationale in {counted(len(records), 'row')}; "
        f"{len({*keys} & {*journal.known})} different ones were asked about before, {len(missing)} are to be now"
    )
    _estimate([question for _, question in missing], spent)
    missing += [(key, asked[key]) for key in waiting]
    if options.dry_run:
        return 0
    _confirm(options, spent, bool(missing))
    finder = Finder(options.check_with, records) if options.check_with and missing else None
    judge = partial(_judge, finder=finder)
    reasons: Counter[str] = Counter()
    try:
        error = asyncio.run(_ask_all(missing, options, spent, journal, reasons, judge)) if missing else None
    except KeyboardInterrupt:
        say(f"plume-train rationales: stopped; answers are in {journal.file}, and the same command goes on", err=True)
        return 130
    _write(out, records, zip(keys, questions, strict=True), journal)
    _report(out, journal, keys, spent, reasons, media_root)
    if error:
        say(f"plume-train rationales: {error}; what was answered is kept, and the same command goes on", err=True)
    return 1 if error else 0


def _questions(records: Records, options: Any) -> Iterable[Question]:
    prompts: Any = yaml.safe_load(Path(options.prompts).read_text(encoding="utf-8")) if options.prompts else {}
    if not isinstance(prompts, dict) or not all(isinstance(words, str) for words in prompts.values()):
        raise ValueError(f"{options.prompts} does not map names of tasks to what is asked, as `birds: Say which bird.`")
    if unknown := sorted(set(prompts) - set(records.tasks)):
        raise ValueError(
            f"{options.prompts} names the task {unknown[0]!r}; the data has {', '.join(sorted(set(records.tasks)))}"
        )
    names: tuple[SideName, ...] = ("query", "target") if options.side == "both" else (options.side,)
    for row in range(len(records)):
        record = records[row]
        if options.max_margin is not None and _margin(records.raw(row), record.where) > options.max_margin:
            continue
        for name in names:
            question = Question.of(row, record, name, prompts)
            if question is None:
                continue
            if "qry" in records.raw(row):
                raise ValueError(f"{record.where} is a row of UME-sft without a rationale, to which none can be added; "
                                 "write it as train/README.md says (A row)")  # fmt: skip
            yield question


def _margin(row: Mapping[str, Any], where: str) -> float:
    """By how much a row's own pair is nearer than others, as `plume-train mine` wrote it."""
    margin = row.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise ValueError(
            f"{where}: no 'margin', which --max-margin goes by; `plume-train mine --num-latent-steps 0` writes it, for "
            "rows that a single pass can embed"
        )
    return margin


def _estimate(questions: Sequence[Question], spent: Spent) -> None:
    """Tokens and money that questions will take, from a few of them; before anything is sent."""
    if not questions:
        return
    step = max(1, len(questions) // NUM_SAMPLED)
    sampled = []
    for question in questions[::step][:NUM_SAMPLED]:
        with suppress(InputError):  # counted when it is its turn
            sampled.append(num_tokens(question.messages()))
    tokens_in = sum(sampled) / max(1, len(sampled)) * len(questions)
    say(_cost("about", tokens_in, spent.usual_tokens * len(questions), spent) + ", before retries")


def _cost(what: str, tokens_in: float, tokens_out: float, spent: Spent) -> str:
    told = f"{what} {tokens_in:,.0f} tokens in and {tokens_out:,.0f} out"
    if not spent.price:
        return told
    return f"{told}, {spent.cost(tokens_in, tokens_out):,.4g} at {spent.price[0]:g} and {spent.price[1]:g} per million"


def _confirm(options: Any, spent: Spent, has_work: bool) -> None:
    if options.yes or not spent.price or not has_work:
        return
    if not sys.stdin.isatty():
        raise ValueError(
            "this costs money, and nobody is there to agree; say --yes, or --dry-run to see the estimate alone"
        )
    if input("Ask the model? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was asked")


async def _ask_all(
    questions: Sequence[tuple[str, Question]],
    options: Any,
    spent: Spent,
    journal: Journal,
    reasons: Counter[str],
    judge: Judge,
) -> str | None:
    """Ask, a few questions ahead of what is sent; returns what ended it, if something did."""
    key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want any
    by = {"model": options.model, "date": date.today().isoformat()}
    async with openai.AsyncOpenAI(
        base_url=options.base_url, api_key=key, max_retries=0, timeout=options.timeout
    ) as client:
        server = Server(client, options.model, spent, options.concurrency)
        if options.batch:
            run = BatchRun(
                server=server,
                pending=Pending(_pending_file(journal)),
                judge=judge,
                note=lambda name, entry: journal.add(name, entry | {"by": by}),
                reasons=reasons,
                most_tries=MOST_TRIES,
                has_answered=any(entry.get("rationale") for entry in journal.known.values()),
            )
            try:
                await run.ask(dict(questions))
            except ServerError as error:
                return str(error)
            return None
        todo, failed = iter(questions), asyncio.Event()
        found: list[str] = []
        began, bar = time.monotonic(), tqdm(total=len(questions), unit="side", disable=not is_watched())

        async def work() -> None:
            for name, question in todo:
                if failed.is_set():
                    return
                paid = Paid()
                try:
                    entry = await _ask_until_right(server, question, paid, judge)
                    journal.add(name, entry | {"by": by})
                except NoAnswerError:
                    reasons[_NO_ANSWER] += 1
                except BudgetError:
                    reasons[NOT_ASKED] += 1
                except ServerError as error:
                    found.append(str(error))
                    failed.set()
                if name not in journal.known and any(paid.tokens):  # under no question's key: it is asked again
                    journal.add(f"{name} {time.time_ns()}", {"tokens": paid.tokens})
                bar.update()
                if bar.n == NUM_SAMPLED < len(questions):
                    share = len(questions) / bar.n
                    tokens = spent.tokens_in * share, spent.tokens_out * share
                    minutes = (time.monotonic() - began) * share / 60
                    say(f"{_cost(f'measured on {bar.n}: all take', *tokens, spent)}, {minutes:.0f} minutes")

        await asyncio.gather(*(work() for _ in range(options.concurrency)))
        bar.close()
        reasons.update({f"on the way: {name}": count for name, count in server.errors.items()})
        return found[0] if found else None


def _pending_file(journal: Journal) -> Path:
    return journal.file.with_name(journal.file.name.replace(".answers.jsonl", ".batches.json"))


@dataclass
class Paid:
    """Tokens of a question so far, in and out, those of rejected answers included."""

    tokens: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, tokens: Sequence[int]) -> None:
        """Count an answer."""
        self.tokens = [self.tokens[0] + tokens[0], self.tokens[1] + tokens[1]]


async def _ask_until_right(server: Server, question: Question, paid: Paid, judge: Judge) -> dict[str, Any]:
    """What the journal keeps of a question: an answer that is taken, or why none is."""
    reason, tries = "", 0
    for tries in range(1, MOST_TRIES + 1):
        try:
            messages = await asyncio.to_thread(question.messages, reason)
        except InputError as error:
            return {"reason": "a file that cannot be decoded", "detail": str(error), "tries": 0}
        try:
            written, tokens = await server.ask(messages, seed=tries)
            paid.add(tokens)
            return {**await asyncio.to_thread(judge, written, question), "tries": tries, "tokens": paid.tokens}
        except RejectedError as error:
            reason = str(error)
            paid.add(error.tokens)
    return {"reason": reason, "tries": tries, "tokens": paid.tokens}


def _judge(written: str, question: Question, finder: Finder | None = None) -> dict[str, Any]:
    """What the journal keeps of an answer.

    Raises:
        RejectedError: it is not taken.
    """
    answer = read_answer(written)
    check_answer(answer, question.content, question.goal)
    if finder is not None:
        finder.check(answer, question)
    return {"rationale": answer.rationale, "answer": answer.text}


def _write(out: Path, records: Records, questions: Iterable[tuple[str, Question]], journal: Journal) -> None:
    """All rows, with what the journal has for them; what was not answered stays a row without rationale."""
    answers: dict[int, list[tuple[Question, Mapping[str, Any]]]] = {}
    for key, question in questions:
        entry = journal.known.get(key)
        if entry and entry.get("rationale"):
            answers.setdefault(question.row, []).append((question, entry))
    journal.file.touch()  # by which `out` is known as this command's own, also where nothing was answered
    unfinished = out.with_name(out.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as lines:
        for index in range(len(records)):
            row = records.raw(index)
            for question, entry in answers.get(index, ()):
                _put(row, question, entry)
                row["rationale_by"] = entry["by"]
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.replace(out)


def _put(row: dict[str, Any], question: Question, entry: Mapping[str, Any]) -> None:
    """Write an answer into a row, in the way in which the row is written."""
    written = {"rationale": entry["rationale"], "answer": question.content.answer or entry["answer"]}
    if question.name in row:
        side = row[question.name]
        side = side[0] if isinstance(side, list) else side
        row[question.name] = {**({"text": side} if isinstance(side, str) else side), **written}
    else:
        row |= {f"{question.name}_{name}": text for name, text in written.items()}


def _report(
    out: Path, journal: Journal, keys: Sequence[str], spent: Spent, reasons: Counter[str], media_root: Path
) -> None:
    known = [journal.known[key] for key in keys if key in journal.known]
    taken = sum(bool(entry.get("rationale")) for entry in known)
    rejected = Counter(entry["reason"] for entry in known if entry.get("reason"))
    say(f"{counted(taken, 'rationale')} written, {counted(sum(rejected.values()), 'side')} left without: {out}")
    for reason, count in (rejected + reasons).most_common():
        say(f"  {count:>8}  {reason}")
    if spent.num_calls:
        say(_cost(f"{counted(spent.num_calls, 'answer')} this time,", spent.tokens_in, spent.tokens_out, spent))
    if out.parent.resolve() != media_root.resolve():
        say(f"media paths are as they were; train with --media_root {media_root}")


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="plume-train rationales",
        description="Write rationales for rows that have none, with any model behind an OpenAI-compatible endpoint: "
        "vLLM, SGLang, Ollama, hosted ones. The key is OPENAI_API_KEY. Answers are kept as they come, beside FILE; the "
        "same command goes on after an interruption and asks nothing twice.",
    )
    parser.add_argument("data", help="rows: .jsonl, .json, .parquet, a folder of `datasets`, or a Hub name")
    parser.add_argument("--out", required=True, help="file .jsonl for the rows with rationales")
    parser.add_argument("--base-url", required=True, help="of the server, as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--side", choices=("query", "target", "both"), default="query",
                        help="whose rationales; those of targets seldom help (query)")  # fmt: skip
    parser.add_argument(
        "--max-margin", type=float, help="ask only about rows whose margin, by `plume-train mine`, is at most this"
    )
    parser.add_argument(
        "--check-with", metavar="EMBEDDER", help="a model by which an answer must find its target among a hundred "
        "others, where that is a longer text or a medium"
    )  # fmt: skip
    parser.add_argument("--prompts", help="YAML that maps names of tasks to what is asked")
    add_row_flags(parser)
    parser.add_argument(
        "--batch", action="store_true", help="hand all in and wait, up to a day: half the price with hosted models"
    )
    parser.add_argument("--concurrency", type=int, default=32, help="questions at a time at most (32)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that an answer may take (120)")
    parser.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens")
    parser.add_argument(
        "--budget", type=float, help="asks nothing more that might cost more than this in all; needs --price"
    )
    parser.add_argument("--limit", type=int, help="sides to ask about at most")
    parser.add_argument("--dry-run", action="store_true", help="estimate, and ask nothing")
    parser.add_argument("--yes", action="store_true", help="ask without agreeing to the estimate")
    options = parser.parse_args(argv)
    if options.budget is not None and options.price is None:
        parser.error("--budget needs --price, the price of a million tokens in and out")
    if options.concurrency < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--concurrency and --limit are at least 1")
    if not options.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url is {options.base_url!r}; expected an address such as http://localhost:8000/v1")
    if Path(options.out).suffix != ".jsonl":
        parser.error(f"--out is {options.out!r}; expected a file .jsonl")
    if Path(options.out).resolve() == Path(options.data).resolve():
        parser.error("--out is the data themselves; name another file")
    if not Path(options.out).parent.is_dir():
        parser.error(f"--out lies in {Path(options.out).parent}, which is no folder")
    return options
