"""Signal and noise: how far one tensor lies from another."""

import math

from torch import Tensor


class SignalToNoise:
    """Sums of squares of a signal and of its error, over any number of tensors.

    NaN and infinities count as no error where both have the same, and else as an infinite one.
    """

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, expected: Tensor, got: Tensor) -> None:
        expected, got = expected.double(), got.double()
        finite = expected.isfinite() & got.isfinite()
        if not finite.all():
            differs = expected.nan_to_num() != got.nan_to_num()
            if bool((differs | (expected.isnan() != got.isnan())).masked_fill(finite, False).any()):
                self.noise = math.inf
            expected, got = expected[finite], got[finite]
        self.signal += float(expected.square().sum())
        self.noise += float((expected - got).square().sum())

    @property
    def db(self) -> float:
        """10 log10(sum of squares of the signal / sum of squares of the error); infinite without an error."""
        if self.noise == 0.0:
            return math.inf
        ratio = self.signal / self.noise
        return 10.0 * math.log10(ratio) if ratio > 0.0 else -math.inf
