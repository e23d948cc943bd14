"""The compiled network as Python sees it: a module whose call is one native call."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.core.files import file_path, write_atomically
from qkernels.errors import CheckpointError, InvalidArgument, InvalidType, Unsupported
from qkernels.ops.machine import active_isa
from qkernels.ops.plan import NativePlan
from qkernels.plan.profile import (
    Profile,
    checked_runs,
    island_step,
    kernel_and_slice,
    native_steps,
    profile_of,
    take_profile,
)


class Plan(nn.Module):
    """A converted model in one native call: no Python, no dispatcher and no allocation between its layers.

    Takes and returns what the model did, for any batch and spatial size. Several threads may call it at once.
    Make one with `qkernels.compile` or `qkernels.load_plan`.

    `islands`, which torch would run, are none.
    """

    saves_itself = True

    def __init__(self, data: bytes) -> None:
        super().__init__()
        if not isinstance(data, bytes):
            raise InvalidType(f"Plan: data must be the bytes of a plan file, got {type(data).__name__}")
        self.training, self.islands = False, {}
        self._native = NativePlan(data)
        try:
            self._read_metadata(json.loads(self._native.metadata))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the metadata of the plan are malformed ({error!r})") from error

    def _read_metadata(self, metadata: Mapping[str, Any]) -> None:
        self._names = tuple(metadata["inputs"])
        self._structure = metadata["output"]
        self._example = [tuple(sizes) for sizes in metadata["example"]]
        assembled(self._structure, _Places(self._native.output_count))
        self._single = self._structure == {"value": 0}
        if not len(self._names) == len(self._example) == len(self._native.inputs):
            raise ValueError("the number of inputs differs")
        for name, sizes, (_, _, wanted) in zip(self._names, self._example, self._native.inputs, strict=True):
            if not isinstance(name, str) or not _fits(sizes, wanted):
                raise ValueError(f"{list(sizes)} is no example of the input {name!r}")

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        outputs = self._native(self._positional(args, kwargs))
        return outputs[0] if self._single else assembled(self._structure, outputs)

    def _positional(self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return bound(self._names, args, kwargs) if kwargs else args

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan to `path`, atomically. The file holds canonical weights and fits every machine."""
        write_atomically(file_path("plan.save", path), self._native.data)

    def profile(self, *args: Tensor, runs: int = 20, **kwargs: Tensor) -> Profile:
        """The time of every step for these inputs: the median of `runs` calls. Print it, or `save` it as a picture."""
        return take_profile(self._native, self._positional(args, kwargs), runs)

    def describe(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Any]:
        """The steps with their shapes and kernels, and the memory, for these inputs (default: as the example)."""
        inputs = self._native.inputs
        tensors = self._positional(args, kwargs) or [
            torch.empty(s, dtype=d, device="cpu") for s, (_, d, _) in zip(self._example, inputs, strict=True)
        ]
        return self._native.describe(tensors)

    def extra_repr(self) -> str:
        facts = self.describe()
        rows = [("step", "layer", "kernel", "inputs", "output")]
        rows += [
            (s["kind"], s["name"], kernel_and_slice(s["kernel"], s["images"]), ", ".join(s["inputs"]), s["output"])
            for s in facts["steps"]
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(f"{cell:{w}s}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        summary = (
            f"{len(facts['steps'])} steps; arena {_kib(facts['arena_bytes'])}, packed weights "
            f"{_kib(facts['packed_bytes'])}, for {facts['isa']}; shapes of the example, others work too"
        )
        return "\n".join([*lines, summary])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._native.data,)

    def __deepcopy__(self, memo: dict) -> "Plan":
        return type(self)(self._native.data)


