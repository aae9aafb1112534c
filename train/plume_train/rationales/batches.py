"""Questions handed in together and answered within a day, at half the price with hosted models (OpenAI's Batch API).

What was handed in is noted beside the answers before it is waited for: whoever stops the command loses no batch, and
the same command waits for it again.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from plume.inputs.errors import InputError
from plume.terminal import counted, say
from plume_train.rationales.answers import RejectedError
from plume_train.rationales.questions import Question, num_tokens
from plume_train.rationales.server import NOT_ASKED, REFUSED, Server, ServerError, sentence

#: Of a file that is uploaded, below the limits of the servers that are known.
MOST_REQUESTS, MOST_BYTES = 50_000, 90_000_000
#: Between two looks at the batches, and looks in a row that may fail.
POLL_S = 30.0
MOST_FAILURES = 20

_ENDED = ("completed", "expired", "cancelled", "failed")
_NO_LINE = "not answered in its batch; asked again next time"


@dataclass
class Batch:
    """id: the server's. cost: reserved for it. keys: of its questions."""

    id: str
    cost: float
    keys: list[str]


@dataclass
class Rejected:
    """Why the last answer to a question was not taken, after how many tries, and their tokens in and out."""

    reason: str = ""
    tries: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])


class Pending:
    """A file with what is under way."""

    def __init__(self, file: Path):
        self.file = file
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"batches": [], "rejected": {}}
        self.batches = [Batch(**one) for one in found["batches"]]
        self.rejected = {key: Rejected(**one) for key, one in found["rejected"].items()}

    def save(self) -> None:
        """Write it, whole or not at all; nothing under way leaves no file."""
        if not self.batches and not self.rejected:
            self.file.unlink(missing_ok=True)
            return
        content = {
            "batches": [asdict(one) for one in self.batches],
            "rejected": {key: asdict(one) for key, one in self.rejected.items()},
        }
        unfinished = self.file.with_name(self.file.name + ".unfinished")
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
        unfinished.replace(self.file)


