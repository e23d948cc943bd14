"""The table of training rules, and what a rule is."""

from collections.abc import Callable

from torch import Tensor, nn

from qkernels.core.qspec import QSpec
from qkernels.errors import InvalidArgument

RULES: dict[str, type["Rule"]] = {}


def rule(name: str) -> Callable[[type["Rule"]], type["Rule"]]:
    """Enters the decorated class into the table of rules as `name`."""

    def register(cls: type["Rule"]) -> type["Rule"]:
        if name in RULES:
            raise InvalidArgument(f"rule: the name {name!r} is taken by {RULES[name].__qualname__}")
        RULES[name] = cls
        return cls

    return register


def make_rule(name: str, spec: QSpec, channels: int | None = None, **options) -> "Rule":
    """The rule `name` for grids of kind `spec`; `channels` is the size of `spec.axis` if it is per channel."""
    if name not in RULES:
        raise InvalidArgument(f"unknown rule {name!r}; there are {sorted(RULES)}")
    return RULES[name](spec, channels, **options)


class Rule(nn.Module):
    """Base class. A rule maps a tensor to values on a grid, differentiably, and says which grid that is.

    observes: the grid comes from the observer, batch by batch; otherwise the rule owns it.
    """

    observes = True

    def __init__(self, spec: QSpec, channels: int | None = None):
        super().__init__()
        self.spec = spec
        self.size = channels if spec.per_channel else 1

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.per_channel else None

    def start(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Takes over from the observer: `x` is the first tensor, scale and zero_point its grid."""

    def grid(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and (float or int32) zero point in use, given those that the observer chose."""
        return scale, zero_point

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`x` on the grid that `grid` gave, with the gradients of this rule."""
        raise NotImplementedError
