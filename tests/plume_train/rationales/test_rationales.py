"""`plume-train rationales` against a server that misbehaves: nothing is lost, nothing is paid for twice."""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from plume_train.data.records import Records
from plume_train.data.rows import Side
from plume_train.rationales import batches as batches_module
from plume_train.rationales import finds as finds_module
from plume_train.rationales import server as server_module
from plume_train.rationales.answers import Answer, RejectedError, check_answer, read_answer
from plume_train.rationales.command import rationales
from tests.plume_train.rationales.fake_server import answer_for, completion, failure, serving
from tests.processes import started


def write_rows(folder, count=6, **more):
    rows = [
        {"query": f"what number {index}?", "target": f"thing {index}", "task": "t", **more} for index in range(count)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def right(question: str, body: dict):
    return completion(answer_for(f"thing {question.split()[-1].rstrip('?')}"))


def ask(server, file, *words, out="out.jsonl") -> int:
    return rationales(
        [str(file), "--out", str(file.parent / out), "--base-url", server.address, "--model", "m", *words]
    )


def rows_of(folder, name="out.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_WAIT_S", 0.001)


def test_rows_get_rationale_and_answer_and_lose_nothing(tmp_path, capsys):
    file = write_rows(tmp_path, note={"kept": True})
    with serving(right) as server:
        assert ask(server, file) == 0
    rows = rows_of(tmp_path)
    assert [row["target"] for row in rows] == [f"thing {index}" for index in range(6)]
    assert rows[3]["query"]["text"] == "what number 3?"
    assert rows[3]["query"]["answer"] == "thing 3"
    assert rows[3]["query"]["rationale"].endswith("So it can only be the thing 3 itself.")
    assert all(row["note"] == {"kept": True} and row["rationale_by"]["model"] == "m" for row in rows)
    records = Records(tmp_path / "out.jsonl")
    assert records[3].query.rationale
    told = capsys.readouterr().out
    assert "6 sides without a rationale in 6 rows; 0 different ones were asked about before, 6 are to be now" in told
    assert "6 rationales written, 0 sides left without" in told
    shape = server.bodies[0]["response_format"]["json_schema"]
    assert shape["strict"]
    assert set(shape["schema"]["required"]) == {"steps", "answer"}
    assert "thing" not in json.dumps(server.bodies[0]["messages"]).replace("one thing", "").replace("each thing", "")


@pytest.mark.parametrize("row", [
    {"query_text": "what number 0?", "target_text": "thing 0"},
    {"query": [{"text": "what number 0?"}], "target": "thing 0"},
    {"query": {"text": "what number 0?", "answer": "thing 0"}, "target": "thing 0"},
])  # fmt: skip
def test_every_way_to_write_a_row_keeps_its_way(tmp_path, row):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row))
    with serving(right) as server:
        assert ask(server, file) == 0
    found = Records(tmp_path / "out.jsonl")[0]
    assert found.query.rationale
    assert found.query.answer == "thing 0"
    assert found.query.text == "what number 0?"