class PlanWithIslands(nn.Module):
    """A plan of which torch runs some parts, because no steps compute them: the float islands.

    `islands` says which nodes, and why.
    """

    saves_itself = True

    def __init__(
        self,
        parts: Sequence[tuple[nn.Module, tuple[str, ...], tuple[str, ...]]],
        names: Mapping[str, str],
        result: tuple[nn.Module, tuple[str, ...]],
        islands: Mapping[str, str],
    ) -> None:
        """`parts` in order, each with the names of its inputs and outputs; `names`: node name -> argument name."""
        super().__init__()
        self.training = False
        self.parts = nn.ModuleList(module for module, _, _ in parts)
        self.result, self._result_inputs = result
        self._wiring = [(inputs, outputs) for _, inputs, outputs in parts]
        self._keys, self._names, self.islands = tuple(names), tuple(names.values()), dict(islands)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        values = dict(zip(self._keys, bound(self._names, args, kwargs), strict=True))
        for _ in self._run_parts(values):
            pass
        return self.result(*(values[name] for name in self._result_inputs))

    def _run_parts(self, values: dict[str, Any]) -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
        """Every part with its inputs, once it has run; `values` gets the outputs."""
        for part, (inputs, outputs) in zip(self.parts, self._wiring, strict=True):
            given = tuple(values[name] for name in inputs)
            values.update(zip(outputs, part(*given), strict=True))
            yield part, given

    def save(self, path: str | os.PathLike) -> None:
        """A file holds no code of torch: refused."""
        raise Unsupported(
            f"plan.save: {len(self.islands)} operations run in torch, which a plan file cannot hold "
            f"({_some(self.islands)}): save the converted model with qkernels.save, and compile it after loading"
        )

    @torch.no_grad()
    def profile(self, *args: Tensor, runs: int = 20, **kwargs: Tensor) -> Profile:
        """As `Plan.profile`; what torch runs between two parts of the plan is one step, `torch`."""
        checked_runs(runs)
        steps, arena_bytes = [], 0
        for part, inputs in self._run_parts(dict(zip(self._keys, bound(self._names, args, kwargs), strict=True))):
            if isinstance(part, Plan):
                more, more_bytes = native_steps(part._native, inputs, runs)
                steps, arena_bytes = steps + more, arena_bytes + more_bytes
            else:
                steps.append(island_step(_operations(part), partial(part, *inputs), inputs, runs))
        return profile_of(steps, partial(self, *args, **kwargs), runs, arena_bytes)

    @torch.no_grad()
    def describe(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Any]:
        """As `Plan.describe`, for these inputs, which it runs. What torch runs is a step of the kind `torch`."""
        facts: dict[str, Any] = {"steps": [], "arena_bytes": 0, "packed_bytes": 0, "isa": active_isa()}
        values = dict(zip(self._keys, bound(self._names, args, kwargs), strict=True))
        for part, inputs in self._run_parts(values):
            if isinstance(part, Plan):
                more = part.describe(*inputs)
                facts["steps"] += more["steps"]
                facts["arena_bytes"] += more["arena_bytes"]
                facts["packed_bytes"] += more["packed_bytes"]
            else:
                facts["steps"].append(_described_island(part, inputs))
        return facts

    def extra_repr(self) -> str:
        lines = ["float islands, run by torch:", *(f"  {name}: {why}" for name, why in self.islands.items())]
        return "\n".join(lines)


def _some(islands: Mapping[str, str]) -> str:
    """The first names, with what makes the result of the model none that a plan gives."""
    names = [f"{name}: {why}" if name == "output" else name for name, why in islands.items()]
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])


def _operations(island: nn.Module) -> str:
    """The names of what torch runs."""
    return ", ".join(node.name for node in island.graph.nodes if node.op.startswith("call_"))


def _described_island(island: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Any]:
    step = island_step(_operations(island), partial(island, *inputs), inputs, 1)
    return {
        "name": step.name,
        "kind": step.kind,
        "kernel": step.kernel,
        "inputs": list(step.inputs),
        "output": step.output,
        "macs": 0,
        "bytes": step.bytes,
        "images": 0,
    }


def load_plan(path: str | os.PathLike) -> Plan:
    """Reads a plan that `plan.save` wrote, and packs its weights for this machine.

    Raises:
        CheckpointError: the file is truncated, damaged, not a plan, or of another version.
        Unsupported: it holds steps that this version does not have.
    """
    path = file_path("load_plan", path)
    data = path.read_bytes()
    try:
        return Plan(data)
    except CheckpointError as error:
        raise CheckpointError(f"load_plan: {path}: {error}") from error


def bound(names: Sequence[str], args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Positional and keyword arguments in the order of the model's parameters."""
    missing = [name for name in names[len(args) :] if name not in kwargs]
    unexpected = [name for name in kwargs if name not in names[len(args) :]]
    if missing or unexpected or len(args) > len(names):
        raise InvalidArgument(
            f"plan: the arguments are ({', '.join(names)}); got {len(args)} positional ones; missing: "
            f"{missing or 'none'}, not expected: {unexpected or 'none'}"
        )
    return (*args, *(kwargs[name] for name in names[len(args) :]))


def assembled(structure: Any, outputs: Sequence[Tensor]) -> Any:
    """The outputs as the model returned them."""
    ((kind, content),) = structure.items()
    build: dict[str, Callable[[], Any]] = {
        "value": lambda: outputs[content],
        "constant": lambda: content,
        "tuple": lambda: tuple(assembled(part, outputs) for part in content),
        "list": lambda: [assembled(part, outputs) for part in content],
        "dict": lambda: {name: assembled(part, outputs) for name, part in content.items()},
    }
    return build[kind]()


class _Places:
    """Stands for outputs when a structure is tried."""

    def __init__(self, count: int):
        self.count = count

    def __getitem__(self, index: int) -> None:
        if type(index) is not int or not 0 <= index < self.count:
            raise ValueError(f"{index!r} is no place of one of {self.count} outputs")


def _fits(sizes: Sequence[Any], wanted: Sequence[int]) -> bool:
    """Whether `sizes` are sizes of a tensor, and those that `wanted` fixes (-1: any)."""
    return len(sizes) == len(wanted) and all(
        type(size) is int and 0 <= size < 2**63 and want in (-1, size) for size, want in zip(sizes, wanted, strict=True)
    )


def _kib(count: int) -> str:
    return f"{count / 1024:.0f} KiB"
