"""The search page: results are those of `Index.search`, ids cannot be made up, and a browser shows what there is."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw

from plume import Plume
from plume.search.index import Index
from plume.serving.app import make_app
from plume.serving.search import Searcher, is_own_name
from plume.serving.service import Service, Settings
from plume.tracing.trace import trace

HOSTILE = "<img src=x onerror=alert(1)>.png"
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's chromium and chromium-driver",
)


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "texts").mkdir()
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (97, 61), "white")
        ImageDraw.Draw(picture).ellipse((20, 10, 70, 50), fill=colour)
        picture.save(folder / f"{colour}.png")
        (folder / "texts" / f"{colour}.txt").write_text(f"a {colour} kite")
    (folder / "texts" / "page.md").write_text("<script>alert(1)</script>")
    Image.new("RGB", (40, 40), "green").save(folder / HOSTILE)
    Image.new("RGB", (60, 60), "purple").save(folder / "table.pdf")
    return folder


@pytest.fixture(scope="module")
def index(library, plume, tmp_path_factory) -> Index:
    path = tmp_path_factory.mktemp("index")
    index = Index.create(path, plume, query_latent_steps=3, query_instruction="find the kite", max_pixels=3_136)
    index.update(library, plume, show_progress=False)
    return index


@contextmanager
def serving(plume_folder, index: Index, **settings):
    searcher = Searcher(index.path)
    service = Service(Settings(model=str(plume_folder), device="cpu", **settings), searcher.open)
    service.load()
    try:
        app = make_app(service, searcher=searcher)
        app.state.service = service
        yield app
    finally:
        service.close(30)


@pytest.fixture(scope="module")
def served(plume_folder, index):
    with serving(plume_folder, index) as app:
        yield app


@pytest.fixture(scope="module")
def app(served):
    return served


@pytest.fixture(scope="module")
def service(served) -> Service:
    return served.state.service


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def data_uri(picture: Image.Image) -> str:
    written = io.BytesIO()
    picture.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def found(client, **body) -> list[dict]:
    answer = client.post("/search", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"]


def same(hits, expected):
    assert [(hit["path"], hit["page"]) for hit in hits] == [(hit.path, hit.page) for hit in expected]
    assert np.allclose([hit["score"] for hit in hits], [hit.score for hit in expected], atol=2e-6)


# What is found.


def test_results_are_those_of_the_index(client, index, plume, library):
    picture = Image.open(library / "red.png")
    for query, sent in (
        ("a red kite", "a red kite"),
        ({"text": "blue"}, {"text": "blue"}),
        (picture, {"image": data_uri(picture)}),
        ({"image": picture, "text": "red"}, {"image": data_uri(picture), "text": "red"}),
    ):
        same(found(client, query=sent), index.search(query, plume))
    assert len(found(client, query="red", top_k=3)) == 3
    same(found(client, query="red", top_k=2, offset=3), index.search("red", plume, top_k=5)[3:])


def test_words_are_looked_for_where_that_is_asked_for(client, index, plume, library):
    picture = Image.open(library / "red.png")
    for query, sent in (
        ("blue", "blue"),
        ({"image": picture, "text": "blue"}, {"image": data_uri(picture), "text": "blue"}),
    ):
        hits = found(client, query=sent, hybrid=0.9)
        same(hits, index.search(query, plume, hybrid=0.9))
        assert {hit["name"] for hit in hits if hit["text_score"] is not None} == {"blue.png", "blue.txt"}
    hits = found(client, query={"image": data_uri(picture)}, hybrid=0.5)  # which has no words
    same(hits, index.search(picture, plume))
    assert all(hit["text_score"] is None for hit in hits)
    for hybrid in (-1, 1.5, True, "much", None):
        answer = client.post("/search", json={"query": "blue", "hybrid": hybrid})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "hybrid")


def test_results_end_and_files_are_shown_once_where_that_is_asked_for(client, index, plume):
    same(found(client, query="a red kite", group_by="file"), index.search("a red kite", plume, group_by="file"))
    same(found(client, query="a red kite", cut="drop"), index.search("a red kite", plume, cut="drop"))
    for field, value in (("cut", "best"), ("cut", ["auto"]), ("group_by", "page"), ("group_by", True)):
        answer = client.post("/search", json={"query": "blue", field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    answer = client.post("/search", json={"query": "blue", "cut": "drop", "hybrid": 0.5})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cut")
    answer = client.post("/search", json={"query": "blue", "cut": "auto"})  # of an index of a few files
    if len(index) < 32:
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cut")
    else:
        same(answer.json()["hits"], index.search("blue", plume, cut="auto"))


def test_a_shortened_index_is_searched_by_the_beginnings_of_vectors(plume_folder, library, tmp_path):
    short = Plume(plume_folder, device="cpu", truncate_dim=16)
    index = Index.create(tmp_path / "index", short)
    index.update(library, short, show_progress=False)
    with serving(plume_folder, index) as app, TestClient(app, base_url="http://localhost") as client:
        same(found(client, query="a red kite"), index.search("a red kite", short))
        steps = client.post("/search", json={"query": "red", "steps": True}).json()["steps"]
        vector = short.encode_query("red")
        (traced,) = short.trace("red")
        states = traced.states.numpy()[:, :16]
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        assert np.allclose([state["cosine_to_embedding"] for state in steps], states @ vector, atol=1e-5)


def test_filters(client, index, plume, library):
    for body, where in (
        ({"kinds": ["image", "pdf"]}, "kind IN ('image', 'pdf')"),
        ({"folder": str(library / "texts")}, "path LIKE '%/texts/%'"),
        ({"folder": f"{library}/texts/", "kinds": ["image"]}, "kind = 'video'"),
        ({"folder": f"{library}/te"}, "kind = 'video'"),
        ({"folder": "/it's"}, "kind = 'video'"),
        ({"since": "1990-01-01", "until": "9999-12-31"}, "page >= 0"),
        ({"since": "9999-12-31"}, "kind = 'video'"),
        ({"since": "0001-01-01", "until": "9999-12-31"}, "page >= 0"),
        ({"until": "0002-01-01"}, "kind = 'video'"),
        ({"until": "1990-01-01"}, "kind = 'video'"),
    ):
        same(found(client, query="red", **body), index.search("red", plume, where=where))


def test_days_are_those_of_utc(plume, plume_folder, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    for name, when in (("a.txt", 1_700_006_400), ("b.txt", 1_700_006_399)):  # the first second of a day, and the last
        (tmp_path / "notes" / name).write_text(name)
        os.utime(tmp_path / "notes" / name, (when, when))
    index = Index.create(tmp_path / "index", plume)
    index.update(tmp_path / "notes", plume, show_progress=False)
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    time.tzset()
    try:
        with serving(plume_folder, index) as app:
            client = TestClient(app, base_url="http://localhost")
            for day, name in (("2023-11-15", "a.txt"), ("2023-11-14", "b.txt")):
                (hit,) = found(client, query="a", since=day, until=day)
                assert (hit["name"], hit["changed"]) == (name, day)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_more_like_this_needs_no_model(client, index, service, monkeypatch):
    first = next(hit for hit in found(client, query="red") if hit["name"] == "red.png")
    vectors = {row["path"]: np.array(row["vector"]) for row in index.store.rows(["path", "vector"])}
    monkeypatch.setattr(service, "_encode", None)  # nothing is embedded
    near = found(client, like=first["id"])
    expected = sorted(vectors, key=lambda path: -float(vectors[path] @ vectors[first["path"]]))
    assert [hit["path"] for hit in near] == expected
    assert np.allclose([hit["score"] for hit in near], [vectors[path] @ vectors[first["path"]] for path in expected])


def test_steps_are_those_of_the_trace(client, plume, index):
    answer = client.post("/search", json={"query": "a red kite", "steps": True, "num_latent_steps": 2}).json()
    assert answer["num_latent_steps"] == 2
    (expected,) = plume.trace("a red kite", num_latent_steps=2, instruction="find the kite")
    rows = {hit.path: hit.vector for hit in index.search("red", plume)}
    hits = np.stack([rows[hit["path"]] for hit in answer["hits"]])
    states = expected.states.numpy() / expected.norms.numpy()[:, None]
    assert [len(state["words"]) for state in answer["steps"]] == [5, 5, 5]
    assert [state["experts"] for state in answer["steps"]] == [[], *expected.experts.tolist()]
    assert np.allclose([state["cosine_to_hits"] for state in answer["steps"]], states @ hits.T, atol=1e-5)
    told = [state["cosine_to_embedding"] for state in answer["steps"]]
    assert np.allclose(told, expected.to_embedding.numpy(), atol=1e-5)
    assert answer["hits"][0]["score"] == pytest.approx(float(hits[0] @ expected.embedding.numpy()), abs=1e-5)


def test_steps_of_a_picture_are_those_of_what_searched(client, index, plume, service):
    """Also where the index looks at pictures at another size than the checkpoint does."""
    picture = Image.new("RGB", (57, 85), "white")
    ImageDraw.Draw(picture).ellipse((5, 5, 40, 70), fill="red")

    def steps_told() -> float:
        return float(client.get("/metrics").text.partition("\nplume_latent_steps_total ")[2].splitlines()[0])

    before = steps_told()
    answer = client.post("/search", json={"query": {"image": data_uri(picture)}, "steps": True}).json()
    assert steps_told() == before + 6  # of the search, and of the trace
    same(answer["hits"], index.search(picture, plume))
    size = {"size": {"shortest_edge": 3_136, "longest_edge": 3_136}}
    traced = trace(plume.plume_model, picture, num_latent_steps=3, instruction="find the kite", images_kwargs=size)[0]
    told = [state["cosine_to_embedding"] for state in answer["steps"]]
    assert np.allclose(told, traced.to_embedding.numpy(), atol=1e-5)


def test_what_the_index_holds_is_told(client, library):
    assert client.get("/search").json() == {
        "rows": 7,
        "kinds": {"image": 3, "pdf": 1, "text": 3},
        "folders": {str(library): 7},
        "num_latent_steps": 4,
        "query_latent_steps": 3,
        "max_latent_steps": 32,
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "query"),
        ({"query": "red", "like": "1"}, "query"),
        ({"query": ["red"]}, "query"),
        ({"query": 3}, "query"),
        ({"query": {"image": "/etc/passwd"}}, "query"),
        ({"query": {"image": "http://127.0.0.1/x.png"}}, "query"),
        ({"query": "red", "kinds": "pdf"}, "kinds"),
        ({"query": "red", "kinds": ["pdf') OR 1=1 --"]}, "kinds"),
        ({"query": "red", "folder": 3}, "folder"),
        ({"query": "red", "folder": "/" * 5_000}, "folder"),
        ({"query": "red", "folder": "\ud800"}, "folder"),
        ({"query": "red", "kinds": ["pdf"] * 100_000}, "kinds"),
        ({"query": "red", "since": "yesterday"}, "since"),
        ({"query": "red", "until": 3}, "until"),
        ({"query": "red", "top_k": 101}, "top_k"),
        ({"query": "red", "top_k": True}, "top_k"),
        ({"query": "red", "offset": -1}, "offset"),
        ({"query": "red", "num_latent_steps": 33}, "num_latent_steps"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(client, body, param):
    answer = client.post("/search", content=json.dumps(body))
    assert answer.status_code in (400, 403), answer.text
    assert answer.json()["error"]["param"] == param


# Ids and files.


def test_thumbnails_and_files_open_by_id(client, library):
    hits = {hit["name"]: hit for hit in found(client, query="red")}
    picture = client.get(f"/search/{hits['red.png']['id']}/thumbnail")
    assert picture.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(picture.content)).format == "JPEG"
    assert client.get(f"/search/{hits['red.txt']['id']}/thumbnail").status_code == 404
    for name, kind in (
        ("red.png", "image/png"),
        ("page.md", "text/plain; charset=utf-8"),
        ("table.pdf", "application/pdf"),
    ):
        file = client.get(f"/search/{hits[name]['id']}/file")
        assert (file.status_code, file.headers["content-type"]) == (200, kind)
        assert file.headers["x-content-type-options"] == "nosniff"
        assert file.headers["content-disposition"].startswith("inline")
        assert file.content == next(library.rglob(name)).read_bytes()
    head = client.head(f"/search/{hits['red.png']['id']}/file")
    assert (head.status_code, head.content) == (200, b"")
    part = client.get(f"/search/{hits['red.png']['id']}/file", headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"PNG")


def test_ids_cannot_be_made_up(client):
    real = found(client, query="red")[0]["id"]
    number, _, sign = real.partition("-")
    for name in (
        number,
        f"{number}-",
        f"{number}-{'0' * 32}",
        f"{int(number) + 1}-{sign}",
        "99-x",
        "-1-x",
        "9" * 40,
        "é",
    ):
        for what in ("thumbnail", "file"):
            assert client.get(f"/search/{name}/{what}").status_code == 404, name
        assert client.post("/search", json={"like": name}).status_code == 404


def test_files_that_have_left_their_folder_are_not_opened(plume, plume_folder, tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("of somebody else")
    for name in ("gone.txt", "swapped.txt", "stays.txt"):
        (folder / name).write_text(f"a {name}")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "inside.txt").symlink_to(os.fsencode(folder) + b"/\xff.bin")
    with open(os.fsencode(folder) + b"/\xff.bin", "w") as file:
        file.write("of this folder")
    index = Index.create(tmp_path / "index", plume)
    index.update(folder, plume, show_progress=False)
    (folder / "gone.txt").unlink()
    (folder / "swapped.txt").unlink()
    (folder / "swapped.txt").symlink_to(tmp_path / "secret.txt")
    with serving(plume_folder, index) as app, TestClient(app, base_url="http://localhost") as client:
        hits = {hit["name"]: hit for hit in found(client, query="red")}
        opened = {name: client.get(f"/search/{hit['id']}/file").status_code for name, hit in hits.items()}
        assert opened == {"gone.txt": 404, "swapped.txt": 404, "link.txt": 404, "stays.txt": 200, "inside.txt": 200}
        inside = client.get(f"/search/{hits['inside.txt']['id']}/file")
        assert inside.headers["content-disposition"] == 'inline; filename="inside.txt"'
        assert inside.headers["content-type"] == "text/plain; charset=utf-8"
        assert not hits["gone.txt"]["is_there"]


def test_an_index_that_cannot_be_read_is_told(plume, plume_folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a kite")
    index = Index.create(tmp_path / "index", plume)
    index.update(tmp_path / "notes", plume, show_progress=False)
    with serving(plume_folder, index) as app:
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        (hit,) = found(client, query="a")
        shutil.move(tmp_path / "index" / "items.lance", tmp_path / "away")
        asked = [client.get("/search"), client.post("/search", json={"query": "a"})]
        asked += [client.get(f"/search/{hit['id']}/{what}") for what in ("thumbnail", "file")]
        assert [answer.status_code for answer in asked] == [503] * 4
        assert str(tmp_path) not in "".join(answer.text for answer in asked)
        shutil.move(tmp_path / "away", tmp_path / "index" / "items.lance")
        assert found(client, query="a")[0]["name"] == "a.txt"
        app.state.service.drain()
        assert client.get(f"/search/{hit['id']}/file").status_code == 503


def test_an_id_ends_with_its_row(plume, plume_folder, tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.txt").write_text(name)
    index = Index.create(tmp_path / "index", plume)
    index.update(folder, plume, show_progress=False)
    with serving(plume_folder, index) as app, TestClient(app, base_url="http://localhost") as client:
        before = {hit["name"]: hit["id"] for hit in found(client, query="a")}
        for name in "ab":
            (folder / f"{name}.txt").unlink()
        index.update(folder, plume, show_progress=False)  # whose compaction counts rows anew
        after = {hit["name"]: hit["id"] for hit in found(client, query="a")}
        assert set(after) == {"c.txt", "d.txt"}
        for name, old in before.items():
            answer = client.get(f"/search/{old}/file")
            assert answer.status_code == 404 or (answer.content.decode(), f"{answer.text}.txt") == (name[0], name)


def test_a_page_elsewhere_cannot_read_the_index(app, plume_folder, index):
    for host, allowed in (("localhost:8000", True), ("127.0.0.1", True), ("[::1]:80", True), ("kite.example", False)):
        assert is_own_name(host) is allowed
        client = TestClient(app, base_url=f"http://{host}")
        assert client.get("/search").status_code == (200 if allowed else 403)
    with serving(plume_folder, index, api_key="secret") as locked:
        client = TestClient(locked, base_url="http://kite.example")
        headers = {"Authorization": "Bearer secret"}
        assert client.get("/").status_code == client.get("/page.js").status_code == 200
        assert client.get("/search").status_code == 401
        assert client.post("/search", json={"query": "red"}).status_code == 401
        assert client.post("/", json={"inputs": "red"}).status_code == 401  # TEI's
        (hit, *_) = client.post("/search", json={"query": "red"}, headers=headers).json()["hits"]
        assert client.get(f"/search/{hit['id']}/file").status_code == 200  # the id is enough
        other = found(TestClient(app, base_url="http://localhost"), query="red")[0]["id"]
        assert client.get(f"/search/{other}/file").status_code == 404


def test_the_page_may_run_its_own_script_alone(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert "http://" not in page.text
    assert "https://" not in page.text
    script = client.get("/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in script.text


def test_without_an_index_there_is_no_page(plume_folder):
    service = Service(Settings(model=str(plume_folder), device="cpu"))
    client = TestClient(make_app(service))
    assert client.get("/search").status_code == 404
    assert client.get("/").status_code == 405
    service.close(30)


def test_another_checkpoint_cannot_search_an_index(plume_folder, index, start, tmp_path):
    from plume import PlumeModel

    other = tmp_path / "other"
    PlumeModel.from_backbone(str(start), num_latent_steps=2).save_pretrained(other)
    searcher = Searcher(index.path)
    service = Service(Settings(model=str(other), device="cpu"), searcher.open)
    with pytest.raises(ValueError, match="whose vectors do not compare"):
        service.load()
    assert service.state == "failed"
    service.close(30)


# In a browser.


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service as Driver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (
        *("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "no-first-run", "window-size=1200,900"),
        f"user-data-dir={tmp_path / 'browser'}",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, Driver(shutil.which("chromedriver")))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


class Live:
    """A server in a thread, which can be stopped."""

    def __init__(self, app):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()


@pytest.fixture
def live(app):
    live = Live(app)
    yield live
    live.stop()


def until(driver, look, what: str):
    """What `look` gives once it is something; a browser on a loaded machine takes its time."""
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if value := look():
                return value
        except StaleElementReferenceException:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{what}; the page says {driver.find_element('tag name', 'body').text!r}")


def names(driver, where: str = "hits") -> list[str]:
    return [card.text for card in driver.find_elements("css selector", f"#{where} .name")]


def type_words(driver, words: str):
    field = driver.find_element("id", "words")
    field.clear()
    field.send_keys(f"{words}\n")


@pytest.mark.launching
@needs_browser
def test_words_a_dropped_picture_and_filters_in_a_browser(browser, live, index, plume, library):
    from selenium.webdriver.common.alert import Alert
    from selenium.webdriver.common.by import By

    browser.get(live.address)
    until(browser, lambda: browser.find_element(By.ID, "status").text == "7 rows", "the page has not begun")

    def expected(query, **more) -> list[str]:
        return [Path(hit.path).name for hit in index.search(query, plume, **more)]

    type_words(browser, "a red kite")
    until(browser, lambda: names(browser) == expected("a red kite"), "other results by words")
    assert "words=a+red+kite" in browser.current_url

    # A hostile name is text.
    shown = [card for card in browser.find_elements(By.CSS_SELECTOR, "#hits .name") if card.text == HOSTILE]
    assert len(shown) == 1
    assert not browser.find_elements(By.CSS_SELECTOR, "#hits .name img")
    with pytest.raises(Exception, match="no such alert"):
        _ = Alert(browser).text

    # Pictures come when they are near, by id.
    pictures = browser.find_elements(By.CSS_SELECTOR, "#hits img")
    assert len(pictures) == 4
    assert all(picture.get_attribute("loading") == "lazy" for picture in pictures)
    until(browser, lambda: int(pictures[0].get_attribute("naturalWidth")) > 0, "no thumbnail")

    # A filter, and what each step did.
    browser.find_element(By.CSS_SELECTOR, "#kinds input[value=text]").click()
    texts = expected("a red kite", where="kind = 'text'")
    until(browser, lambda: names(browser) == texts, "the filter does not hold")
    browser.find_element(By.ID, "written").click()
    texts = expected("a red kite", where="kind = 'text'", hybrid=0.5)
    assert texts[0] == "red.txt"
    until(browser, lambda: names(browser) == texts, "words are not looked for")
    browser.find_element(By.ID, "inside").click()
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#states tr")) == 4, "no states")
    assert [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#head th")][4:] == texts
    browser.find_element(By.ID, "compare").click()
    until(browser, lambda: len(names(browser, "others")) == 3, "no single pass beside it")

    # The address holds all of it.
    browser.refresh()
    until(browser, lambda: names(browser) == texts and len(names(browser, "others")) == 3, "the address forgets")

    # A dropped picture.
    browser.get(live.address)
    until(browser, lambda: browser.find_element(By.ID, "status").text == "7 rows", "the page has not begun")
    content = base64.b64encode((library / "blue.png").read_bytes()).decode()
    browser.execute_script(
        """const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "blue.png", { type: "image/png" }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));""",
        content,
    )
    by_picture = expected(Image.open(library / "blue.png"))
    until(browser, lambda: names(browser) == by_picture, "other results by a picture")
    assert browser.find_element(By.ID, "chip").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#hits .like").click()
    until(browser, lambda: "like the one" in browser.find_element(By.ID, "status").text, "no neighbours")
    assert names(browser)[0] == by_picture[0]

    # The keyboard alone: / goes to the words, Escape takes the picture away.
    browser.execute_script("document.activeElement.blur()")
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "words"
    type_words(browser, "blue")
    until(
        browser, lambda: names(browser) == expected({"image": Image.open(library / "blue.png"), "text": "blue"}), "both"
    )
    browser.find_element(By.ID, "words").send_keys("\ue00c")
    until(browser, lambda: names(browser) == expected("blue"), "the picture is still there")
    assert not browser.find_element(By.ID, "chip").is_displayed()
    link = browser.find_element(By.CSS_SELECTOR, "#hits .name").get_attribute("href")
    assert link.startswith(f"{live.address}/search/")

    # Whoever does not see the page is told what each field is, and what has happened.
    nameless = browser.execute_script(
        """return [...document.querySelectorAll("input, button, img:not([alt])")]
            .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert browser.find_element(By.ID, "status").get_attribute("role") == "status"
    assert browser.find_element(By.ID, "problem").get_attribute("role") == "alert"

    # Everything fits a telephone.
    browser.set_window_size(500, 800)
    wide = browser.execute_script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not wide
    refused = [line for line in browser.get_log("browser") if "Content Security Policy" in line["message"]]
    assert not refused


