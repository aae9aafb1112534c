"""The queue: order, budgets, turns, and what happens when something fails."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch

from plume.inputs.item import Item
from plume.serving.batcher import Batcher, BrokenVectorError, Entry, FatalError, How, QueueFullError


class Model:
    """Encodes a text `n` as the n-th unit vector; keeps what it was given, and waits while it is held."""

    def __init__(self):
        self.batches: list[tuple[list[str], How]] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.is_running = threading.Event()
        self.fail = lambda texts: None

    def __call__(self, items, how):
        texts = [item.text for item in items]
        self.batches.append((texts, how))
        self.is_running.set()
        assert self.may_run.wait(30)
        self.fail(texts)
        return np.eye(1000, dtype=np.float32)[[int(text) for text in texts]]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def queue(model):
    made = []

    def make(**settings):
        made.append(Batcher(model, **settings))
        return made[-1]

    yield make
    model.may_run.set()
    for batcher in made:
        batcher.close(30)


def entries(numbers, tokens=1, **how):
    return [Entry(Item((str(number),)), tokens, How(**how)) for number in numbers]


def held(batcher, model):
    """A job of one input that keeps the thread busy, so that what comes next waits."""
    model.may_run.clear()
    model.is_running.clear()
    first = batcher.submit("first", entries([999]))
    assert model.is_running.wait(30)
    return first


def places(*jobs):
    return [int(vector.argmax()) for job in jobs for vector in job.future.result(30)]


def test_every_input_gets_its_vector(queue, model):
    batcher = queue(max_batch_size=3)
    assert places(batcher.submit("a", entries(range(20)))) == list(range(20))
    assert max(len(texts) for texts, _ in model.batches) <= 3
    assert batcher.queue_tokens == batcher.queue_inputs == 0


def test_a_batch_keeps_to_its_tokens_with_padding_and_shares_its_k(queue, model):
    batcher = queue(max_batch_tokens=10)
    first = held(batcher, model)
    some = [*entries([1, 2], 2), *entries([3], 8), *entries([4], 50), *entries([5, 6], 1, num_latent_steps=0)]
    job = batcher.submit("a", some)
    model.may_run.set()
    assert places(first, job) == [999, 1, 2, 3, 4, 5, 6]
    assert [texts for texts, _ in model.batches] == [["999"], ["1", "2"], ["3"], ["4"], ["5", "6"]]
    assert model.batches[-1][1].num_latent_steps == 0


def test_connections_take_turns(queue, model):
    batcher = queue(max_batch_size=4)
    held(batcher, model)
    many = batcher.submit("many", entries(range(100)))
    few = batcher.submit("few", entries([200]))
    other = batcher.submit("other K", entries([300, 301], num_latent_steps=1))
    model.may_run.set()
    assert places(many, few, other) == [*range(100), 200, 300, 301]
    order = [texts for texts, _ in model.batches[1:]]
    assert "200" in order[0]
    assert any("300" in texts for texts in order[:3])


def test_newcomers_do_not_wait_behind_everybody(queue, model):
    batcher = queue(max_batch_size=8)
    held(batcher, model)
    crowd = [batcher.submit(number, entries([number] * 20)) for number in range(40)]
    newcomer = batcher.submit("newcomer", entries([900]))
    model.may_run.set()
    assert places(newcomer) == [900]
    at = next(index for index, (texts, _) in enumerate(model.batches) if "900" in texts)
    assert at <= 1 + 41 * 2 // 8 + 1  # once every connection has had its turn, of a quarter of a batch
    places(*crowd)


def test_a_short_request_ends_with_its_turn_and_not_with_the_round(queue, model):
    """Were each connection to have one input in a batch, all of them would end together, and the queue be empty."""
    batcher = queue(max_batch_size=8)
    held(batcher, model)
    jobs = [batcher.submit(number, entries([10 * number, 10 * number + 1])) for number in range(8)]
    model.may_run.set()
    places(*jobs)
    assert [set(texts) for texts, _ in model.batches[1:]] == [
        {str(10 * number + place) for number in (first, first + 1, first + 2, first + 3) for place in (0, 1)}
        for first in (0, 4)
    ]


def test_inputs_of_like_length_share_a_batch(queue, model):
    batcher = queue(max_batch_size=4)
    held(batcher, model)
    jobs = [batcher.submit(number, entries([number], 900 if number % 2 else 10)) for number in range(8)]
    model.may_run.set()
    places(*jobs)
    assert [texts for texts, _ in model.batches[1:]] == [["0", "2", "4", "6"], ["1", "3", "5", "7"]]


def test_a_batch_is_not_filled_with_padding(queue, model):
    """Neither does a long input pad those that are short, nor they it; nor do many, each a little."""
    batcher = queue(max_batch_size=16)
    held(batcher, model)
    short = batcher.submit("short", entries(range(4), 10))
    long = batcher.submit("long", entries([100], 5_000))
    few = batcher.submit("few", entries([200, 201], 40))
    model.may_run.set()
    places(short, long, few)
    assert [set(texts) for texts, _ in model.batches[1:]] == [{"0", "1", "2", "3", "200", "201"}, {"100"}]

    held(batcher, model)
    del model.batches[:]
    head, crowd = batcher.submit("head", entries([0], 1_100)), batcher.submit("crowd", entries([1, 2, 3, 4], 100))
    model.may_run.set()
    places(head, crowd)
    assert [set(texts) for texts, _ in model.batches] == [{"0", "1"}, {"2", "3", "4"}]


@pytest.mark.parametrize(
    ("flood", "newcomer", "connections"),
    [(1, 1, 1), (20, 25, 1), (400, 10, 1), (5_000, 10, 1), (20_000, 10, 1), (20_000, 20_000, 1), (20_000, 10, 5)],
)
def test_a_newcomer_leads_a_batch_after_those_before_it_at_the_latest(queue, model, flood, newcomer, connections):
    batcher = queue(max_queue_tokens=10**9)
    held(batcher, model)
    jobs = [batcher.submit(number, entries([number] * 60, flood)) for number in range(connections)]
    late = batcher.submit("late", entries([900], newcomer))
    model.may_run.set()
    places(late)
    at = next(index for index, (texts, _) in enumerate(model.batches[1:], start=1) if "900" in texts)
    assert at <= (1 if flood <= 400 else 1 + connections)  # beside inputs that it is not too unlike it comes at once
    for job in jobs:
        batcher.drop(job)


def test_mixed_lengths_of_one_connection_keep_their_turns(queue, model):
    """Inputs of every length from one connection are passed over and led on, and nothing is encoded twice or lost."""
    batcher = queue(max_batch_size=8, max_queue_tokens=10**9)
    held(batcher, model)
    lengths = [10, 900, 10, 10, 4_000, 900, 30, 10] * 6
    mixed = [Entry(Item((str(number),)), length, How()) for number, length in enumerate(lengths)]
    first = batcher.submit("mixed", mixed)
    others = [batcher.submit(f"other {number}", entries([500 + number] * 3, 35)) for number in range(3)]
    model.may_run.set()
    assert places(first, *others) == [*range(48), *[500] * 3, *[501] * 3, *[502] * 3]
    texts = [text for batch, _ in model.batches[1:] for text in batch]
    assert len(texts) == 57
    at = [index for index, (batch, _) in enumerate(model.batches) if "500" in batch or "501" in batch or "502" in batch]
    assert max(at) <= 9  # each of the four leads at least every fourth batch, and three inputs are one or two
    assert batcher.queue_tokens == batcher.queue_inputs == 0


def test_what_is_passed_over_stays_before_what_comes_later(queue, model):
    batcher = queue(max_batch_size=24, max_queue_tokens=10**9)
    held(batcher, model)
    lengths = [10, 5_000, 5_000, *[10] * 60]
    job = batcher.submit("a", [Entry(Item((str(number),)), length, How()) for number, length in enumerate(lengths)])
    model.may_run.set()
    places(job)
    assert [batch for batch, _ in model.batches[1:]][:2] == [["0", *map(str, range(3, 26))], ["1", "2"]]


def test_two_inputs_of_which_one_would_pad_the_other_are_two_batches(queue, model):
    batcher = queue()
    held(batcher, model)
    jobs = [batcher.submit(name, entries([number], length)) for number, (name, length) in
            enumerate({"short": 10, "long": 5_000, "as long": 5_900}.items())]  # fmt: skip
    model.may_run.set()
    places(*jobs)
    assert [batch for batch, _ in model.batches[1:]] == [["0"], ["1", "2"]]


def test_inputs_are_offered_once_and_those_of_a_begun_turn_first(queue, model):
    batcher = queue(max_batch_size=16)  # of which a turn is four
    held(batcher, model)
    batcher.submit("a", entries(range(10)))
    batcher.submit("b", entries(range(100, 110)))
    batcher._waiting["a"].num_taken = 3
    coming = [(turn, int(place.entry.item.text)) for turn, place in batcher._coming(32)]
    assert coming == [
        *[(0, 0), (0, 100), (0, 101), (0, 102), (0, 103)],
        *[(1, number) for number in (1, 2, 3, 4, 104, 105, 106, 107)],
        *[(2, number) for number in (5, 6, 7, 8, 108, 109)],
        (3, 9),
    ]


def test_whoever_is_passed_over_comes_first_at_last(queue, model):
    """An input unlike all others has its turn while others never end."""
    batcher = queue(max_batch_size=4)
    held(batcher, model)
    crowd = [batcher.submit(number, entries(range(10 * number, 10 * number + 10), 10)) for number in range(4)]
    alone = batcher.submit("alone", entries([900], 5_000))
    model.may_run.set()
    assert places(alone) == [900]
    places(*crowd)
    at = next(index for index, (texts, _) in enumerate(model.batches) if "900" in texts)
    assert at <= 1 + 4  # every other connection has had its turn of one
    assert batcher.queue_tokens == batcher.queue_inputs == 0


def test_a_full_queue_takes_all_of_a_request_or_nothing(queue, model):
    batcher = queue(max_queue_tokens=10)
    held(batcher, model)
    job = batcher.submit("a", entries(range(4), 1))
    for connection, tokens in (("b", 7), ("a", 2)):  # more than the queue holds; more than half of it for one
        with pytest.raises(QueueFullError) as error:
            batcher.submit(connection, entries([5], tokens))
        assert 1 <= error.value.seconds <= 60
    with pytest.raises(QueueFullError) as error:
        batcher.submit("b", entries(range(6), 1))  # it would be refused at any time
    assert error.value.seconds is None
    assert batcher.queue_inputs == 4
    model.may_run.set()
    assert places(job) == [0, 1, 2, 3]
    assert places(batcher.submit("b", entries([5], 99))) == [5]  # one input alone, where nothing waits


def test_clients_that_have_gone_leave_the_queue(queue, model):
    batcher = queue()
    first = held(batcher, model)
    gone, stays = batcher.submit("gone", entries(range(5), 2)), batcher.submit("stays", entries([7], 3))
    assert batcher.drop(gone) == 5
    assert batcher.queue_tokens == 3
    assert batcher.drop(first) == 0  # has been begun
    model.may_run.set()
    assert places(stays) == [7]
    for job in (first, gone):
        with pytest.raises(CancelledError):
            job.future.result(30)
    assert [texts for texts, _ in model.batches] == [["999"], ["7"]]


def test_a_poisoned_input_fails_alone(queue, model):
    def fail(texts):
        if "3" in texts:
            raise ValueError("poison")

    model.fail = fail
    batcher = queue()
    first = held(batcher, model)
    job, other = batcher.submit("a", entries(range(8))), batcher.submit("b", entries([3, 9]))
    model.may_run.set()
    assert places(first) == [999]
    for one, numbers in ((job, range(8)), (other, (3, 9))):
        for number, result in zip(numbers, one.future.result(30), strict=True):
            if number == 3:
                assert isinstance(result, ValueError)
                assert str(result) == "poison"
            else:
                assert result.argmax() == number


def test_memory_that_is_short_halves_the_batches(queue, model):
    def fail(texts):
        if len(texts) > 2:
            raise torch.OutOfMemoryError("no memory")

    model.fail = fail
    batcher = queue(max_batch_tokens=64)
    held(batcher, model)
    job = batcher.submit("a", entries(range(8)))
    model.may_run.set()
    assert places(job) == list(range(8))
    assert batcher.max_batch_tokens < 64


def test_an_input_that_takes_all_memory_does_not_make_batches_small_for_good(queue, model):
    def fail(texts):
        if "7" in texts:
            raise torch.OutOfMemoryError("no memory")

    model.fail = fail
    batcher = queue(max_batch_tokens=64)
    for _ in range(4):
        held(batcher, model)
        job = batcher.submit("a", entries([0, 1, 7]))
        model.may_run.set()
        *vectors, error = job.future.result(30)
        assert [vector.argmax() for vector in vectors] == [0, 1]
        assert isinstance(error, torch.OutOfMemoryError)
    assert batcher.max_batch_tokens >= 4
    for _ in range(80):
        places(batcher.submit("a", entries([3])))
    assert batcher.max_batch_tokens == 64


def test_what_is_no_unit_vector_is_not_handed_out(queue, model):
    batcher = queue()
    batcher._encode = lambda items, how: np.array([[0.0, 0.0], [np.nan, 1.0], [1.0, 0.0]])[: len(items)]
    *broken, whole = batcher.submit("a", entries(range(3))).future.result(30)
    assert all(isinstance(error, BrokenVectorError) for error in broken)
    assert whole.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("what", ["half a batch", "another number of vectors", "something else"])
def test_nobody_waits_for_ever_whatever_fails(model, what):
    """A device that is lost while halves are encoded, or a thread that ends for any other reason."""

    def fail(texts):
        if what == "half a batch" and "2" in texts:
            raise RuntimeError("CUDA error: lost" if len(texts) < 6 else "an input")
        if what == "something else" and "2" in texts:
            raise SystemExit

    model.fail = fail
    stopped = threading.Event()
    batcher = Batcher(model, stop=stopped.set)
    if what == "another number of vectors":
        batcher._encode = lambda items, how: np.eye(4)[: len(items) - 1]
        (error,) = batcher.submit("a", entries([1])).future.result(30)
        assert isinstance(error, BrokenVectorError)
        batcher.close(30)
        return
    first = held(batcher, model)
    whole = batcher.submit("whole", entries([7, 8])) if what == "half a batch" else None  # the half that goes well
    some, later = batcher.submit("a", entries([1, 2, 3, 4])), batcher.submit("b", entries([5], num_latent_steps=1))
    model.may_run.set()
    assert places(first) == [999]
    for job in (some, later):
        assert isinstance(job.future.result(30)[-1], FatalError)
    if whole is not None:
        assert places(whole) == [7, 8]
    assert stopped.wait(30)
    with pytest.raises(FatalError):
        batcher.submit("c", entries([6]))
    batcher.close(30)


def test_a_job_without_inputs_is_refused(queue):
    with pytest.raises(ValueError, match="no input"):
        queue().submit("a", [])


def test_a_queue_that_breaks_leaves_nobody_waiting(queue, model):
    stopped = threading.Event()
    batcher = queue(stop=stopped.set)
    first = held(batcher, model)
    batcher._coming = None
    job = batcher.submit("a", entries([1]))
    model.may_run.set()
    assert places(first) == [999]
    assert isinstance(job.future.result(30)[0], FatalError)
    assert stopped.wait(30)


def test_nothing_is_taken_once_it_is_closed(model):
    batcher = Batcher(model)
    batcher.close(30)
    with pytest.raises(FatalError):
        batcher.submit("a", entries([1]))


def test_a_lost_device_fails_what_waits_and_stops_the_server(model):
    def fail(texts):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stopped = threading.Event()
    model.fail = fail
    batcher = Batcher(model, stop=stopped.set)
    first = held(batcher, model)
    job = batcher.submit("a", entries(range(3)))
    model.may_run.set()
    for error in (*first.future.result(30), *job.future.result(30)):
        assert isinstance(error, FatalError)
    assert stopped.wait(30)
    batcher.close(30)
    assert not batcher.is_alive


def test_what_waits_is_encoded_before_the_end(queue, model):
    batcher = queue(max_batch_size=1)
    held(batcher, model)
    job = batcher.submit("a", entries(range(4)))
    closing = threading.Thread(target=batcher.close)
    closing.start()
    assert batcher.busy_seconds() > 0
    model.may_run.set()
    closing.join(30)
    assert places(job) == [0, 1, 2, 3]
    assert not batcher.is_alive


def test_many_threads_get_their_own_vectors(queue, model):
    batcher = queue(max_batch_size=7)
    found: dict[int, list[int]] = {}

    def client(number):
        some = entries(range(number * 30, number * 30 + 30), num_latent_steps=number % 2)
        jobs = []
        for start in range(0, 30, 10):
            jobs.append(batcher.submit(number, some[start : start + 10]))
            time.sleep(0)
        found[number] = places(*jobs)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    assert found == {number: list(range(number * 30, number * 30 + 30)) for number in range(8)}
    assert all(len(texts) <= 7 for texts, _ in model.batches)