def test_rows_that_have_a_rationale_are_not_asked_about_and_targets_only_on_request(tmp_path):
    file = write_rows(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["query"] = {"text": "known", "rationale": "It is known. So it is."}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(right) as server:
        assert ask(server, file) == 0
        assert "known" not in server.asked
        assert len(server.asked) == 5
        assert ask(server, file, "--side", "both", out="both.jsonl") == 0
        assert {one for one in server.asked if one.startswith("thing")} == {f"thing {index}" for index in range(6)}
    assert rows_of(tmp_path)[0] == rows[0]


def test_rows_that_are_found_by_a_clear_margin_are_not_asked_about(tmp_path, capsys):
    file = write_rows(tmp_path)
    rows = rows_of(tmp_path, file.name)
    for index, row in enumerate(rows):
        row["margin"] = index / 10
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(right) as server:
        assert ask(server, file, "--max-margin", "0.2") == 0
        assert ["rationale" in str(row["query"]) for row in rows_of(tmp_path)] == [True] * 3 + [False] * 3
        del rows[1]["margin"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=r"pairs.jsonl:2: no 'margin', which --max-margin goes by"):
            ask(server, file, "--max-margin", "0.2")


def test_equal_rows_are_asked_about_once_and_all_answered(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "what number 1?", "target": "thing 1"}\n' * 4)
    with serving(right) as server:
        assert ask(server, file) == 0
    assert len(server.asked) == 1
    assert all(row["query"]["rationale"] for row in rows_of(tmp_path))


def test_an_answer_is_checked_against_the_target_of_its_own_row(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"query": "what number 1?", "target": target} for target in ("thing 1", "thing 2")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(right) as server:
        assert ask(server, file) == 0
    assert [isinstance(row["query"], dict) for row in rows_of(tmp_path)] == [True, False]


def test_images_and_frames_travel_as_small_jpegs(tmp_path):
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "a.png")
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        json.dumps({"query": {"text": "what?", "image": "a.png", "video": [["a.png"] * 20]}, "target": "x"})
    )
    with serving(lambda question, body: completion(answer_for("x"))) as server:
        assert ask(server, file) == 0
    parts = server.bodies[0]["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]  # equal frames travel once
    data = base64.b64decode(parts[0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (1024, 512)


def test_a_file_that_is_gone_costs_its_row_alone(tmp_path, capsys):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:60])
    file = tmp_path / "pairs.jsonl"
    rows = [{"query": {"text": "what?", "image": name}, "target": "x"} for name in ("a.png", "b.png")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(lambda question, body: completion(answer_for("x"))) as server:
        assert ask(server, file) == 0
    assert "1  a file that cannot be decoded" in capsys.readouterr().out
    assert [isinstance(row["query"], dict) and "rationale" in row["query"] for row in rows_of(tmp_path)] == [
        True,
        False,
    ]


def test_three_hundred_rows_from_a_bad_server_with_a_kill_in_the_middle(tmp_path):
    """Every fault at its own rows, the first time; the second run asks what is missing and no more."""
    file = write_rows(tmp_path, 300)
    seen: dict[str, int] = {}

    def respond(question: str, body: dict):
        number, times = int(question.split()[-1].rstrip("?")), seen.get(question, 0)
        seen[question] = times + 1
        whole = answer_for(f"thing {number}")
        if times:
            return completion(whole)
        faults = [
            lambda: failure(429, retry_after="0.01"), lambda: failure(503, retry_after="0"), lambda: (200, {}, None),
            lambda: completion(f"Of course! ```json\n{whole}\n``` Done {{}}".replace(" {}", "")),
            lambda: completion(whole[:-20]), lambda: completion(whole, "length"),
            lambda: completion(json.dumps({"steps": [f"One sees that thing {number} is here.", "So it is only that."],
                                           "answer": f"thing {number}"})),
            lambda: completion("I'm sorry, but I cannot help with that."), lambda: completion("", "content_filter"),
        ]  # fmt: skip
        return faults[number % 20]() if number % 20 < len(faults) else completion(whole)

    with serving(respond) as server:
        words = [sys.executable, "-m", "plume_train", "rationales", file, "--out", tmp_path / "out.jsonl"]
        command = [*words, "--base-url", server.address, "--model", "m", "--concurrency", "8"]
        answers = tmp_path / "out.answers.jsonl"
        with started(command) as process:
            while process.poll() is None and (not answers.exists() or len(answers.read_bytes().splitlines()) < 120):
                time.sleep(0.005)
            process.kill()
            process.wait()
        before = answers.read_bytes()
        num_whole = before.count(b"\n")
        assert 120 <= num_whole < 300
        with answers.open("ab") as opened:
            opened.write(b'{"key": "half')
        answered = {row["answer"] for row in map(json.loads, before.splitlines()[:num_whole])}
        server.asked.clear()
        assert ask(server, file) == 0
    assert not {question for question in server.asked if f"thing {question.split()[-1].rstrip('?')}" in answered}
    entries = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(entries) == len({entry["key"] for entry in entries}) == 300
    assert all(row["query"]["rationale"] for row in rows_of(tmp_path))
    assert len(rows_of(tmp_path)) == 300


def test_what_is_rejected_is_asked_again_with_the_reason_and_then_left_without(tmp_path, capsys):
    file = write_rows(tmp_path, 2)

    def respond(question: str, body: dict):
        if question == "what number 0?" or "was not taken" in question:
            return completion("no idea")
        return right(question, body)

    with serving(respond) as server:
        assert ask(server, file) == 0
        assert len(server.asked) == 4
        assert {body["seed"] for body in server.bodies} == {1, 2, 3}
        assert server.bodies[-1]["messages"][2]["content"] == (
            "The last answer was not taken: no JSON with steps. Write another."
        )
        assert ask(server, file) == 0
        assert len(server.asked) == 4  # nor the next time
    assert "1  no JSON with steps" in capsys.readouterr().out
    rows = rows_of(tmp_path)
    assert rows[0] == {"query": "what number 0?", "target": "thing 0", "task": "t"}
    assert rows[1]["query"]["rationale"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_wrong_request_stops_the_run_with_the_servers_sentence(tmp_path, capsys, status):
    file = write_rows(tmp_path, 40)
    with serving(lambda question, body: failure(status, "the model `m` does not exist")) as server:
        assert ask(server, file, "--concurrency", "4") == 1
        assert len(server.asked) <= 4
    assert "the model `m` does not exist; what was answered is kept" in capsys.readouterr().err
    assert [row["query"] for row in rows_of(tmp_path)] == [f"what number {index}?" for index in range(40)]


def test_nobody_there_and_no_such_api_are_said(tmp_path, capsys):
    file = write_rows(tmp_path, 3)
    with serving(right) as server:
        address = server.address
    assert rationales([str(file), "--out", str(tmp_path / "o.jsonl"), "--base-url", address, "--model", "m"]) == 1
    assert f"nobody answers at {address}" in capsys.readouterr().err
    with serving(lambda question, body: (200, {}, "a page")) as server:
        assert ask(server, file) == 1
    assert "is no OpenAI-compatible server" in capsys.readouterr().err


def test_a_server_without_structured_output_is_asked_without(tmp_path):
    file = write_rows(tmp_path)

    def respond(question: str, body: dict):
        if "response_format" in body:
            return failure(400, "response_format is not supported")
        return right(question, body)

    with serving(respond) as server:
        assert ask(server, file, "--concurrency", "1") == 0
    assert len(server.asked) == 7
    assert all(row["query"]["rationale"] for row in rows_of(tmp_path))


def test_too_many_requests_slow_all_tasks_down(tmp_path):
    file = write_rows(tmp_path, 60)
    numbers, all_at_once = itertools.count(), threading.Barrier(16)

    def respond(question: str, body: dict):
        number = next(numbers)
        if number < 16:
            all_at_once.wait(timeout=600)
            return failure(429, retry_after="0.05")
        if number == 16:
            server.most_at_once = 1
        time.sleep(0.005)
        return right(question, body)

    with serving(respond) as server:
        assert ask(server, file, "--concurrency", "16") == 0
    assert server.most_at_once <= 3  # one, and one more for fifty answers; one may be counted while it leaves
    assert all(row["query"]["rationale"] for row in rows_of(tmp_path))


def test_a_budget_holds_over_runs_and_what_is_not_asked_is_said(tmp_path, capsys):
    file = write_rows(tmp_path, 60)
    with serving(right) as server:
        price = ("--price", "10", "20", "--yes")  # an answer takes 100 tokens in and 50 out: 0.002
        assert ask(server, file, *price, "--budget", "0.05", "--concurrency", "2") == 0
        first = len(server.asked)
        assert 10 <= first <= 25
        told = capsys.readouterr().out
        assert f"{60 - first}  not asked: the budget is spent" in told
        assert ask(server, file, *price, "--budget", "0.05") == 0
        assert len(server.asked) <= 25
        assert ask(server, file, *price, "--budget", "1") == 0
        assert len(server.asked) == 60
    assert "6,000" not in told
    with pytest.raises(SystemExit):
        rationales([str(file), "--out", "x.jsonl", "--base-url", "http://a", "--model", "m", "--budget", "1"])
    assert "--budget needs --price" in capsys.readouterr().err


@pytest.mark.parametrize("finish_reason", ["length", "content_filter", "stop"])
def test_answers_that_are_not_taken_count_for_the_budget_of_later_runs(tmp_path, finish_reason):
    file = write_rows(tmp_path, 60)
    with serving(lambda question, body: completion("no answer", finish_reason)) as server:
        for _ in range(4):
            words = ("--price", "10", "20", "--yes", "--budget", "0.05", "--concurrency", "1")
            assert ask(server, file, *words) == 0
        assert 10 <= len(server.asked) <= 25  # 0.002 each


def test_nothing_is_asked_before_somebody_agrees_to_the_price(tmp_path, capsys, monkeypatch):
    file = write_rows(tmp_path)
    with serving(right) as server:
        assert ask(server, file, "--dry-run") == 0
        monkeypatch.setattr("sys.stdin", io.StringIO())
        with pytest.raises(ValueError, match="this costs money, and nobody is there to agree; say --yes, or --dry-run"):
            ask(server, file, "--price", "1", "2")
        assert server.asked == []
    assert not (tmp_path / "out.jsonl").exists()
    told = capsys.readouterr().out
    assert "tokens in and 1,200 out, before retries" in told
    assert " at 1 and 2 per million, before retries" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "pairs.jsonl"), "--out is the data themselves"),
        (("--out", "out.json"), "expected a file .jsonl"),
        (("--out", "nowhere/out.jsonl"), "which is no folder"),
        (("--base-url", "localhost:8000"), "expected an address such as http://localhost:8000/v1"),
        (("--concurrency", "0"), "--concurrency and --limit are at least 1"),
        (("--prise", "1"), "unknown argument '--prise'; did you mean '--price'?"),
    ],
)
def test_wrong_arguments_are_said_in_a_line(tmp_path, capsys, monkeypatch, words, message):
    file = write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    usual = {"--out": "out.jsonl", "--base-url": "http://127.0.0.1:1/v1", "--model": "m"} | dict([words])
    with pytest.raises(SystemExit):
        rationales([str(file.name), *(word for pair in usual.items() for word in pair)])
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_other_data_prompts_and_results_that_are_there_are_refused(tmp_path):
    file = write_rows(tmp_path)
    with serving(right) as server:
        (tmp_path / "p.yaml").write_text("birds: Which bird?")
        with pytest.raises(ValueError, match="names the task 'birds'; the data has t"):
            ask(server, file, "--prompts", str(tmp_path / "p.yaml"))
        (tmp_path / "p.yaml").write_text("t: Which number is it, and why?")
        assert ask(server, file, "--prompts", str(tmp_path / "p.yaml"), "--limit", "2") == 0
        assert len(server.asked) == 2
        assert server.bodies[0]["messages"][1]["content"].startswith("Which number is it, and why?\n\nwhat number")
        assert ask(server, file, "--prompts", str(tmp_path / "p.yaml")) == 0  # the same command goes on
        assert len(server.asked) == 6
        (tmp_path / "other.jsonl").touch()
        with pytest.raises(ValueError, match="exists, and no answers beside it"):
            ask(server, file, out="other.jsonl")
        (tmp_path / "other.jsonl").unlink()
        (tmp_path / "out.answers.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match=r"out\.answers\.jsonl:1 is no answer; move the file away"):
            ask(server, file)
        turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "<gen_emb>"}]
        file.write_text(json.dumps({"qry": {"conversations": turns}, "pos": {"conversations": turns}}))
        with pytest.raises(ValueError, match="is a row of UME-sft without a rationale"):
            ask(server, file, out="other.jsonl")