@pytest.mark.launching
@needs_browser
def test_more_results_and_words_typed_early_in_a_browser(browser, plume, plume_folder, tmp_path):
    from selenium.webdriver.common.by import By

    (tmp_path / "notes").mkdir()
    for number in range(60):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"kite {number}")
    index = Index.create(tmp_path / "index", plume)
    index.update(tmp_path / "notes", plume, show_progress=False)
    with serving(plume_folder, index) as app:
        service = app.state.service
        service.state = "loading"  # the page waits for the model, and keeps what is typed meanwhile
        live = Live(app)
        try:
            browser.get(live.address)
            problem = browser.find_element(By.ID, "problem")
            until(browser, problem.is_displayed, "nobody says that the model is being loaded")
            browser.find_element(By.ID, "words").send_keys("kite")
            service.state = "ready"
            expected = [Path(hit.path).name for hit in index.search("kite", plume, top_k=60)]
            until(browser, lambda: names(browser) == expected[:24], "words that were typed early are lost")
            browser.find_element(By.ID, "words").send_keys(" and something else")
            browser.execute_script("const more = document.getElementById('more'); more.click(); more.click();")
            until(browser, lambda: names(browser) == expected[:48], "more of something else")
            browser.execute_script("document.getElementById('more').click()")
            until(browser, lambda: names(browser) == expected, "the rest does not come")
            assert not browser.find_element(By.ID, "more").is_displayed()
        finally:
            live.stop()


@pytest.mark.launching
@needs_browser
def test_a_server_that_breaks_or_asks_for_a_key_in_a_browser(browser, plume_folder, index, library):
    from selenium.webdriver.common.by import By

    with serving(plume_folder, index, api_key="secret") as app:
        live = Live(app)
        try:
            browser.get(live.address)
            key = browser.find_element(By.ID, "secret")
            until(browser, key.is_displayed, "no key is asked for")
            key.send_keys("secret\n")
            until(browser, lambda: browser.find_element(By.ID, "status").text == "7 rows", "the key is not taken")
            type_words(browser, "a red kite")
            until(browser, lambda: len(names(browser)) == 7, "nothing is found")
            pictures = browser.find_elements(By.CSS_SELECTOR, "#hits img")
            until(browser, lambda: int(pictures[0].get_attribute("naturalWidth")) > 0, "no thumbnail")
        finally:
            live.stop()
        problem = browser.find_element(By.ID, "problem")
        assert not problem.is_displayed()
        type_words(browser, "blue")
        until(browser, problem.is_displayed, "nobody says that the server is gone")
        assert problem.text == "The server does not answer; is it still running?"
