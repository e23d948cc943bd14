"""Runs side by side: questions are answered together, nothing depends on timing, and nobody is left waiting."""

import threading
import time

import pytest
import torch

from qkernels.core import lockstep
from qkernels.core.lockstep import Meeting


def test_all_runs_get_one_answer_to_what_all_of_them_brought():
    meeting = Meeting(lambda subject, values: (subject, sum(values)))
    found = {}

    def run(n):
        time.sleep(0.01 * (3 - n))
        found[n] = [meeting.ask("first", n), meeting.ask("second", 10 * n)]

    meeting.run([lambda n=n: run(n) for n in range(3)])
    assert found == {n: [("first", 3), ("second", 30)] for n in range(3)}


def test_one_run_at_a_time_in_their_order():
    order = []
    meeting = Meeting(lambda subject, values: order.append(values))

    def run(n):
        order.append(n)
        meeting.ask("here", n)
        order.append(n)

    meeting.run([lambda n=n: run(n) for n in range(3)])
    assert order == [0, 1, 2, [0, 1, 2], 0, 1, 2]


def test_runs_that_ask_about_other_things_or_end_are_not_waited_for():
    meeting = Meeting(lambda subject, values: values)
    found = []
    meeting.run(
        [
            lambda: found.append(meeting.ask("a", 1)),
            lambda: None,
            lambda: (found.append(meeting.ask("b", 2)), found.append(meeting.ask("a", 3))),
        ]
    )
    assert found == [[1], [2], [3]]


@pytest.mark.parametrize("where", ["run", "settle"])
def test_an_error_ends_all_runs_and_is_the_callers(where):
    before = threading.active_count()
    cleaned = []

    def settle(subject, values):
        if where == "settle":
            raise KeyboardInterrupt("stop")

    meeting = Meeting(settle)

    def waits():
        try:
            meeting.ask("here", 0)
        finally:
            cleaned.append(True)

    def fails():
        meeting.ask("here", 0)
        raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        meeting.run([fails, waits, waits])
    assert cleaned == [True, True]
    assert threading.active_count() == before


def test_a_run_that_cannot_start_leaves_no_other_waiting(monkeypatch):
    before, start = threading.active_count(), threading.Thread.start

    def start_two(thread):
        if threading.active_count() == before + 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Meeting(max).run([lambda: None] * 3)
    assert threading.active_count() == before


def test_many_runs_share_the_threads_that_there_may_be(monkeypatch):
    monkeypatch.setattr(lockstep, "MOST_THREADS", 8)
    seen, threads = [], torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for count in (1, 2, 4, 100):
            Meeting(max).run([lambda: seen.append(torch.get_num_threads())] * count)
        assert seen == [4] + [4] * 2 + [2] * 4 + [1] * 100
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("inference", [True, False])
def test_runs_are_in_the_modes_of_the_caller(inference):
    seen = []
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        Meeting(max).run([lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))])
    assert seen == [(inference, False)]