STEPS = ("The bird has a red back and tail.", "Its tail is deeply forked at the end.")


@pytest.mark.parametrize(
    ("steps", "answer", "reason"),
    [
        (STEPS, "a red kite", ""),
        (STEPS, "The Red Kite", ""),
        (STEPS, "a buzzard", "the answer is not the target"),
        (STEPS, "", "the answer is not the target"),
        (STEPS[:1], "red kite", "too few or too many steps"),
        (STEPS * 5, "red kite", "too few or too many steps"),
        (("It is red.", *STEPS), "red kite", "a step is too short or too long"),
        ((*STEPS, "word " * 41), "red kite", "a step is too short or too long"),
        ((STEPS[0],) * 4, "red kite", "repeats itself"),
        (("This must be a red kite I think.", STEPS[1]), "red kite", "gives the target away before the last step"),
        ((STEPS[0], "So this must be a red kite."), "red kite", ""),
        (("It is known as an airborne hunter.", "It forms part of the imagery of many tales."), "red kite", ""),
        (("In the image there is a bird.", STEPS[1]), "red kite", "speaks of the task instead of the content"),
        (("As an AI I see a bird here.", STEPS[1]), "red kite", "a refusal"),
        (("The <gen_emb> token is seen right here.", STEPS[1]), "red kite", "mentions a token of the model"),
        (("这只鸟的背部和尾巴都是红色的。", "它的尾巴分叉很深。"), "red kite", "another script than the input's"),
    ],
)
def test_why_an_answer_is_not_taken(steps, answer, reason):
    asked, goal = Side("Which bird is this, and where does it live?"), Side("a red kite")
    if not reason:
        check_answer(Answer(steps, answer), asked, goal)
        return
    with pytest.raises(RejectedError) as error:
        check_answer(Answer(steps, answer), asked, goal)
    assert str(error.value) == reason


