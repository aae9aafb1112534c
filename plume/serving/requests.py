"""Requests of every API that is understood, as the inputs that they ask for.

OpenAI's `input` and vLLM's `messages` (one conversation, or several), Jina's items, Cohere's `texts`, `images` and
`inputs`, TEI's `inputs`. A request is read without a model: what it holds are texts and media still in base64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from plume.serving.errors import RequestError, wrong

Side = Literal["query", "document"]
Kind = Literal["text", "image", "video"]

#: What a field may not ask for, since it would change how every request is read.
_REFUSED = ("chat_template", "chat_template_kwargs", "media_io_kwargs", "add_generation_prompt", "return_multivector",
            "late_chunking")  # fmt: skip
#: How vectors may be written.
ENCODINGS = ("float", "base64", "binary", "ubinary")
#: Entries of a list in a request at most, whatever the ceilings of a server; looked at before anything is made of them.
MOST_ENTRIES = 4_096
_QUERIES = ("query", "search_query", "retrieval.query", "code.query", "nl2code.query", "qa.query")
_DOCUMENTS = (
    *("document", "passage", "search_document", "retrieval.passage", "code.passage", "nl2code.passage", "qa.passage"),
    *("classification", "clustering", "image", "text-matching", "separation"),
)
_TOKENS = (
    "input holds token ids, which are another vocabulary's; send strings (langchain-openai: "
    "check_embedding_ctx_length=False)"
)


@dataclass(frozen=True)
class Part:
    """A piece of an input: a text, or a medium in base64. param: how errors call it."""

    kind: Kind
    value: Any
    param: str


@dataclass(frozen=True)
class Asked:
    """One input: its parts in order, what a conversation says about it, and its side where that is its own."""

    parts: tuple[Part, ...]
    param: str
    instruction: str = ""
    side: Side | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: vectors of some inputs.

    num_latent_steps, side: None where the request does not say. dimensions: of a vector; None: all.
    encodings: of the vectors, as the API calls them. model: the name that it was asked under.
    max_pixels: larger images are reduced to it; None: the checkpoint's own limit.
    """

    inputs: Sequence[Asked]
    model: str | None = None
    num_latent_steps: int | None = None
    side: Side | None = None
    instruction: str = ""
    dimensions: int | None = None
    encodings: Sequence[str] = field(default_factory=lambda: ["float"])
    max_pixels: int | None = None


