"""Observers: modules that watch tensors and say which range [low, high] a grid should cover.

To add one, decorate a subclass of `Observer` with `@observer("name")`; recipes then know it by that name.
"""

import bisect
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, distributed, nn

from qkernels.core.qspec import QParams, QSpec, choose_qparams, grid_values
from qkernels.errors import CalibrationError, InvalidArgument
from qkernels.ops import observe_histogram, observe_minmax

OBSERVERS: dict[str, type["Observer"]] = {}


def observer(name: str) -> Callable[[type["Observer"]], type["Observer"]]:
    """Enters the decorated class into the table of observers as `name`."""

    def register(cls: type["Observer"]) -> type["Observer"]:
        if name in OBSERVERS:
            raise InvalidArgument(f"observer: the name {name!r} is taken by {OBSERVERS[name].__qualname__}")
        OBSERVERS[name] = cls
        return cls

    return register


def make_observer(name: str, spec: QSpec, channels: int | None = None, **options) -> "Observer":
    """The observer `name` for grids of kind `spec`; `channels` is the size of `spec.axis` if it is per channel."""
    if name not in OBSERVERS:
        raise InvalidArgument(f"unknown observer {name!r}; there are {sorted(OBSERVERS)}")
    return OBSERVERS[name](spec, channels, **options)