def test_an_input_without_words_leaves_the_script_to_the_answer():
    steps = ("这只鸟的背部和尾巴都是红色的。", "它的尾巴分叉很深, 所以是赤鸢。")
    check_answer(Answer(steps, "赤鸢"), Side("", (Image.new("RGB", (8, 8)),)), Side("赤鸢"))


def test_a_long_target_is_given_away_by_most_of_its_words():
    goal = Side("The town of Ghent hosts an annual festival of light with forty installations along its canals")
    steps = ("Ghent hosts a festival of light, with forty installations along canals.", "So that is what to look for.")
    asked = Side("Where can one see art at night in Belgium?")
    with pytest.raises(RejectedError, match="gives the target away"):
        check_answer(Answer(steps, "Ghent"), asked, goal)
    check_answer(
        Answer(("A town in Belgium shows art at night.", "So it must be lit by many lamps."), "Ghent"), asked, goal
    )


@pytest.mark.parametrize("written", ["", "{", '{"steps": 3}', '{"steps": [1', "[]", '{"answer": "x"}', "{" * 5000])
def test_what_is_no_answer_is_said_to_be_none(written):
    with pytest.raises(RejectedError, match="no JSON with steps"):
        read_answer(written)


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr(batches_module, "POLL_S", 0.01)


