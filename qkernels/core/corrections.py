"""What a recipe may ask for after calibration, against the errors of rounding: values, named in `CORRECTIONS`.

They are carried out at the end of `calibrating`, in the order of `Recipe.corrections`, on inputs of the calibration.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from qkernels.errors import InvalidArgument, InvalidType


def _check(correction: "Correction", name: str, low: float, high: float) -> None:
    value = getattr(correction, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InvalidArgument(f"{correction.name}: {name} must be in [{low:g}, {high:g}], got {value!r}")


@dataclass(frozen=True)
class BiasCorrection:
    """Shifts the biases so that no channel of a layer is off on average; see `qkernels.core.bias`.

    samples: how many samples of the calibration data the means are taken over, at least; calls are taken whole.
    """

    name: ClassVar[str] = "bias"
    samples: int = 64

    def __post_init__(self):
        _check(self, "samples", 1, 2**31)


@dataclass(frozen=True)
class AdaRound:
    """Learns for each weight whether to round up or down; see `qkernels.core.adaround`.

    samples: how many samples of the calibration data a layer's output is reconstructed on, at least; calls are taken
        whole.
    steps, batch, learning_rate: of Adam, for each layer.
    regularization: weight of the term that drives roundings to 0 or 1.
    warm_start: the share of steps before that term sets in.
    seed: of the choice of batches.
    """

    name: ClassVar[str] = "adaround"
    samples: int = 256
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 1e-2
    regularization: float = 1e-2
    warm_start: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for name in ("samples", "steps", "batch"):
            _check(self, name, 1, 2**31)
        _check(self, "learning_rate", 1e-12, 1e3)
        _check(self, "regularization", 0.0, 1e6)
        _check(self, "warm_start", 0.0, 1.0)
        _check(self, "seed", 0, 2**63 - 1)


Correction = BiasCorrection | AdaRound
CORRECTIONS: dict[str, type[Correction]] = {cls.name: cls for cls in (BiasCorrection, AdaRound)}


def corrections(wanted: "str | Correction | Iterable[str | Correction]") -> tuple[Correction, ...]:
    """Corrections from names and values, in their order."""
    if isinstance(wanted, (str, BiasCorrection, AdaRound)):
        wanted = (wanted,)
    if not isinstance(wanted, Iterable):
        raise InvalidType(f"corrections: takes names or values of {sorted(CORRECTIONS)}, got {wanted!r}")
    found = []
    for one in wanted:
        if isinstance(one, str):
            if one not in CORRECTIONS:
                raise InvalidArgument(f"unknown correction {one!r}; there are {sorted(CORRECTIONS)}")
            one = CORRECTIONS[one]()
        if not isinstance(one, (BiasCorrection, AdaRound)):
            raise InvalidType(f"a correction is a name or a value of {sorted(CORRECTIONS)}, got {one!r}")
        found.append(one)
    return tuple(found)


def correction_to_config(correction: Correction) -> dict:
    return {"name": correction.name, **asdict(correction)}


def correction_from_config(config: dict) -> Correction:
    options = {name: value for name, value in config.items() if name != "name"}
    cls = type(corrections(config["name"])[0])
    known = {field.name for field in fields(cls)}
    if not options.keys() <= known:
        raise InvalidArgument(f"correction {cls.name!r}: unknown options {sorted(options.keys() - known)}")
    return cls(**options)
