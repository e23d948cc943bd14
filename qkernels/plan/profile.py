"""Where the time of a plan goes: every step with its time, work and traffic, as a table and as a timeline."""

import html
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkernels import ops
from qkernels.core.files import file_path, write_atomically
from qkernels.errors import InvalidArgument, integer
from qkernels.ops.epilogue import Epilogue
from qkernels.ops.machine import active_isa
from qkernels.ops.plan import NativePlan
from qkernels.report.picture import check_picture, new_figure

_WARM_UP = 3


@dataclass(frozen=True)
class StepTime:
    """One step: `bytes` counts what it reads and writes, weights included.

    images: of a slice, if the step runs on slices of the batch; 0: on all images at once.
    """

    name: str
    kind: str
    kernel: str
    inputs: tuple[str, ...]
    output: str
    microseconds: float
    macs: int
    bytes: int
    images: int = 0

    @property
    def gmacs(self) -> float:
        """Billions of multiplications and additions a second."""
        return self.macs / self.microseconds / 1e3 if self.microseconds else 0.0

    @property
    def gigabytes_a_second(self) -> float:
        return self.bytes / self.microseconds / 1e3 if self.microseconds else 0.0


@dataclass(frozen=True)
class Profile:
    """The steps of a plan in order, and what the machine can do.

    call_microseconds: a whole call, Python included, without timers between the steps.
    peak_gmacs: the rate of a large matrix product that stays in the cache, under the same instruction set and threads.
    """

    steps: tuple[StepTime, ...]
    call_microseconds: float
    peak_gmacs: float
    isa: str
    threads: int
    arena_bytes: int

    @property
    def microseconds(self) -> float:
        return sum(step.microseconds for step in self.steps)

    def worst(self, count: int = 10) -> list[StepTime]:
        """The steps that lose most time against their work at peak rate."""
        count = integer("worst: count", count, 0)
        return sorted(self.steps, key=lambda s: s.macs / self.peak_gmacs / 1e3 - s.microseconds)[:count]

    def of_peak(self, step: StepTime) -> float:
        return step.gmacs / self.peak_gmacs

    def __str__(self) -> str:
        width = max([20, *(len(step.name) for step in self.steps)])
        total = self.microseconds or 1.0
        lines = [
            f"{'layer':{width}s} {'step':18s} {'output':26s} {'us':>9s} {'%':>5s} {'MMAC':>8s} {'peak %':>7s} "
            f"{'KiB':>8s} {'GB/s':>6s}  kernel"
        ]
        for s in self.steps:
            peak = f"{100 * self.of_peak(s):7.1f}" if s.macs else f"{'':7s}"
            lines.append(
                f"{s.name:{width}s} {s.kind:18s} {s.output:26s} {s.microseconds:9.1f} "
                f"{100 * s.microseconds / total:5.1f} {s.macs / 1e6:8.2f} {peak} {s.bytes / 1024:8.0f} "
                f"{s.gigabytes_a_second:6.1f}  {kernel_and_slice(s.kernel, s.images)}"
            )
        macs = sum(s.macs for s in self.steps)
        plural = "" if self.threads == 1 else "s"
        lines.append(
            f"{len(self.steps)} steps, {self.microseconds:.0f} us; a call takes {self.call_microseconds:.0f} us; "
            f"{macs / 1e6:.0f} MMAC at {100 * macs / self.call_microseconds / 1e3 / self.peak_gmacs:.0f} % of "
            f"{self.peak_gmacs:.0f} GMAC/s, the rate of a large matrix product ({self.isa}, {self.threads} "
            f"thread{plural}); arena {self.arena_bytes / 1024:.0f} KiB"
        )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """Draws the timeline: `path` ends in .html (needs nothing) or in a format of matplotlib, such as .png.

        Raises:
            InvalidArgument: the path has no ending, or one of no picture.
            Unsupported: the ending is not .html, and there is no matplotlib.
        """
        path = file_path("profile.save", path)
        ending = path.suffix.lower()
        if not ending:
            raise InvalidArgument(f"profile.save: the path must end in .html, .png, ..., got {str(path)!r}")
        if ending == ".html":
            write_atomically(path, _html(self).encode())
        else:
            check_picture(path)
            _draw(self, path)


def kernel_and_slice(kernel: str, images: int) -> str:
    return f"{kernel}, {images} images at a time" if images > 1 else f"{kernel}, image by image" if images else kernel


def take_profile(native: NativePlan, inputs: Sequence[Tensor], runs: int) -> Profile:
    """Medians of `runs` calls."""
    checked_runs(runs)
    steps, arena_bytes = native_steps(native, inputs, runs)
    return profile_of(steps, lambda: native(inputs), runs, arena_bytes)


def checked_runs(runs: int) -> int:
    if not isinstance(runs, int) or runs < 1:
        raise InvalidArgument(f"plan.profile: runs must be a positive integer, got {runs!r}")
    return runs


def native_steps(native: NativePlan, inputs: Sequence[Tensor], runs: int) -> tuple[list[StepTime], int]:
    """The steps with the medians of `runs` calls, and the bytes of the arena."""
    facts = native.describe(inputs)
    for _ in range(_WARM_UP):
        native.profile(inputs)
    samples = [native.profile(inputs) for _ in range(runs)]
    steps = [
        StepTime(
            s["name"], s["kind"], s["kernel"], tuple(s["inputs"]), s["output"], statistics.median(ns) / 1e3, s["macs"],
            s["bytes"], s["images"],
        )
        for s, ns in zip(facts["steps"], zip(*samples, strict=True), strict=True)
    ]  # fmt: skip
    return steps, facts["arena_bytes"]