@pytest.mark.usefixtures("quick_looks")
def test_batches_bring_the_same_rows_as_single_questions(tmp_path, capsys, monkeypatch):
    """Several files, since one holds two questions here; what is not taken is asked again with the reason."""
    monkeypatch.setattr(batches_module, "MOST_REQUESTS", 2)
    file = write_rows(tmp_path)

    def respond(question, body):
        is_again = len(body["messages"]) > 2
        return right(question, body) if is_again or "3" not in question else completion("no JSON here")

    with serving(respond) as server:
        assert ask(server, file, "--batch", "--price", "1", "2", "--yes") == 0
        assert len(server.batches) == 4  # three, and one for the question that is asked again
        assert server.bodies[-1]["messages"][-1]["content"].startswith("The last answer was not taken: no JSON")
        assert server.times() == {f"what number {n}?": 2 if n == 3 else 1 for n in range(6)}
        one_by_one = ask(server, file, out="single.jsonl")
    assert one_by_one == 0
    assert rows_of(tmp_path) == rows_of(tmp_path, "single.jsonl")
    told = capsys.readouterr().out
    assert "batch batch-0 with 2 questions is handed in; the same command waits for it again" in told
    assert "7 answers this time, 700 tokens in and 350 out" in told
    assert not (tmp_path / "out.batches.json").exists()