def read_json(body: bytes) -> dict[str, Any]:
    """The object in the body of a request.

    Raises:
        RequestError: it is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise wrong("the body is not JSON") from None
    if not isinstance(found, dict):
        raise wrong("the body is no JSON object")
    return found


def read_openai(body: Mapping[str, Any]) -> Request:
    """OpenAI's `/v1/embeddings`, with what vLLM and Jina add.

    Raises:
        RequestError: names the field.
    """
    if refused := [name for name in _REFUSED if body.get(name) not in (None, False)]:
        raise wrong(f"{refused[0]} is not available", refused[0])
    for name, only in (("embed_dtype", "float32"), ("endianness", "little")):
        if body.get(name) not in (None, only, "native"):
            raise wrong(f"vectors are {only} alone", name)
    if body.get("truncate_prompt_tokens") not in (None, -1):
        raise wrong("inputs are not cut; shorten them, or leave it out", "truncate_prompt_tokens")
    if body.get("use_activation") is False or body.get("normalized") is False or body.get("normalize") is False:
        raise wrong("vectors are always of unit length", "normalized")
    if body.get("messages") is not None:
        if body.get("input"):
            raise wrong("there are input and messages; send one of them", "messages")
        inputs = _conversations(body["messages"], "messages")
    else:
        inputs = _inputs(body.get("input"))
    encoding = _string(body, "encoding_format") or body.get("embedding_type") or "float"
    if isinstance(encoding, list) and len(encoding) == 1:
        (encoding,) = encoding
    if encoding not in ENCODINGS:
        raise wrong("expected float, base64, binary or ubinary", "encoding_format")
    return Request(inputs=inputs, encodings=[encoding], **_common(body, ("input_type", "task"), "dimensions"))


def read_cohere(body: Mapping[str, Any]) -> Request:
    """Cohere's `/v2/embed`.

    Raises:
        RequestError: names the field.
    """
    given = [name for name in ("texts", "images", "inputs") if body.get(name)]
    if len(given) != 1:
        raise wrong("expected exactly one of texts, images and inputs", given[-1] if given else "texts")
    (name,) = given
    values = _list(body[name], name)
    inputs = []
    for index, value in enumerate(values):
        param = f"{name}[{index}]"
        if name == "inputs":
            content = value.get("content") if isinstance(value, dict) else None
            inputs.append(Asked(tuple(_parts(content, param)), param))
        else:
            inputs.append(Asked((_part("text" if name == "texts" else "image", value, param),), param))
    encodings = _list(body.get("embedding_types") or ["float"], "embedding_types")
    if any(one not in ENCODINGS for one in encodings):
        raise wrong("float, base64, binary and ubinary are available, and no others", "embedding_types")
    return Request(
        inputs=inputs, encodings=list(dict.fromkeys(encodings)), **_common(body, ("input_type",), "output_dimension")
    )


def read_tei(body: Mapping[str, Any]) -> Request:
    """TEI's `/embed`.

    Raises:
        RequestError: names the field.
    """
    if body.get("normalize") is False:
        raise wrong("vectors are always of unit length", "normalize")
    inputs = body.get("inputs")
    values = [inputs] if isinstance(inputs, str) else _list(inputs, "inputs")
    asked = [
        Asked((_part("text", value, f"inputs[{index}]"),), f"inputs[{index}]") for index, value in enumerate(values)
    ]
    return Request(inputs=asked, **_common(body, ("input_type",), "dimensions"))


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A query and documents, which are to be put in order.

    request: the query, then the documents. top_n: of the order that is returned; None: all. documents: as they were
    sent, where they are to be returned. is_tei: whether TEI's shape is expected, whose documents are `texts`.
    """

    request: Request
    top_n: int | None
    documents: Sequence[Any] | None
    is_tei: bool


def read_ranking(body: Mapping[str, Any]) -> Ranking:
    """Cohere's, Jina's and vLLM's `/rerank`, and TEI's.

    Raises:
        RequestError: names the field.
    """
    is_tei = "texts" in body
    name = "texts" if is_tei else "documents"
    if body.get("raw_scores"):
        raise wrong("scores are cosines, and there are no others", "raw_scores")
    documents = _list(body.get(name), name)
    wanted = _list([body.get("query"), *documents], name)
    sides: list[Side] = ["query", *(["document"] * len(documents))]  # type: ignore[list-item]
    params = ["query", *(f"{name}[{index}]" for index in range(len(documents)))]
    inputs = [read_one_input(value, param, side) for value, param, side in zip(wanted, params, sides, strict=True)]
    top_n = body.get("top_n")
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        raise wrong("expected a whole number from 1", "top_n")
    are_returned = body.get("return_text" if is_tei else "return_documents") is True
    return Ranking(
        request=Request(inputs=inputs, **_common({**body, "dimensions": None}, (), "dimensions")),
        top_n=top_n,
        documents=documents if are_returned else None,
        is_tei=is_tei,
    )


def read_one_input(value: Any, param: str, side: Side | None = None) -> Asked:
    """A single input, in any of the forms that `input` may hold.

    Raises:
        RequestError: names `param`.
    """
    try:
        (asked,) = _inputs([value])
    except RequestError as error:
        raise RequestError(error.status, error.message, param) from None
    return replace(asked, param=param, side=side, parts=tuple(replace(part, param=param) for part in asked.parts))


def _inputs(value: Any) -> list[Asked]:
    """`input`: a text, texts, Jina's items, or conversations.

    Raises:
        RequestError: names the one that is wrong.
    """
    if isinstance(value, str):
        return [Asked((_part("text", value, "input"),), "input")]
    values = _list(value, "input")
    if all(isinstance(one, dict) and "role" in one for one in values):
        return _conversations(values, "input")
    inputs = []
    for index, one in enumerate(values):
        param = f"input[{index}]"
        if isinstance(one, int) or (isinstance(one, list) and one and all(isinstance(token, int) for token in one)):
            raise wrong(_TOKENS, "input")
        if isinstance(one, list):
            inputs += _conversations([one], param)
        elif isinstance(one, dict) and "content" in one:
            inputs.append(Asked(tuple(_parts(one["content"], param)), param))
        elif isinstance(one, dict):
            kinds: list[Kind] = [kind for kind in ("image", "video", "text") if one.get(kind) is not None]  # type: ignore[misc]
            if not kinds:
                raise wrong('expected a string, or an object with "text", "image" or "video"', param)
            inputs.append(Asked(tuple(_part(kind, _address(one[kind]), param) for kind in kinds), param))
        else:
            inputs.append(Asked((_part("text", one, param),), param))
    return inputs


