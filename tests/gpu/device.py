"""The device that is checked: how tensors get there, and its streams, graphs and clock. Everything that a case asks of
it goes through this module, so that tests can put the CPU in its place (cpu_device.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "cuda"


def on(value: Any) -> Any:
    """`value` with every tensor in it, also of lists and tuples, on the device."""
    if isinstance(value, list | tuple):
        return type(value)(on(v) for v in value)
    return value.to(NAME) if isinstance(value, Tensor) else value


def equal(got: Tensor, expected: Tensor) -> None:
    """Raises unless the bits of a result agree with those that are expected; NaN equals NaN."""
    got, expected = got.cpu(), expected.cpu()
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), f"{got.dtype} {got.shape}"
    differs = got != expected
    if expected.is_floating_point():
        differs &= ~(got.isnan() & expected.isnan())
    if differs.any():
        where = differs.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(differs.sum())} of {expected.numel()} values differ, the first at {where}: "
            f"{got[tuple(where)].item()} instead of {expected[tuple(where)].item()}"
        )


def all_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        try:
            equal(one, other)
        except AssertionError as error:
            raise AssertionError(f"tensor {number} of {len(expected)}: {error}") from None


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in `value`, also of lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, list | tuple) else []


def synchronize() -> None:
    torch.cuda.synchronize()


def streams(count: int) -> list[Any]:
    return [torch.cuda.Stream() for _ in range(count)]


def stream(which: Any) -> AbstractContextManager:
    """Inside, what is launched goes to that stream."""
    return torch.cuda.stream(which)


def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], list[Tensor]]:
    """A graph of `step`, which has run before: what replays it, and the tensors that `step` returned while captured."""
    [side] = streams(1)
    side.wait_stream(torch.cuda.current_stream())
    with stream(side):  # warm up, as torch asks
        step()
    torch.cuda.current_stream().wait_stream(side)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph.replay, tensors(captured)


def elapsed(run: Callable[[], Any]) -> float:
    """Seconds between two events of the device, before and behind `run`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@contextmanager
def cudnn(**settings: bool) -> Iterator[None]:
    """Inside, torch.backends.cudnn has these settings besides its own."""
    before = {name: getattr(torch.backends.cudnn, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(torch.backends.cudnn, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)
