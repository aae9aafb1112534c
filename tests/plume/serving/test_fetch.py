"""Addresses in requests: what is fetched, and what must never be heard of by a server on this machine."""

from __future__ import annotations

import http.server
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from plume import Plume
from plume.serving import fetch as module
from plume.serving.app import make_app
from plume.serving.errors import RequestError
from plume.serving.fetch import Fetcher, is_public
from plume.serving.service import Service, Settings

HOST = "media.example.org"
WRONG = "an address cannot be fetched, or is not allowed here"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        name = self.path[1:]
        if name.startswith("to:"):
            self.send_response(302)
            self.send_header("Location", name[3:])
            self.end_headers()
        elif name.startswith("late:"):
            time.sleep(0.25)
            self.send_response(302)
            self.send_header("Location", name[5:])
            self.end_headers()
        elif name in ("drip", "slow-headers"):
            if name == "drip":
                self.send_response(200)
                self.end_headers()
            for _ in range(600):
                time.sleep(0.05)
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
        else:
            content = self.server.content
            self.send_response(404 if name == "missing" else 200)
            if name == "gzip":
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(content) + 10 * (name == "cut")))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def canary(monkeypatch):
    """A server on this machine that stands for every address that is connected to; keeps what it was asked."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.asked, server.content, server.connected = [], b"content", []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        connect = socket.create_connection

        def redirected(address, timeout=None):
            server.connected.append(address)
            return connect(server.server_address, timeout=timeout)

        monkeypatch.setattr(module.socket, "create_connection", redirected)
        yield server
        server.shutdown()
        thread.join()


def fetcher(addresses=("8.8.8.8",), hosts=(HOST, "other.example.org"), **more):
    return Fetcher(hosts, resolve=lambda host, port: addresses, **more)


def test_what_an_allowed_host_holds_is_fetched(canary):
    assert fetcher().fetch(f"http://{HOST}/a.png?b=1", 100, "input") == b"content"
    assert canary.asked == [(HOST, "/a.png?b=1")]
    assert canary.connected == [("8.8.8.8", 80)]  # the very address that has been looked at


def test_redirects_are_followed_a_few_times_and_looked_at_anew(canary):
    assert fetcher().fetch(f"http://{HOST}/to:/a.png", 100, "input") == b"content"
    assert fetcher().fetch(f"http://{HOST}/to:http://other.example.org/a.png", 100, "input") == b"content"
    canary.asked.clear()
    for target in ("http://127.0.0.1/x", "http://evil.example.org/x", "file:///etc/passwd", "ftp://" + HOST,
                   f"http://{HOST}:8080/x", "//localhost/x", f"http://u@{HOST}/x"):  # fmt: skip
        with pytest.raises(RequestError, match=WRONG):
            fetcher().fetch(f"http://{HOST}/to:{target}", 100, "input")
    assert all(path.startswith("/to:") for _, path in canary.asked)
    canary.asked.clear()
    with pytest.raises(RequestError, match=WRONG):
        fetcher().fetch(f"http://{HOST}/to:/to:/to:/to:/to:/a.png", 100, "input")
    assert len(canary.asked) == 4


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.0.0.%31/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        f"http://127.0.0.1:6666\\@{HOST}/",
        f"http://{HOST}\\@127.0.0.1/",
        f"http://{HOST}@127.0.0.1/",
        f"http://user:secret@{HOST}/",
        f"http://{HOST}:22/",
        f"http://{HOST}:99999/",
        f"http://{HOST}./",
        f"http://{HOST}.evil.org/",
        f"http://evil{HOST}/",
        f"http://{HOST}%00.evil.org/",
        f"http://{HOST}/a b",
        f"http://{HOST}/a\r\nHost: x",
        f"http://{HOST}#@127.0.0.1/".replace(HOST, "evil.org"),
        "http://ｍedia.example.org/",
        f"file://{HOST}/etc/passwd",
        f"ftp://{HOST}/x",
        f"gopher://{HOST}/x",
        f"http:///{HOST}",
        "http://",
        f"http://{HOST}/" + "x" * 3_000,
    ],
)
def test_other_hosts_and_other_ways_to_write_them_are_refused(canary, url):
    resolved = []
    one = Fetcher([HOST], resolve=lambda host, port: resolved.append(host) or ["8.8.8.8"])
    with pytest.raises(RequestError) as error:
        one.fetch(url, 100, "input[0]")
    assert (error.value.status, error.value.message, error.value.param) == (400, WRONG, "input[0]")
    assert canary.connected == canary.asked == resolved == []


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::", "ff02::1"],
)  # fmt: skip
def test_a_host_that_resolves_to_an_address_that_is_not_public_is_refused(canary, address):
    assert not is_public(address)
    for addresses in ([address], ["8.8.8.8", address]):
        with pytest.raises(RequestError, match=WRONG):
            fetcher(addresses).fetch(f"http://{HOST}/a.png", 100, "input")
    assert canary.connected == []


def test_a_host_is_resolved_once_for_each_request(canary):
    """An answer that changes between looking and connecting would else lead inside."""
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])
    one = Fetcher([HOST], resolve=lambda host, port: next(answers))
    assert one.fetch(f"http://{HOST}/a.png", 100, "input") == b"content"
    assert canary.connected == [("8.8.8.8", 80)]
    with pytest.raises(RequestError, match=WRONG):
        one.fetch(f"http://{HOST}/a.png", 100, "input")


@pytest.mark.parametrize("path", ["gzip", "cut", "missing", "to:"])
def test_answers_that_are_none_are_refused_alike(canary, path):
    with pytest.raises(RequestError, match=WRONG):
        fetcher().fetch(f"http://{HOST}/{path}", 100, "input")


def test_size_and_time_are_bounded(canary):
    assert fetcher().fetch(f"http://{HOST}/a", len(canary.content), "input") == b"content"
    with pytest.raises(RequestError, match=WRONG):
        fetcher().fetch(f"http://{HOST}/a", len(canary.content) - 1, "input")
    for path in ("drip", "slow-headers"):
        with pytest.raises(RequestError, match=WRONG):
            fetcher(whole_seconds=0.3).fetch(f"http://{HOST}/{path}", 10**6, "input")


def test_time_is_bounded_over_redirects_and_over_tls(canary, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=WRONG):
        fetcher(whole_seconds=0.6).fetch(f"http://{HOST}/late:/late:/late:/a.png", 100, "input")
    assert len(canary.asked) < 4
    certificate = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", certificate, "-out",
               tmp_path / "public.pem", "-days", "1", "-subj", "/CN=x"]  # fmt: skip
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "public.pem", certificate)
    canary.socket = context.wrap_socket(canary.socket, server_side=True)
    one = fetcher(whole_seconds=1.0)
    with pytest.raises(RequestError, match=WRONG):  # nobody vouches for it
        one.fetch(f"https://{HOST}/a.png", 100, "input")
    one._tls = ssl._create_unverified_context()
    canary.asked.clear()
    assert one.fetch(f"https://{HOST}/a.png", 100, "input") == b"content"
    assert canary.asked == [(HOST, "/a.png")]  # without a port, by which some hosts sign
    with pytest.raises(RequestError, match=WRONG):
        one.fetch(f"https://{HOST}/to:http://{HOST}/a.png", 100, "input")
    began = time.monotonic()
    with pytest.raises(RequestError, match=WRONG):
        one.fetch(f"https://{HOST}/drip", 10**6, "input")
    assert time.monotonic() - began < 20  # it drips for thirty seconds


def test_a_server_fetches_for_those_that_it_was_told_of_alone(canary, plume_folder, picture):
    written = io.BytesIO()
    image = picture(60, 60)
    image.save(written, "PNG")
    canary.content = written.getvalue()
    url = f"http://{HOST}/a.png"
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part]}]
    expected = Plume(plume_folder, device="cpu").encode(Image.open(io.BytesIO(canary.content)))
    for hosts, status in (((HOST,), 200), ((), 400)):
        service = Service(Settings(model=str(plume_folder), device="cpu", allowed_media_domains=hosts))
        service.load()
        service.fetcher._resolve = lambda host, port: ["8.8.8.8"]
        answer = TestClient(make_app(service)).post("/v1/embeddings", json={"messages": messages})
        assert answer.status_code == status
        if hosts:
            assert np.abs(np.array(answer.json()["data"][0]["embedding"]) - expected).max() < 2e-6
            other = {"input": [{"image": "http://evil.example.org/a.png"}]}
            refused = TestClient(make_app(service)).post("/v1/embeddings", json=other).json()["error"]
            assert (refused["message"], refused["param"]) == (WRONG, "input[0]")
        else:
            assert "this server opens no address" in answer.json()["error"]["message"]
        service.close(30)
    assert len(canary.asked) == 1