class Observer(nn.Module):
    """Base class: keeps the smallest and largest value seen, per tensor or per channel of `spec.axis`.

    `source` is the path of the module whose tensor is observed; error messages use it.
    """

    low: Tensor
    high: Tensor
    non_finite: Tensor | None  # how many NaN and infinities were left out; None: they are errors
    refused: Tensor | None  # as many, in batches that were not waited for: errors that are still to be reported

    def __init__(self, spec: QSpec, channels: int | None = None):
        super().__init__()
        if spec.per_channel and channels is None:
            raise InvalidArgument(f"{type(self).__name__}: a per-channel grid needs the number of channels")
        self.spec = spec
        self.source = "a tensor"
        size = channels if spec.per_channel else 1
        self.register_buffer("low", torch.full((size,), float("inf"), dtype=torch.float32, device="cpu"))
        self.register_buffer("high", torch.full((size,), float("-inf"), dtype=torch.float32, device="cpu"))
        self.register_buffer("non_finite", None)
        self.register_buffer("refused", None, persistent=False)

    def ignore_non_finite(self) -> None:
        """From now on NaN and infinities are counted instead of refused; the finite values of a tensor decide."""
        self.non_finite = torch.zeros(2, dtype=torch.int64, device=self.low.device)

    def observe(self, x: Tensor, merged: bool = True) -> None:
        """Takes notice of the values of `x`; NaN and infinities are a CalibrationError, or counted if they are ignored.

        With `merged`, in a distributed run, each rank takes notice of the values of all ranks; one whose batch is empty
        or at fault takes part too, or the others would wait for it.
        """
        merged = merged and is_distributed()
        if x.numel() == 0 and not merged:
            return
        if x.is_cuda:
            self.observe_without_waiting(x, merged)
            return
        x, fault = x.detach().to(torch.float32), ""
        low, high = self.extremes(x)
        if x.numel() > 0 and not torch.compiler.is_compiling() and not _are_finite(low, high):
            if self.non_finite is not None:
                x, low, high = self.finite_part(x)
            elif fault := self.fault(x):
                low, high = self.no_extremes()
        if merged:
            low, high, faulty = merge_extremes(low, high, torch.full_like(low[:1], float(bool(fault))))
            if not torch.compiler.is_compiling() and not fault and bool(faulty):
                fault = f"calibration: the output of {self.source} has NaN or infinite values on another rank"
        if fault:
            raise CalibrationError(fault)
        if (x.numel() > 0 and self.non_finite is None) or bool((low <= high).all()):
            self.update(x, low, high)

    def observe_without_waiting(self, x: Tensor, merged: bool = True) -> None:
        """`observe` without asking the device for a value: a CUDA graph can capture it.

        NaN and infinities that are errors are reported by `qparams`; until then their batch changes nothing.
        """
        x = x.detach()
        low, high, non_finite = observe_minmax(x, self.spec.axis if self.spec.per_channel else None)
        if self.non_finite is not None:
            self.non_finite += non_finite
        else:
            if self.refused is None:
                self.refused = torch.zeros_like(non_finite)
            self.refused += non_finite
            bad = non_finite.sum() > 0
            low, high = torch.where(bad, float("inf"), low), torch.where(bad, float("-inf"), high)
        if merged and is_distributed():
            low, high = merge_extremes(low, high)
        self.update(x, low, high)

    def finite_part(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The finite values of a tensor with one grid, and their extremes; counts the others."""
        self.non_finite += torch.stack([torch.isnan(x).sum(), torch.isinf(x).sum()])
        x = x[torch.isfinite(x)]
        if x.numel() == 0:
            return x, *self.no_extremes()
        return x, *self.extremes(x)

    def fault(self, x: Tensor) -> str:
        """What is wrong with the values of `x`; empty: nothing."""
        if bool(torch.isfinite(x).all()):
            return ""
        return f"calibration: the output of {self.source} has {describe_non_finite(x)}"

    def check_finite(self, x: Tensor) -> None:
        if fault := self.fault(x):
            raise CalibrationError(fault)

    def no_extremes(self) -> tuple[Tensor, Tensor]:
        return torch.full_like(self.low, float("inf")), torch.full_like(self.high, float("-inf"))

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.numel() == 0:
            return self.no_extremes()
        if not self.spec.per_channel:
            low, high = torch.aminmax(x)
            return low.reshape(1), high.reshape(1)
        return torch.aminmax(self.by_channel(x), dim=1)

    def by_channel(self, x: Tensor) -> Tensor:
        """`x` as a matrix with a row for each channel."""
        return x.movedim(self.spec.axis, 0).reshape(x.shape[self.spec.axis], -1)

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Takes in a batch with the extremes `low` and `high`; low above high: without a value."""
        raise NotImplementedError

    def begin(self, joined: bool) -> None:
        """A batch comes; `joined`: it is a further part of the one before."""

    def rewind(self) -> tuple[Tensor, Tensor] | None:
        """Back to before the batch that the next values are a further part of; gives what was seen of it so far."""

    def join(self, low: Tensor, high: Tensor) -> None:
        """Takes in what had been seen of the batch before `rewind`."""
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def merge(self) -> None:
        """Takes in what the other ranks of a distributed run have seen, beyond the extremes."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The range that the grid should cover."""
        return self.low, self.high

    def has_data(self) -> bool:
        return bool((self.low <= self.high).all())

    def qparams(self) -> QParams:
        """The grid for what was seen so far."""
        if self.refused is not None and bool(self.refused.any()):
            nans, infs = self.refused.tolist()
            raise CalibrationError(
                f"calibration: the output of {self.source} had {nans} NaN and {infs} infinite values among its batches"
            )
        if not self.has_data():
            raise CalibrationError(
                f"calibration: {self.source} saw no data; run the model on batches first, one of `qkernels.prepare` "
                "inside `with qkernels.calibrating(model):`"
            )
        return choose_qparams(self.spec, *self.range())

    def reset(self) -> None:
        """Forgets everything seen."""
        self.low.fill_(float("inf"))
        self.high.fill_(float("-inf"))
        self.refused = None
        if self.non_finite is not None:
            self.non_finite.zero_()

    def extra_repr(self) -> str:
        return f"low={self.low.tolist()}, high={self.high.tolist()}" if self.low.numel() == 1 else ""


def _are_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def merge_extremes(low: Tensor, *high: Tensor) -> tuple[Tensor, ...]:
    """The smallest of `low` and the largest of the others, of all ranks."""
    merged = torch.cat([-low, *high])
    distributed.all_reduce(merged, distributed.ReduceOp.MAX)
    low, *high = merged.split([len(t) for t in (low, *high)])
    return -low, *high


def sum_over_ranks(values: Tensor) -> None:
    """Replaces the values of each rank by their sum, if there are others."""
    if is_distributed():
        distributed.all_reduce(values)


def mean_over_ranks(values: Tensor) -> None:
    """Replaces the values of each rank by their mean."""
    distributed.all_reduce(values)
    values /= distributed.get_world_size()


def as_first_rank(values: Tensor) -> None:
    """Replaces the values of each rank by those of the first, if there are others."""
    if is_distributed():
        distributed.broadcast(values, 0)


def describe_non_finite(x: Tensor) -> str:
    nans, infs = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    return f"{nans} NaN and {infs} infinite values among {x.numel()}; no grid can be chosen from it"


@observer("minmax")
class MinMax(Observer):
    """The smallest and the largest value ever seen; per channel if the spec says so."""

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))


