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
    """respond: from what is asked to a reply. asked: texts of all requests, in order of arrival."""

    respond: Callable[[str, dict[str, Any]], Reply]
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""
    most_at_once: int = 0

    def times(self) -> Counter[str]:
        return Counter(self.asked)


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
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
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
            written = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "content-type": "application/json",
                "content-length": str(len(written)),
            }.items():
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