def test_a_command_that_is_stopped_while_batches_are_under_way_waits_for_them_again(tmp_path):
    file = write_rows(tmp_path)
    with serving(right) as server:
        server.is_holding = True
        words = ["rationales", file, "--out", tmp_path / "out.jsonl", "--base-url", server.address, "--model", "m"]
        pending = tmp_path / "out.batches.json"
        with started([sys.executable, "-m", "plume_train", *words, "--batch"]) as process:
            while not pending.exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.kill()
            process.wait()
        with pytest.raises(ValueError, match="6 questions about these rows are under way in batches; say --batch"):
            ask(server, file)
        server.is_holding = False
        assert ask(server, file, "--batch", "--limit", "1") == 0  # what is under way is not counted
        assert len(server.batches) == 1
    assert all("rationale" in row["query"] for row in rows_of(tmp_path))


@pytest.mark.usefixtures("quick_looks")
def test_what_a_batch_leaves_unanswered_or_refuses_is_told(tmp_path, capsys):
    file = write_rows(tmp_path)

    def respond(question, body):
        return failure(400, "bad words") if "1" in question else right(question, body)

    with serving(respond) as server:
        server.unanswered = {"what number 4?"}
        assert ask(server, file, "--batch") == 0
        told = capsys.readouterr().out
        assert "4 rationales written, 1 side left without" in told
        assert "the server refuses the question" in told
        assert "not answered in its batch; asked again next time" in told
        server.unanswered = set()
        assert ask(server, file, "--batch") == 0
        assert server.times()["what number 4?"] == 2
        assert server.times()["what number 1?"] == 1
    assert sum("rationale" in str(row["query"]) for row in rows_of(tmp_path)) == 5


@pytest.mark.usefixtures("quick_looks")
def test_a_batch_of_which_every_question_fails_ends_the_run_and_keeps_no_verdict(tmp_path, capsys):
    file = write_rows(tmp_path)
    with serving(lambda question, body: failure(404, "there is no model m")) as server:
        assert ask(server, file, "--batch") == 1
    assert "batch batch-0: there is no model m; what was answered is kept" in capsys.readouterr().err
    with serving(right) as server:
        assert ask(server, file, "--batch") == 0
    assert all("rationale" in row["query"] for row in rows_of(tmp_path))


@pytest.mark.usefixtures("quick_looks")
def test_a_batch_of_refusals_is_due_to_its_questions_once_others_were_answered(tmp_path, capsys):
    """The one question that is asked again is refused; and so it is when the command is started anew."""
    file = write_rows(tmp_path)

    def respond(question, body):
        if "3" not in question:
            return right(question, body)
        return failure(400, "bad words") if len(body["messages"]) > 2 else completion("no JSON here")

    with serving(respond) as server:
        assert ask(server, file, "--batch") == 0
        assert "the server refuses the question" in capsys.readouterr().out
        assert ask(server, file, "--batch") == 0
        assert server.times()["what number 3?"] == 2
    entries = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    (refused,) = [entry for entry in entries if entry.get("reason")]
    assert (refused["tries"], refused["tokens"]) == (2, [100, 50])  # what the first answer cost


@pytest.mark.usefixtures("quick_looks")
def test_batches_of_other_questions_are_left_to_whoever_handed_them_in(tmp_path, capsys):
    file = write_rows(tmp_path)
    (tmp_path / "prompts.yaml").write_text("t: Which number is it?")
    with serving(right) as server:
        state = {"id": "batch-other", "cost": 0.0, "keys": ["another"]}
        pending = tmp_path / "out.batches.json"
        pending.write_text(json.dumps({"batches": [state], "rejected": {}}))
        assert ask(server, file, "--batch") == 0
        assert "1 question in out.batches.json left to the command that handed them in" in capsys.readouterr().out
        assert json.loads(pending.read_text())["batches"] == [state]
        assert "batch-other" not in server.batches  # nor was it looked at
    assert all("rationale" in row["query"] for row in rows_of(tmp_path))


