"""Many questions at a time to an OpenAI-compatible server, as gently as it wants, within a budget.

The client's own retries are off: they would hide what is spent, and one task that waits does not slow the others down.
When a server says that it is asked too much, all tasks wait and half as many go on; each fifty answers allow one more.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

from plume_train.rationales.answers import RejectedError
from plume_train.rationales.questions import SCHEMA, num_tokens

#: Attempts of a request that a server does not answer.
MOST_ATTEMPTS = 8
MOST_WAIT_S = 60.0
#: Doubled with each attempt, where the server does not say how long to wait.
FIRST_WAIT_S = 1.0
#: Tokens that an answer is taken to have until answers have been seen.
USUAL_TOKENS = 200
#: Answers after which one more question may be asked at a time.
MORE_AFTER = 50

_WRONG = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
#: Their statuses.
REFUSED = (400, 422)
_BUSY = (openai.APIConnectionError, openai.InternalServerError, openai.ConflictError)  # a time-out is of the first


NOT_ASKED = "not asked: the budget is spent"


class ServerError(Exception):
    """What makes further questions pointless; the server's own sentence."""


class NoAnswerError(Exception):
    """A question that the server did not answer, and may answer another time."""


class BudgetError(Exception):
    """The next question might cost more than is left."""


@dataclass
class Spent:
    """Tokens and money of a run, retries and rejected answers included.

    price: for a million tokens in and out; None: nobody counts.
    """

    price: tuple[float, float] | None = None
    budget: float | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    num_calls: int = 0
    reserved: float = 0.0

    def leave_out(self, earlier: Iterable[Sequence[int]]) -> None:
        """Take what earlier runs have spent, tokens in and out of each answer, from the budget."""
        if self.budget is not None:
            self.budget -= sum(self.cost(*tokens) for tokens in earlier)

    @property
    def money(self) -> float:
        """So far."""
        return self.cost(self.tokens_in, self.tokens_out)

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """Of so many tokens."""
        price_in, price_out = self.price or (0.0, 0.0)
        return (tokens_in * price_in + tokens_out * price_out) / 1e6

    @property
    def usual_tokens(self) -> float:
        """Tokens of an answer, as far as is known."""
        return self.tokens_out / self.num_calls if self.num_calls >= 20 else USUAL_TOKENS


@dataclass
class Server:
    """An endpoint and how it is asked.

    concurrency: questions at a time at most. errors: what went wrong on the way, by name.
    """

    client: openai.AsyncOpenAI
    model: str
    spent: Spent
    concurrency: int = 32
    is_structured: bool = True
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._allowed = float(self.concurrency)
        self._num_active = 0
        self._free = asyncio.Condition()
        self._paused_until = 0.0
        self._has_answered = False

    async def ask(self, messages: list[dict[str, Any]], seed: int) -> tuple[str, tuple[int, int]]:
        """What the model writes, and tokens in and out.

        Raises:
            RejectedError: it wrote no whole answer, or the server refuses this question.
            NoAnswerError: the server did not answer, however long it was waited for.
            ServerError: further questions are pointless.
            BudgetError: the budget does not allow the question.
        """
        tokens_in = num_tokens(messages)
        for attempt in range(MOST_ATTEMPTS):
            async with self._turn(self.spent.cost(tokens_in, self.spent.usual_tokens)):
                try:
                    return self.take(await self._send(messages, seed), tokens_in)
                except openai.RateLimitError as error:
                    wait = self._wait(attempt, error)
                    self.errors["asked too much (429)"] += 1
                    self._allowed = max(1.0, self._allowed / 2)
                    self._paused_until = max(self._paused_until, time.monotonic() + wait)
                    continue
                except _BUSY as error:
                    self.errors[_brief(error)] += 1
                    if not self._has_answered and attempt == 2 and isinstance(error, openai.APIConnectionError):
                        raise ServerError(f"nobody answers at {self.client.base_url}: {sentence(error)}") from None
                    wait = self._wait(attempt, error)
                except _REFUSED as error:
                    if self.is_structured and "response_format" in str(error):
                        self.is_structured = False
                        continue
                    if not self._has_answered:
                        raise ServerError(sentence(error)) from None
                    raise RejectedError("the server refuses the question") from None
                except _WRONG as error:
                    raise ServerError(sentence(error)) from None
                except openai.APIStatusError as error:
                    if error.status_code != 408:
                        raise ServerError(sentence(error)) from None
                    self.errors["server error (408)"] += 1
                    wait = self._wait(attempt, error)
            await asyncio.sleep(wait)
        raise NoAnswerError

    async def _send(self, messages: list[dict[str, Any]], seed: int) -> Any:
        return await self.client.chat.completions.create(**self.request(messages, seed))

    def request(self, messages: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        """What is sent: structured output, unless the server has refused it."""
        shape = {"json_schema": {"name": "rationale", "schema": SCHEMA, "strict": True}, "type": "json_schema"}
        more = {"response_format": shape} if self.is_structured else {}
        return {"model": self.model, "messages": messages, "seed": seed, **more}

    def take(self, reply: Any, tokens_in: int) -> tuple[str, tuple[int, int]]:
        """What the model has written, and tokens in and out, once they are counted.

        Args:
            reply: a chat completion.
            tokens_in: of what was asked, where the reply does not say.

        Raises:
            RejectedError: it wrote no whole answer.
            ServerError: it is no chat completion.
        """
        if not hasattr(reply, "choices"):
            raise ServerError(
                f"what answers at {self.client.base_url} is no OpenAI-compatible server; does it end in /v1?"
            )
        self._has_answered = True
        choice = reply.choices[0] if reply.choices else None
        written = (choice.message.content or "") if choice else ""
        usage = reply.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (tokens_in, len(written.encode()) // 4)
        self.spent.tokens_in += tokens[0]
        self.spent.tokens_out += tokens[1]
        self.spent.num_calls += 1
        if self.spent.num_calls % MORE_AFTER == 0:
            self._allowed = min(float(self.concurrency), self._allowed + 1)
        if choice is None or choice.finish_reason == "length":
            raise RejectedError("cut off", tokens)
        if choice.finish_reason == "content_filter" or getattr(choice.message, "refusal", None):
            raise RejectedError("a refusal", tokens)
        return written, tokens

    @asynccontextmanager
    async def _turn(self, cost: float) -> AsyncIterator[None]:
        """Wait until a question may be sent, and set its cost aside while it is under way."""
        async with self._free:
            await self._free.wait_for(lambda: self._num_active < self._allowed)
            self._num_active += 1
        try:
            while (left := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(left)
            spent = self.spent
            if spent.budget is not None and spent.money + spent.reserved + cost > spent.budget:
                raise BudgetError
            spent.reserved += cost
            try:
                yield
            finally:
                spent.reserved -= cost
        finally:
            async with self._free:
                self._num_active -= 1
                self._free.notify_all()

    def _wait(self, attempt: int, error: Any) -> float:
        response = getattr(error, "response", None)
        asked = response.headers.get("retry-after", "") if response is not None else ""
        try:
            return min(MOST_WAIT_S, float(asked))
        except ValueError:  # absent, or a date
            return min(MOST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0)


def _brief(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    return (
        f"server error ({status})" if status else type(error).__name__.removeprefix("API").removesuffix("Error").lower()
    )


def sentence(error: openai.APIError) -> str:
    """What a server says is wrong, in one line."""
    body = getattr(error, "body", None)
    told = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(told or error.message).split())[:300]