@observer("moving_average")
class MovingAverageMinMax(Observer):
    """The running mean of the smallest and largest value of each batch: `low += momentum * (batch_low - low)`.

    A batch that comes in parts, as the operands of a concatenation do, is one step: each part takes the step from where
    the batch began, and the furthest ends are kept.
    """

    start_low: Tensor
    start_high: Tensor

    def __init__(self, spec: QSpec, channels: int | None = None, momentum: float = 0.01):
        super().__init__(spec, channels)
        if not 0.0 < momentum <= 1.0:
            raise InvalidArgument(f"moving_average: momentum must be in (0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("start_low", self.low.clone(), persistent=False)
        self.register_buffer("start_high", self.high.clone(), persistent=False)
        self.joined = False

    def begin(self, joined: bool) -> None:
        self.joined = joined
        if not joined:
            self.start_low.copy_(self.low)
            self.start_high.copy_(self.high)

    def rewind(self) -> tuple[Tensor, Tensor] | None:
        if not self.joined:
            return None
        seen = self.low.clone(), self.high.clone()
        self.low.copy_(self.start_low)
        self.high.copy_(self.start_high)
        return seen

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        seen = self.rewind()
        self.step(low, high)
        if seen is not None:
            self.join(*seen)

    def step(self, low: Tensor, high: Tensor) -> None:
        first, empty = self.low > self.high, low > high
        new_low = torch.where(first, low, self.low + self.momentum * (low - self.low))
        new_high = torch.where(first, high, self.high + self.momentum * (high - self.high))
        self.low.copy_(torch.where(empty, self.low, new_low))
        self.high.copy_(torch.where(empty, self.high, new_high))


@observer("histogram")
class Histogram(Observer):
    """Keeps a histogram and searches the range with the least squared quantization error.

    The search is the one of `torch.ao.quantization.HistogramObserver` and gives the same grids: starting from the full
    range, drop 1e-5 of the mass at the end where that frees more bins, as long as the expected L2 error falls. That
    one expects 256 codes whatever the range; `codes` says so, and None takes the number in the range.
    """

    histogram: Tensor
    STEP = 1e-5

    def __init__(self, spec: QSpec, channels: int | None = None, bins: int = 2048, codes: int | None = None):
        if spec.per_channel:
            raise InvalidArgument(f"{type(self).__name__}: only per tensor; use minmax or mse for per-channel grids")
        if bins < 2:
            raise InvalidArgument(f"{type(self).__name__}: bins must be at least 2, got {bins}")
        if codes is not None and codes < 2:
            raise InvalidArgument(f"{type(self).__name__}: codes must be at least 2, or None, got {codes}")
        super().__init__(spec, channels)
        self.bins = bins
        self.codes = spec.qmax - spec.qmin + 1 if codes is None else codes
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.float32, device="cpu"))

    def reset(self) -> None:
        super().reset()
        self.histogram.zero_()

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        observe_histogram(x, low, high, self.low, self.high, self.histogram)

    def merge(self) -> None:
        distributed.all_reduce(self.histogram)

    def range(self) -> tuple[Tensor, Tensor]:
        first, last = self.best_bins()
        width = (self.high - self.low) / self.bins
        return self.low + width * first, self.low + width * (last + 1)

    def best_bins(self) -> tuple[int, int]:
        """First and last bin of the range to keep."""
        total = self.histogram.sum().item()
        below = torch.cumsum(self.histogram, dim=0).cpu().numpy()
        # cut[i], keep[i]: the mass cut from the left and the mass below the right end after i steps
        steps = int(1.0 / self.STEP) + 2
        cut = np.cumsum(np.append(0.0, np.full(steps, self.STEP)))
        keep = np.cumsum(np.append(1.0, np.full(steps, -self.STEP)))
        left = np.searchsorted(below, (cut * total).astype(np.float32), side="left").tolist()
        right = (np.searchsorted(below, (keep * total).astype(np.float32), side="right") - 1).tolist()
        first, last, lowest_error = 0, self.bins - 1, float("inf")
        i = j = 0
        while cut[i] < keep[j]:
            new_first = max(first, min(left[i + 1], last))
            new_last = min(last, max(right[j + 1], first))
            if new_first - first > last - new_last:
                i, new_last = i + 1, last
            else:
                j, new_first = j + 1, first
            if (new_first, new_last) == (first, last):
                continue
            error = self.expected_error(new_first, new_last)
            if error > lowest_error:
                break
            lowest_error, first, last = error, new_first, new_last
        return first, last

    def expected_error(self, first: int, last: int) -> float:
        """Sum of squared errors if bins first..last are divided evenly among the codes.

        The mass of a bin is spread evenly over it. A bin reaches from inside the cell of one code over whole cells
        into the cell of another; in a cell the error is the distance to its middle, so each part
        contributes density * (end^3 - begin^3) / 3.
        """
        codes = self.codes
        width = (self.high.item() - self.low.item()) / self.bins
        cell = width * (last - first + 1) / codes
        if cell == 0.0:
            return 0.0
        density = self.histogram / width
        begin = (torch.arange(self.bins, dtype=torch.float32, device=density.device) - first) * width
        end = begin + width
        begin_code = torch.div(begin, cell, rounding_mode="floor").clamp(0, codes - 1)
        end_code = torch.div(end, cell, rounding_mode="floor").clamp(0, codes - 1)
        half = torch.tensor(cell / 2, dtype=torch.float32, device=density.device)
        error = squared_error(begin - (begin_code + 0.5) * cell, half, density)
        error = error + (end_code - begin_code - 1) * squared_error(-half, half, density)
        error = error + squared_error(-half, end - (end_code * cell + cell / 2), density)
        return error.sum().item()