def island_step(name: str, call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], runs: int) -> StepTime:
    """What torch runs, as one step: the median of `runs` calls; its multiplications are not counted."""
    outputs = call()
    microseconds = statistics.median(_seconds(call) for _ in range(runs)) * 1e6
    moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
    shown = tuple(map(shown_tensor, inputs))
    return StepTime(name, "torch", "torch", shown, ", ".join(map(shown_tensor, outputs)), microseconds, 0, moved)


def shown_tensor(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def profile_of(steps: Sequence[StepTime], call: Callable[[], Any], runs: int, arena_bytes: int) -> Profile:
    """The profile of `steps`, of which `call` runs all."""
    whole = statistics.median(_seconds(call) for _ in range(runs)) * 1e6
    threads = torch.get_num_threads()
    return Profile(tuple(steps), whole, peak_gmacs(active_isa(), threads), active_isa(), threads, arena_bytes)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@cache
def peak_gmacs(isa: str, threads: int) -> float:
    """The best rate of integer matrix products that stay in the cache, in GMAC/s; takes about 0.1 s."""
    return max(
        _product_gmacs(256 * threads, inner, columns) for inner, columns in ((1024, 512), (2048, 256), (4096, 128))
    )


def _product_gmacs(rows: int, inner: int, columns: int) -> float:
    x = torch.zeros(rows, inner, dtype=torch.uint8, device="cpu")
    weight = torch.ones(columns, inner, dtype=torch.int8, device="cpu")
    scale = torch.ones(1, dtype=torch.float32, device="cpu")
    packed = ops.linear_pack(weight, scale, None, None, 1.0, 0, torch.uint8, Epilogue())
    best, until = float("inf"), time.perf_counter() + 0.03
    while time.perf_counter() < until:
        start = time.perf_counter()
        ops.linear(x, packed, columns, torch.uint8)
        best = min(best, time.perf_counter() - start)
    return rows * inner * columns / best / 1e9


# ---- pictures

_FAMILIES = {
    "depthwise": "#63b3ed",
    "conv": "#2b6cb0",
    "linear": "#2c7a7b",
    "quantize": "#d9a441",
    "dequantize": "#d9a441",
    "pool": "#805ad5",
}
_OTHER = "#9aa5b1"


def _colour(step: StepTime) -> str:
    words = f"{step.kernel} {step.kind}"
    return next((colour for family, colour in _FAMILIES.items() if family in words), _OTHER)


def _html(profile: Profile) -> str:
    """One page without scripts: the timeline with a tooltip a step, then the table."""
    total, at, bars = profile.microseconds or 1.0, 0.0, []
    for s in profile.steps:
        peak = f", {100 * profile.of_peak(s):.0f} % of peak" if s.macs else ""
        note = f"{s.name} ({s.kind}, {s.kernel}): {s.microseconds:.1f} us{peak}; {', '.join(s.inputs)} -> {s.output}"
        bars.append(
            f'<rect x="{1000 * at / total:.2f}" y="0" height="60" '
            f'width="{max(0.5, 1000 * s.microseconds / total):.2f}" '
            f'fill="{_colour(s)}" stroke="white" stroke-width="0.5"><title>{html.escape(note)}</title></rect>'
        )
        at += s.microseconds
    return (
        "<!doctype html><meta charset='utf-8'><title>qkernels plan</title>"
        "<style>body{font:14px sans-serif;margin:2em}pre{font-size:12px}</style>"
        f"<h3>{len(profile.steps)} steps, {profile.microseconds:.0f} us</h3>"
        f'<svg viewBox="0 0 1000 60" width="100%" height="80" preserveAspectRatio="none">{"".join(bars)}</svg>'
        f"<pre>{html.escape(str(profile))}</pre>\n"
    )


def _draw(profile: Profile, path: str | os.PathLike) -> None:
    """Above, the steps one after another; below, each with its time and what it would take at peak rate."""
    steps = profile.steps
    figure = new_figure(10, 2 + 0.17 * len(steps))
    line, bars = figure.subplots(2, 1, height_ratios=(1, max(1.0, 0.17 * len(steps))))
    at = 0.0
    for step in steps:
        line.barh(0, step.microseconds, left=at, color=_colour(step), edgecolor="white", linewidth=0.3)
        at += step.microseconds
    line.set_yticks([])
    line.set_xlim(0, at or 1.0)
    line.set_title(f"timeline, us ({profile.isa}, threads: {profile.threads})", fontsize=10)
    bars.barh(range(len(steps)), [s.microseconds for s in steps], color=[_colour(s) for s in steps])
    bars.barh(range(len(steps)), [s.macs / profile.peak_gmacs / 1e3 for s in steps], color="black", height=0.25)
    bars.set_yticks(range(len(steps)), [s.name for s in steps], fontsize=6)
    bars.set_ylim(len(steps) - 0.4, -0.6)
    bars.set_title("each step, us; black: its work at peak rate", fontsize=10)
    for axes in (line, bars):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)