def _conversations(value: Any, param: str) -> list[Asked]:
    """One conversation, or several: one input each."""
    values = _list(value, param)
    if all(isinstance(one, list) for one in values):
        return [_conversation(one, f"{param}[{index}]") for index, one in enumerate(values)]
    return [_conversation(values, param)]


def _conversation(messages: Any, param: str) -> Asked:
    parts: list[Part] = []
    instructions: list[str] = []
    messages = _list(messages, param)
    last = messages[-1]
    if len(messages) > 1 and isinstance(last, dict) and last.get("role") == "assistant" and not _says(last):
        messages = messages[:-1]  # an empty answer, as some clients end a conversation with
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user"):
            raise wrong("a conversation holds messages of the roles system and user", param)
        found = _parts(message.get("content"), param)
        if role == "user":
            parts += found
        elif all(part.kind == "text" for part in found):
            instructions += [part.value.strip() for part in found]
        else:
            raise wrong("a system message holds media; put them into the user message", param)
    return Asked(tuple(parts), param, " ".join(filter(None, instructions)))


def _says(message: Mapping[str, Any]) -> bool:
    """Whether a message holds anything."""
    content = message.get("content")
    texts = (
        [part.get("text") if isinstance(part, dict) else part for part in content]
        if isinstance(content, list)
        else [content]
    )
    return any(text not in (None, "") for text in texts)


def _parts(content: Any, param: str) -> list[Part]:
    """The content of a message: a text, or a list of parts."""
    if isinstance(content, str):
        return [_part("text", content, param)]
    parts = []
    for part in _list(content, param):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        name = str(kind).removesuffix("_url").removesuffix("_base64").removeprefix("input_")
        if name not in ("text", "image", "video"):
            raise wrong('a part must be of type "text", "image_url" or "video_url"', param)
        value = next(
            (part[key] for key in (kind, f"{name}_url", name, "url", "data") if part.get(key) is not None), None
        )
        parts.append(_part(name, _address(value), param))  # type: ignore[arg-type]
    return parts


def _address(value: Any) -> Any:
    """What stands in `{"url": ...}`, as OpenAI writes it."""
    return value.get("url") if isinstance(value, dict) else value


def _part(kind: Kind, value: Any, param: str) -> Part:
    if not isinstance(value, str):
        raise wrong("expected a string" if kind == "text" else f"expected {kind} as a data URI", param)
    return Part(kind, value, param)


def _list(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise wrong("expected a list that is not empty", param)
    if len(value) > MOST_ENTRIES:
        raise RequestError(413, f"a list may hold {MOST_ENTRIES:,} entries", param.partition("[")[0])
    return value


def _string(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong("expected a string", name)
    return value


def _common(body: Mapping[str, Any], sides: Sequence[str], dimensions: str) -> dict[str, Any]:
    """Fields that all APIs share, and those of plume's own."""
    numbers = {}
    for name in ("num_latent_steps", dimensions):
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise wrong("expected a whole number", name)
        numbers[name] = value
    if numbers[dimensions] == 0:
        raise wrong("expected a whole number from 1", dimensions)
    told = [word for name in sides if (word := _string(body, name)) is not None]
    side: Side | None = None
    if told:
        if told[0] not in (*_QUERIES, *_DOCUMENTS):
            raise wrong('expected "query" or "document", or a name of Cohere\'s or Jina\'s', sides[0])
        side = "query" if told[0] in _QUERIES else "document"
    return {
        "model": _string(body, "model"),
        "num_latent_steps": numbers["num_latent_steps"],
        "dimensions": numbers[dimensions],
        "instruction": _string(body, "instruction") or "",
        "side": side,
    }
