"""A server that speaks as much of OpenAI's API as the tests need, and misbehaves as real ones do."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]
"""Status, headers and body; None as the body breaks the connection off."""


def completion(content: str, finish_reason: str = "stop", **message: Any) -> Reply:
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return 200, {}, body


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    return status, headers, {"error": {"message": message, "type": "t", "code": None, "param": None}}


def answer_for(target: str) -> str:
    steps = ["There is something that has a colour here.", f"So it can only be the {target} itself."]
    return json.dumps({"steps": steps, "answer": target})


@dataclass
class FakeServer:
    """respond: from what is asked to a reply. asked: texts of all requests, in order of arrival.

    files, batches: by ID. is_holding: whether batches stay under way. unanswered: texts that a batch has no line for.
    """

    respond: Callable[[str, dict[str, Any]], Reply]
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""
    most_at_once: int = 0
    files: dict[str, str] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_holding: bool = False
    unanswered: set[str] = field(default_factory=set)

    def times(self) -> Counter[str]:
        return Counter(self.asked)

    def upload(self, body: bytes) -> dict[str, Any]:
        """A file that comes as a form, whose longest part it is."""
        boundary = body.partition(b"\r\n")[0]
        parts = [part.partition(b"\r\n\r\n")[2].rstrip(b"\r\n") for part in body.split(boundary)]
        name = f"file-{len(self.files)}"
        self.files[name] = max(parts, key=len).decode()
        return {"id": name, "object": "file", "bytes": 1, "created_at": 0, "filename": "f", "purpose": "batch",
                "status": "processed"}  # fmt: skip

    def make_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {"id": name, "object": "batch", "created_at": 0, "status": "in_progress", **body}
        return self.batches[name]

    def look_at(self, name: str) -> dict[str, Any]:
        """A batch, whose questions are answered when it is first looked at."""
        batch = self.batches[name]
        if self.is_holding or batch["status"] != "in_progress":
            return batch
        right, wrong = [], []
        for line in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            question = question_of(line["body"])
            self.asked.append(question)
            self.bodies.append(line["body"])
            if question not in self.unanswered:
                status, _, reply = self.respond(question, line["body"])
                answer = {"custom_id": line["custom_id"], "response": {"status_code": status, "body": reply}}
                (right if status == 200 else wrong).append(json.dumps(answer))
        for kind, lines in (("output", right), ("error", wrong)):
            if lines:
                self.files[f"{name}-{kind}"] = "\n".join(lines) + "\n"
                batch[f"{kind}_file_id"] = f"{name}-{kind}"
        batch["status"] = "expired" if self.unanswered else "completed"
        return batch


def question_of(body: dict[str, Any]) -> str:
    """The text of the row, behind what is asked about it."""
    content = body["messages"][1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return text.rpartition("\n\n")[2]


@contextmanager
def serving(respond: Callable[[str, dict[str, Any]], Reply]) -> Iterator[FakeServer]:
    server = FakeServer(respond)
    lock, active = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removesuffix("/content").rpartition("/")[2]
            if self.path.endswith("/content"):
                self.send(200, {"content-type": "text/plain"}, server.files[name].encode())
            else:
                self.send(200, {}, json.dumps(server.look_at(name)).encode())

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            if not self.path.endswith("/chat/completions"):
                made = server.upload(raw) if self.path.endswith("/files") else server.make_batch(json.loads(raw))
                self.send(200, {}, json.dumps(made).encode())
                return
            body = json.loads(raw)
            question = question_of(body)
            with lock:
                active[0] += 1
                server.most_at_once = max(server.most_at_once, active[0])
                server.asked.append(question)
                server.bodies.append(body)
            try:
                status, headers, reply = server.respond(question, body)
            finally:
                with lock:
                    active[0] -= 1
            if reply is None:
                self.close_connection = True
                return
            self.send(status, headers, json.dumps(reply).encode())

        def send(self, status: int, headers: dict[str, str], written: bytes) -> None:
            self.send_response(status)
            kind = {"content-type": "application/json", "content-length": str(len(written))}
            for name, value in {**kind, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(written)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        server.address = f"http://127.0.0.1:{http.server_address[1]}/v1"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