@dataclass
class BatchRun:
    """All questions of a run, in as many batches as it takes.

    judge: takes what was written about a question, or raises RejectedError. note: keeps an entry of the journal.
    most_tries: how often a question is asked whose answers are rejected. has_answered: whether the model has answered
    others before, so that a batch of refusals is due to its questions.
    """

    server: Server
    pending: Pending
    judge: Callable[[str, Question], dict[str, Any]]
    note: Callable[[str, dict[str, Any]], None]
    reasons: Counter[str]
    most_tries: int
    has_answered: bool = False
    _mine: list[Batch] = field(default_factory=list)

    async def ask(self, questions: Mapping[str, Question]) -> None:
        """Hand in what is not under way, wait, and ask again about what was rejected.

        Raises:
            ServerError: further questions are pointless; what is under way stays noted.
        """
        under_way = keys_of(self.pending.batches)
        self.server.spent.reserved += sum(batch.cost for batch in self.pending.batches)
        # Batches of another command on the same file, as with other prompts, are left for that one.
        self._mine = [batch for batch in self.pending.batches if not questions.keys().isdisjoint(batch.keys)]
        if self._mine:
            say(f"waiting for {counted(len(keys_of(self._mine)), 'question')} that were handed in before")
        if left := under_way - keys_of(self._mine):
            say(f"{counted(len(left), 'question')} in {self.pending.file.name} left to the command that handed them in")
        await self._hand_in({key: question for key, question in questions.items() if key not in under_way})
        while self._mine:
            again: list[str] = []
            for batch, state in await self._ended():
                again += await self._collect(batch, state, questions)
            await self._hand_in({key: questions[key] for key in again})

    async def _hand_in(self, questions: Mapping[str, Question]) -> None:
        lines: list[tuple[str, str, float]] = []
        size = 0
        for key, question in questions.items():
            try:
                line, cost = await asyncio.to_thread(self._line, key, question)
            except InputError as error:
                self._finish(key, {"reason": "a file that cannot be decoded", "detail": str(error), "tries": 0})
                continue
            spent = self.server.spent
            if spent.budget is not None and spent.money + spent.reserved + cost > spent.budget:
                self.reasons[NOT_ASKED] += 1
                continue
            spent.reserved += cost
            if lines and (len(lines) == MOST_REQUESTS or size + len(line) > MOST_BYTES):
                await self._upload(lines)
                lines, size = [], 0
            lines.append((key, line, cost))
            size += len(line.encode())
        if lines:
            await self._upload(lines)

    def _line(self, key: str, question: Question) -> tuple[str, float]:
        """A request as a line of a file, and its cost."""
        before = self.pending.rejected.get(key, Rejected())
        messages = question.messages(before.reason)
        body = self.server.request(messages, seed=before.tries + 1)
        line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        spent = self.server.spent
        return json.dumps(line) + "\n", spent.cost(num_tokens(messages), spent.usual_tokens)

    async def _upload(self, lines: Sequence[tuple[str, str, float]]) -> None:
        client = self._client
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "requests.jsonl"
                file.write_text("".join(line for _, line, _ in lines), encoding="utf-8")
                uploaded = await client.files.create(file=file, purpose="batch")
            made = await client.batches.create(
                input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        except openai.APIError as error:
            raise ServerError(f"no batch can be handed in: {sentence(error)}") from None
        batch = Batch(made.id, sum(cost for _, _, cost in lines), [key for key, _, _ in lines])
        self.pending.batches.append(batch)
        self._mine.append(batch)
        self.pending.save()
        say(f"batch {made.id} with {counted(len(lines), 'question')} is handed in; the same command waits for it again")

    @property
    def _client(self) -> openai.AsyncOpenAI:
        """What is asked for here costs nothing, so that the client may try again by itself."""
        return self.server.client.with_options(max_retries=4)

    async def _ended(self) -> list[tuple[Batch, Any]]:
        """The batches that have ended, once some have, and what the server says of them."""
        failures = 0
        while True:
            try:
                states = [await self._client.batches.retrieve(one.id) for one in self._mine]
            except openai.APIError as error:
                failures += 1
                if isinstance(error, openai.NotFoundError) or failures == MOST_FAILURES:
                    raise ServerError(f"batches cannot be looked at: {sentence(error)}") from None
            else:
                failures = 0
                pairs = list(zip(self._mine, states, strict=True))
                if ended := [(one, state) for one, state in pairs if state.status in _ENDED]:
                    return ended
            await asyncio.sleep(POLL_S)

    async def _collect(self, batch: Batch, state: Any, questions: Mapping[str, Question]) -> list[str]:
        """Take the answers of a batch; the keys of those that are to be asked again."""
        lines = [
            json.loads(line)
            for file in (state.output_file_id, state.error_file_id)
            if file
            for line in (await self._content(file)).splitlines()
            if line.strip()
        ]
        self.server.spent.reserved -= batch.cost
        self.pending.batches.remove(batch)
        self._mine.remove(batch)
        found = {line["custom_id"]: {"error": line.get("error"), **(line.get("response") or {})} for line in lines}
        wrong = [one for one in found.values() if one.get("status_code") != 200]
        is_refused = self.has_answered and all(one.get("status_code") in REFUSED for one in wrong)
        is_late = state.status in ("expired", "cancelled")
        if not is_late and (not found or (len(wrong) == len(found) and not is_refused)):
            # As for a wrong name of the model, which is no fault of the questions.
            self.pending.save()
            if wrong and self.server.is_structured and "response_format" in _told(wrong[0]):
                self.server.is_structured = False
                return [key for key in batch.keys if key in questions]
            told = state.errors.data[0].message if state.errors and state.errors.data else state.status
            raise ServerError(f"batch {batch.id}: {_told(wrong[0]) if wrong else told}")
        again = [key for key in batch.keys if key in questions and self._take(key, questions[key], found.get(key, {}))]
        self.pending.save()
        return again

    async def _content(self, file: str) -> str:
        try:
            return (await self._client.files.content(file)).text
        except openai.APIError as error:
            raise ServerError(f"the answers of a batch cannot be read: {sentence(error)}") from None

    def _take(self, key: str, question: Question, response: Mapping[str, Any]) -> bool:
        """Note the answer to a question; whether it is to be asked again."""
        status = response.get("status_code")
        body = response.get("body") or {}
        known = self.pending.rejected.get(key, Rejected())
        if status in REFUSED:
            reason = "the server refuses the question"
            self._finish(key, {"reason": reason, "tries": known.tries + 1, "tokens": known.tokens})
            return False
        if status != 200 or not body.get("choices"):
            self.reasons[_NO_LINE] += 1
            return False
        self.has_answered = True
        self.pending.rejected[key] = known
        known.tries += 1
        try:
            written, tokens = self.server.take(ChatCompletion.construct(**body), 0)
            known.tokens = [known.tokens[0] + tokens[0], known.tokens[1] + tokens[1]]
            entry = self.judge(written, question)
        except RejectedError as error:
            known.reason = str(error)
            known.tokens = [known.tokens[0] + error.tokens[0], known.tokens[1] + error.tokens[1]]
            if known.tries < self.most_tries:
                return True
            entry = {"reason": known.reason}
        self._finish(key, entry | {"tries": known.tries, "tokens": known.tokens})
        return False

    def _finish(self, key: str, entry: dict[str, Any]) -> None:
        self.note(key, entry)
        self.pending.rejected.pop(key, None)


def _told(response: Mapping[str, Any]) -> str:
    """What the server says is wrong with a question, in one line."""
    error = (response.get("body") or {}).get("error") or response.get("error") or {}
    return " ".join(str(error.get("message") or f"status {response.get('status_code')}").split())[:300]


def keys_of(batches: Iterable[Batch]) -> set[str]:
    """Of the questions that are under way."""
    return {key for batch in batches for key in batch.keys}