@pytest.mark.usefixtures("quick_looks")
def test_replies_of_servers_that_are_not_openai_s_own_are_read_in_batches_too(tmp_path):
    def respond(question, body):
        status, headers, reply = right(question, body)
        del reply["created"], reply["id"]
        reply["choices"][0]["finish_reason"] = "eos"
        return status, headers, reply

    with serving(respond) as server:
        assert ask(server, write_rows(tmp_path), "--batch") == 0
    assert all("rationale" in row["query"] for row in rows_of(tmp_path))


@pytest.mark.usefixtures("quick_looks")
def test_a_batch_that_expired_whole_is_asked_again_next_time(tmp_path, capsys):
    file = write_rows(tmp_path)
    with serving(right) as server:
        server.unanswered = {f"what number {n}?" for n in range(6)}
        assert ask(server, file, "--batch") == 0
        assert "6  not answered in its batch; asked again next time" in capsys.readouterr().out
        server.unanswered = set()
        assert ask(server, file, "--batch") == 0
    assert all("rationale" in row["query"] for row in rows_of(tmp_path))


@pytest.mark.usefixtures("quick_looks")
def test_what_rejected_answers_of_a_stopped_command_cost_counts_for_the_budget(tmp_path, capsys):
    file = write_rows(tmp_path, count=1)
    with serving(right) as server:
        rejected = {"some key": {"reason": "no JSON", "tries": 1, "tokens": [500, 500]}}
        (tmp_path / "out.batches.json").write_text(json.dumps({"batches": [], "rejected": rejected}))
        assert ask(server, file, "--batch", "--price", "1000", "1000", "--budget", "1.2", "--yes") == 0
        assert server.asked == []
    assert "not asked: the budget is spent" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_looks")
def test_a_batch_goes_on_without_structured_output_where_the_server_has_none(tmp_path):
    def respond(question, body):
        return failure(400, "unknown field response_format") if "response_format" in body else right(question, body)

    with serving(respond) as server:
        assert ask(server, write_rows(tmp_path), "--batch") == 0
    assert all("rationale" in row["query"] for row in rows_of(tmp_path))


@pytest.mark.usefixtures("quick_looks")
def test_batches_keep_to_the_budget(tmp_path, capsys):
    file = write_rows(tmp_path)
    with serving(right) as server:
        # About 430 tokens each: two fit.
        assert ask(server, file, "--batch", "--price", "1000", "1000", "--budget", "1.0", "--yes") == 0
        assert len(server.asked) == 2
    assert "not asked: the budget is spent" in capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("--batch",)])
@pytest.mark.usefixtures("quick_looks")
def test_an_answer_must_find_a_longer_target_by_an_embedder_where_one_is_given(
    tmp_path, monkeypatch, plume_folder, words
):
    """An embedder that counts words: the second answer speaks of another row's target."""
    texts = [
        "a red kite high over the wide grey sea of June",
        "five blue birds in a small round cage",
        "the slow rain of a long night in a cold March",
    ]
    names = sorted({word for text in texts for word in text.split()})

    def embed(name, inputs):
        counts = np.array([[text.split().count(word) for word in names] for text in inputs], dtype=np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-6)

    opened = []
    monkeypatch.setattr(finds_module, "open_embedder", lambda model: (opened.append(model) or embed, {}))
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"query": f"what number {n}?", "target": text, "task": "t"}) + "\n"
                            for n, text in enumerate(texts)))  # fmt: skip

    def respond(question, body):
        said = {"0": "kite over sea", "1": "rain of night", "2": "rain of night"}[question.split()[-1].rstrip("?")]
        return completion(answer_for(said))

    with serving(respond) as server:
        assert ask(server, file, "--check-with", "any", *words) == 0
        assert server.times() == {"what number 0?": 1, "what number 1?": 3, "what number 2?": 1}
    assert opened == ["any"]
    assert ["rationale" in str(row["query"]) for row in rows_of(tmp_path)] == [True, False, True]
    monkeypatch.undo()
    with serving(respond) as server:  # a checkpoint as the embedder
        assert ask(server, file, "--check-with", str(plume_folder), out="other.jsonl") == 0
