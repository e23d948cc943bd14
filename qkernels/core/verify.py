"""`verify`: the promise "what you evaluate is what you ship", checked layer by layer on data.

The integers are compared with the same integers in plain torch, bit by bit, and the outputs with those of the prepared
model itself, which was made another way: that finds what both forms of the integers would have in common.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qkernels.core.exact import ReferenceLayer, exact
from qkernels.core.expect import expect_batches, expect_calibrated, expect_converted
from qkernels.core.noise import SignalToNoise
from qkernels.core.outputs import output_tensors
from qkernels.core.phases import run_batch, simulating
from qkernels.core.registry import is_layer
from qkernels.errors import InvalidArgument

Outputs = "OrderedDict[str, list[Tensor]]"


@dataclass
class LayerCheck:
    """One layer: how many numbers were compared, how many differ, and by how much at most."""

    name: str
    kind: str
    compared: int = 0
    differing: int = 0
    max_difference: float = 0.0

    def add(self, expected: Tensor, got: Tensor) -> None:
        if expected.shape != got.shape or expected.dtype != got.dtype:
            self.compared += expected.numel()
            self.differing += max(expected.numel(), 1)
            self.max_difference = float("inf")
            return
        differs = expected != got
        if expected.is_floating_point():
            differs &= ~(torch.isnan(expected) & torch.isnan(got))
        self.compared += expected.numel()
        self.differing += int(differs.sum())
        if bool(differs.any()):
            difference = (expected.double() - got.double())[differs].abs().nan_to_num(nan=float("inf"))
            self.max_difference = max(self.max_difference, float(difference.max()))


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`; prints as a table. `layers` in the order of execution, the last row is the output.

    `simulation_sqnr_db` is the signal-to-noise ratio of the float outputs of the converted model against those of the
    prepared one, which computes in float: 10 log10(sum of squares of its outputs / sum of squares of the difference).
    More than 100 dB are rounding errors of float32; codes that were ties before they were rounded make it 30 dB or
    more. Less than 20 dB means that the two are not the same network, even if no integer differs.
    """

    layers: tuple[LayerCheck, ...]
    batches: int
    simulation_sqnr_db: float

    @property
    def total_mismatches(self) -> int:
        return sum(layer.differing for layer in self.layers)

    @property
    def total_compared(self) -> int:
        return sum(layer.compared for layer in self.layers)

    def __bool__(self) -> bool:
        """Whether everything agrees."""
        return self.total_mismatches == 0

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        kinds = max([len("kind"), *(len(layer.kind) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'kind':<{kinds}}  {'compared':>12}  {'differing':>10}  {'max diff':>8}"]
        for layer in self.layers:
            lines.append(
                f"{layer.name:<{width}}  {layer.kind:<{kinds}}  {layer.compared:>12,}  {layer.differing:>10,}"
                f"  {layer.max_difference:>8g}"
            )
        lines.append(
            f"{self.total_mismatches:,} of {self.total_compared:,} numbers differ ({len(self.layers)} layers, "
            f"{self.batches} batches)"
        )
        lines.append(f"SQNR of the outputs against the prepared model's own: {self.simulation_sqnr_db:.1f} dB")
        return "\n".join(lines)


def verify(prepared: nn.Module, converted: nn.Module, batches: Iterable[Any]) -> VerifyReport:
    """Runs the prepared model in exact arithmetic (plain torch) and the converted one on its kernels, and compares.

    Every layer's output is compared, code by code; a difference in one layer shows in the layers after it too. The
    prepared model runs as it is too, in eval mode and with every grid in use, for `simulation_sqnr_db`; a bfloat16 or
    float16 batch, which the other two take, is widened for it to the float32 of its layers.

    Args:
        prepared: the calibrated model.
        converted: its converted form, possibly saved and loaded since.
        batches: an iterable of batches: tensors, tuples or lists of arguments, or dicts of keyword arguments.

    Raises:
        InvalidArgument: there is no batch, one does not fit the forward, or the models do not belong together.
        InvalidState: the prepared model was not calibrated.
        InvalidType: `batches` is one tensor or dict or no iterable, or a batch or an output holds no tensor.
    """
    expect_calibrated("verify", prepared)
    expect_converted("verify", converted)
    expect_batches("verify", batches)
    reference = exact(prepared)
    checks: OrderedDict[str, LayerCheck] = OrderedDict()
    count, simulation = 0, SignalToNoise()
    for batch in batches:
        with torch.no_grad():
            expected, got = _outputs(reference, batch), _outputs(converted, batch)
            with simulating(prepared):
                simulated = output_tensors("verify", run_batch(prepared, _widened(prepared, batch), "verify"))
        if expected.keys() != got.keys():
            only = sorted(set(expected) ^ set(got))
            raise InvalidArgument(f"verify: the two models do not have the same layers; only one has {only[:5]}")
        for name, (kind, tensors) in expected.items():
            check = checks.setdefault(name, LayerCheck(name, kind))
            others = got[name][1]
            if len(tensors) != len(others):
                raise InvalidArgument(
                    f"verify: {name} ran {len(tensors)} times in one model, {len(others)} in the other"
                )
            for a, b in zip(tensors, others, strict=True):
                check.add(a, b)
        for a, b in zip(simulated, got["(output)"][1], strict=True):
            if a.is_floating_point():
                simulation.add(a, b)
        count += 1
    if count == 0:
        raise InvalidArgument("verify: needs at least one batch")
    checks.move_to_end("(output)")
    return VerifyReport(tuple(checks.values()), count, simulation.db)


def _outputs(model: nn.Module, batch: Any) -> "OrderedDict[str, tuple[str, list[Tensor]]]":
    """The output of every layer call, and of the model, by layer path in order of execution."""
    found: OrderedDict[str, tuple[str, list[Tensor]]] = OrderedDict()
    with _recording(model, found):
        result = run_batch(model, batch, "verify")
    found["(output)"] = ("", output_tensors("verify", result))
    return found


def _widened(model: nn.Module, batch: Any) -> Any:
    """The batch with float32 for the 16-bit floats that no layer of the model computes in."""
    narrow = {torch.bfloat16, torch.float16} - {parameter.dtype for parameter in model.parameters()}
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype in narrow else x, batch)


@contextmanager
def _recording(model: nn.Module, found: OrderedDict) -> Iterator[None]:
    wrapped = {id(m.layer) for m in model.modules() if isinstance(m, ReferenceLayer)}
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, ReferenceLayer):
            layers[path] = (module, module.layer.kind)
        elif is_layer(module) and id(module) not in wrapped:
            layers[path] = (module, module.kind)
    handles = []
    for path, (module, kind) in layers.items():

        def note(module: nn.Module, args: tuple, output: Tensor, path: str = path, kind: str = kind) -> None:
            found.setdefault(path, (kind, []))[1].append(output)

        handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
