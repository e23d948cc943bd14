"""Stands in for the GPU: what device.py offers, on the CPU. It shows that the cases are sound, no more."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import device
import torch
from torch import Tensor

NAME = "cpu"


def synchronize() -> None:
    pass


def streams(count: int) -> list[None]:
    return [None] * count


def stream(which: None) -> AbstractContextManager:
    return nullcontext()


def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], list[Tensor]]:
    """A replay runs `step` again, and writes what it gives where the captured tensors are."""
    captured = device.tensors(step())

    def replay() -> None:
        results = device.tensors(step())
        with torch.no_grad():
            for old, new in zip(captured, results, strict=True):
                old.copy_(new)

    return replay, captured


def elapsed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


OFFERS = {
    "NAME": NAME,
    "synchronize": synchronize,
    "streams": streams,
    "stream": stream,
    "capture": capture,
    "elapsed": elapsed,
}