def squared_error(begin: Tensor, end: Tensor, density: Tensor) -> Tensor:
    """The integral of density * x^2 from begin to end."""
    return density * ((end * end * end - begin * begin * begin) / 3)


@observer("percentile")
class Percentile(Histogram):
    """The range that leaves out (100 - percentile) % of the values at each end, read off a histogram."""

    def __init__(self, spec: QSpec, channels: int | None = None, percentile: float = 99.99, bins: int = 2048):
        super().__init__(spec, channels, bins)
        if not 50.0 < percentile <= 100.0:
            raise InvalidArgument(f"percentile: percentile must be in (50, 100], got {percentile}")
        self.percentile = percentile

    def best_bins(self) -> tuple[int, int]:
        below = torch.cumsum(self.histogram.double(), dim=0).tolist()
        outside = below[-1] * (1.0 - self.percentile / 100.0)
        first = bisect.bisect_right(below, outside)
        last = bisect.bisect_left(below, below[-1] - outside)
        return (first, min(last, self.bins - 1)) if first <= last else (0, self.bins - 1)


@observer("mse")
class Mse(Observer):
    """The range, shrunk from the smallest and largest value, whose quantized values have the least squared error.

    Per tensor a histogram of all data is kept and its bin centers are quantized. Per channel (weights) the data of the
    last call decides, channel by channel.
    """

    SHRINK = torch.linspace(0.2, 1.0, 81, dtype=torch.float32, device="cpu")
    BINS = 2048

    def __init__(self, spec: QSpec, channels: int | None = None):
        super().__init__(spec, channels)
        self.seen = None if spec.per_channel else Histogram(QSpec(), bins=self.BINS)
        self.register_buffer("best_low", self.low.clone())
        self.register_buffer("best_high", self.high.clone())

    def reset(self) -> None:
        super().reset()
        if self.seen is not None:
            self.seen.reset()

    def merge(self) -> None:
        if self.seen is not None:
            self.seen.merge()

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        if self.seen is not None:
            self.seen.update(x, low, high)
            self.low.copy_(self.seen.low)
            self.high.copy_(self.seen.high)
            return
        rows = self.by_channel(x)
        best = self.search(rows, torch.ones_like(rows[:1]), low, high)
        has_data = low <= high
        for kept, new in zip((self.low, self.high, self.best_low, self.best_high), (low, high, *best), strict=True):
            kept.copy_(torch.where(has_data, new, kept))

    def range(self) -> tuple[Tensor, Tensor]:
        if self.seen is None:
            return self.best_low, self.best_high
        width = (self.high - self.low) / self.BINS
        centers = self.low + width * (torch.arange(self.BINS, dtype=torch.float32, device=width.device) + 0.5)
        return self.search(centers.reshape(1, -1), self.seen.histogram.reshape(1, -1), self.low, self.high)

    def search(self, rows: Tensor, mass: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Per row the shrunk [low, high] with the least sum of mass * error^2."""
        symmetric = self.spec.symmetric
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        ends = (1.0,) if symmetric else (1.0, 0.0)
        best_low, best_high = low.clone(), high.clone()
        # First both ends together, then (affine) the low end alone and the high end alone.
        for which in ("both", "low", "high") if len(ends) == 2 else ("both",):
            best_error = torch.full_like(low, float("inf"))
            from_low, from_high = best_low.clone(), best_high.clone()
            for shrink in self.SHRINK.tolist():
                new_low = from_low if which == "high" else from_low * shrink
                new_high = from_high if which == "low" else from_high * shrink
                error = self.error(rows, mass, new_low, new_high)
                better = error <= best_error
                best_error = torch.where(better, error, best_error)
                best_low = torch.where(better, new_low, best_low)
                best_high = torch.where(better, new_high, best_high)
        return best_low, best_high

    def error(self, rows: Tensor, mass: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = (t.reshape(-1, 1) for t in grid_values(self.spec, low, high))
        codes = (torch.round(rows / scale) + zero_point).clamp(self.spec.qmin, self.spec.qmax)
        return (mass * ((codes - zero_point) * scale - rows).square()).sum(dim=1)
