"""Several runs of one program side by side, each stopped where it needs to know what the others have.

A run is a function in a thread of its own, but one at a time runs: from where it asked (`Meeting.ask`) to where it asks
next. When all have asked or ended, the questions with the same subject are answered together. What comes out does not
depend on timing.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

MOST_THREADS = 256  # of torch, together: OpenMP gives each thread that calls it a team of its own


class _Abandoned(BaseException):
    """Another run failed. No Exception: nothing on the way should handle it."""


class _Run(threading.Thread):
    def __init__(self, function: Callable[[], Any]):
        super().__init__(daemon=True)
        self.function = function
        self.turn, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.question: tuple[Hashable, Any] | None = None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.abandoned = False
        self.modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(self) -> None:
        grad, inference = self.modes  # they belong to a thread
        self.turn.acquire()
        try:
            if not self.abandoned:
                with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                    self.function()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.question = None
            self.waits.release()

    def go_on(self) -> None:
        """Until it asks or ends."""
        self.question = None
        self.turn.release()
        self.waits.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        self.abandoned = True
        self.turn.release()
        self.join()


class Meeting:
    """Answers what runs ask, once all of them have asked or ended.

    settle: from a subject and what each of the runs that ask about it brings, in their order, to the answer.
    """

    def __init__(self, settle: Callable[[Hashable, list[Any]], Any]):
        self.settle = settle

    def run(self, functions: Sequence[Callable[[], Any]]) -> None:
        """Runs all `functions` to their ends. If one fails, the others are given up and its error is raised."""
        running = [_Run(function) for function in functions]
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, min(threads, MOST_THREADS // max(len(running), 1))))
        try:
            for run in running:
                run.start()
            while running:
                for run in running:
                    run.go_on()
                running = [run for run in running if run.question is not None]
                subjects: dict[Hashable, list[_Run]] = {}
                for run in running:
                    subjects.setdefault(run.question[0], []).append(run)
                for subject, asking in subjects.items():
                    answer = self.settle(subject, [run.question[1] for run in asking])
                    for run in asking:
                        run.answer = answer
        finally:
            for run in running:
                if run.is_alive():
                    run.abandon()
            torch.set_num_threads(threads)

    def ask(self, subject: Hashable, value: Any) -> Any:
        """From inside a run: brings `value`, waits for the others, and gives the answer."""
        run = threading.current_thread()
        run.question = subject, value
        run.waits.release()
        run.turn.acquire()
        if run.abandoned:
            raise _Abandoned
        return run.answer
