"""What every converted layer shares: grids as buffers, a config that rebuilds it, and a cache of what is derived."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from qkernels.core.qspec import QParams
from qkernels.core.registry import layer_class
from qkernels.core.sizes import Sizes
from qkernels.core.tracing import Tracer
from qkernels.errors import CheckpointError, InvalidState, InvalidType
from qkernels.ops.epilogue import OUTPUT_DTYPES
from qkernels.ops.layout import empty_channels_last
from qkernels.ops.machine import active_isa

_DERIVE_LOCK = threading.Lock()


def _version(buffer: Tensor | None) -> int | None:
    """Changes when the tensor is written in place; an inference tensor has no counter, and only its identity counts."""
    return None if buffer is None or buffer.is_inference() else buffer._version


@contextmanager
def _untraced() -> Iterator[None]:
    """Hides what goes on from `torch.jit.trace` and `make_fx`: what is derived is kept, and no part of their graph."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)


class QLayer(nn.Module):
    """A layer on integer tensors with fixed grids.

    Buffers are canonical: grids, int8 weights, bias, tables. What depends on the machine (packed weights) or repeats a
    buffer as a Python number is *derived*: made by `_derive` at the first call, kept until a buffer or the active
    instruction set changes, never part of the state dict, a copy or a pickle.

    A subclass calls `_add_grid` for its grids, keeps its options in `self.options` (plain JSON values) and gives
    `forward`, `reference_forward`, and `_derive` if it derives something. Where the output has not the sizes and the
    memory order of the input, `output_sizes` and `output_memory` say so.
    """

    kind: ClassVar[str]
    usual: ClassVar[dict[str, Any]] = {}  # option values that the description leaves out
    channels_last: ClassVar[bool] = False  # whether the output is stored so, whatever the input

    def __init__(
        self, inputs: Sequence[QParams], output: QParams | None, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.name = ""  # its place in the model, for messages
        self.options = dict(options or {})
        self._grids: dict[str, dict[str, Any]] = {}
        self._input_roles = ["input"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))]
        for role, grid in zip(self._input_roles, inputs, strict=True):
            self._add_grid(role, grid)
        if output is not None:
            self._add_grid("output", output)
        self._derived: tuple[Any, ...] | None = None
        self.training = False

    def _add_grid(self, role: str, grid: QParams) -> None:
        self.register_buffer(f"{role}_scale", grid.scale.detach().to(torch.float32).reshape(-1).clone())
        self.register_buffer(f"{role}_zero_point", grid.zero_point.detach().to(torch.int32).reshape(-1).clone())
        self._grids[role] = {"axis": grid.axis, "qmin": grid.qmin, "qmax": grid.qmax, "dtype": grid.dtype}
        if grid.block is not None:
            self._grids[role]["block"] = list(grid.block)

    def pack_numbers(self) -> None:
        """Buffers of one number become parts of one tensor: `torch.save` writes a record for each storage."""
        for dtype in (torch.float32, torch.int32):
            names = [n for n, b in self._buffers.items() if b is not None and b.dtype is dtype and b.shape == (1,)]
            if len(names) > 1:
                together = torch.cat([self._buffers[name] for name in names])
                self._buffers.update(zip(names, together.split(1), strict=True))
        self._derived = None

    def _grid(self, role: str) -> QParams:
        scale, zero_point = self._buffers[f"{role}_scale"], self._buffers[f"{role}_zero_point"]
        return QParams(scale=scale, zero_point=zero_point, **self._grids[role])

    def _numbers(self, role: str) -> tuple[float, int]:
        """Scale and zero point of a per-tensor grid as Python numbers."""
        return self._buffers[f"{role}_scale"].item(), self._buffers[f"{role}_zero_point"].item()

    @property
    def in_qparams(self) -> tuple[QParams, ...]:
        """The grids of the integer inputs."""
        return tuple(self._grid(role) for role in self._input_roles)

    @property
    def out_qparams(self) -> QParams | None:
        """The grid of the output; None if it is float."""
        return self._grid("output") if "output" in self._grids else None

    def output_sizes(self, *inputs: Sizes) -> Sizes:
        """The sizes of the output for inputs of these sizes, which may be formulas."""
        return inputs[0]

    def input_sizes(self) -> dict[int, int]:
        """The sizes that the first input must have, by dimension."""
        return {}

    def output_memory(self, y: Tensor, *inputs: Tensor) -> Tensor:
        """Uninitialized memory of the shape and dtype of `y`, laid out as what `forward` returns for `inputs`."""
        if self.channels_last and y.dim() > 2:
            return empty_channels_last(y, y.shape, y.dtype)
        whole = next((x for x in inputs if x.shape == y.shape), None)
        return y.new_empty(y.shape) if whole is None else torch.empty_like(whole, dtype=y.dtype)

    def _derive(self) -> Any:
        """What `forward` needs besides its inputs, computed from the buffers for the active instruction set."""
        return None

    def derived(self) -> Any:
        """The result of `_derive`, computed again only when a buffer or the active instruction set has changed."""
        if torch.compiler.is_compiling():
            return self._derived_before()
        if self._derived is not None:
            isa, buffers, versions, value = self._derived
            if isa == active_isa():
                for now, then, version in zip(self._buffers.values(), buffers, versions, strict=True):
                    if now is not then or (version is not None and now._version != version):
                        break
                else:
                    return value
        with _DERIVE_LOCK:
            isa, buffers = active_isa(), list(self._buffers.values())
            versions = [_version(b) for b in buffers]
            with _untraced():
                value = self._derive()
            self._derived = (isa, buffers, versions, value)
        return value

    def _derived_before(self) -> Any:
        """What the last call derived: `torch.compile` and `torch.export` see buffers without values."""
        if self._derived is None:
            raise InvalidState(f"{self._where()}: call the converted model once before torch.compile or torch.export")
        return self._derived[3]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._derived = None
        super()._load_from_state_dict(*args, **kwargs)

    def _check(self, x: Tensor, role: str) -> None:
        """Refuses an input that is not of the integer dtype of `role`: a float tensor here is a missing Quantize."""
        expected = self._grids[role]["dtype"]
        if x.dtype is not expected:
            self._refuse(x, role, expected)

    def _refuse(self, x: Tensor, role: str, expected: torch.dtype) -> None:
        advice = (
            f"quantize it first: qkernels.nn.Quantize(layer.in_qparams[{self._input_roles.index(role)}])(x), or call "
            "the converted model as a whole"
            if not isinstance(x, Tensor) or x.is_floating_point()
            else "it must come from the layer that this one was converted with"
        )
        raise InvalidType(f"{self._where()}: {role} must be {expected}, got {described(x)}.\n{advice}")

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles in the place of this layer: the ops that `forward` calls."""
        unchecked = copy.copy(self)
        unchecked.__dict__["_check"] = lambda x, role: None  # by the ops alone
        forward = unchecked.forward
        binary = len(self._input_roles) == 2
        return self._torchscript((lambda a, b: forward(a, b)) if binary else (lambda x: forward(x)))

    def _torchscript(self, run: Callable) -> nn.Module:
        tracer = Tracer()
        graph = tracer.trace(run)
        graph._co_fields = {}
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                node.target = node.target.overloadpacket  # the form that TorchScript reads
        return fx.GraphModule(tracer.root, graph)

    def _where(self) -> str:
        return f"{type(self).__name__} {self.name!r}" if self.name else type(self).__name__

    def get_config(self) -> dict[str, Any]:
        """Plain JSON values from which `from_config` builds the layer again, up to the contents of its buffers."""
        grids = {role: {**meta, "dtype": _dtype_name(meta["dtype"])} for role, meta in self._grids.items()}
        buffers = {
            name: None if b is None else {"dtype": _dtype_name(b.dtype), "shape": list(b.shape)}
            for name, b in self._buffers.items()
        }
        return {
            "kind": self.kind,
            "inputs": list(self._input_roles),
            "options": self.options,
            "grids": grids,
            "buffers": buffers,
        }

    @staticmethod
    def from_config(config: dict[str, Any]) -> "QLayer":
        """The layer described by `config`, its buffers zero: load its state dict next."""
        self = layer_class(config["kind"]).__new__(layer_class(config["kind"]))
        nn.Module.__init__(self)
        self.name = ""
        self.options = dict(config["options"])
        self._input_roles = list(config["inputs"])
        self._grids = {role: {**meta, "dtype": _dtype(meta["dtype"])} for role, meta in config["grids"].items()}
        for name, spec in config["buffers"].items():
            self.register_buffer(name, spec and torch.zeros(spec["shape"], dtype=_dtype(spec["dtype"]), device="cpu"))
        self._derived = None
        self.training = False
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QLayer":
        """Moves between devices; a cast (`model.half()`) leaves scales and bias in float32, where the contract is."""
        floats = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        self._derived = None
        for name, before in floats.items():
            after = self._buffers[name]
            if after.dtype is not before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": None}

    def extra_repr(self) -> str:
        grids = " -> ".join(
            ", ".join(self._describe(role) for role in roles)
            for roles in (self._input_roles, ["output"] if "output" in self._grids else [])
            if roles
        )
        shown = {name: value for name, value in self.options.items() if value is not None and value is not False}
        options = ", ".join(f"{name}={value}" for name, value in shown.items() if not self._is_usual(name, value))
        return "; ".join(part for part in (options, grids) if part)

    def _is_usual(self, name: str, value: Any) -> bool:
        """Whether an option has the value that the description leaves out, in every spatial dimension."""
        usual = self.usual.get(name)
        return value == usual or (isinstance(value, list) and bool(value) and all(v == usual for v in value))

    def _describe(self, role: str) -> str:
        meta = self._grids[role]
        scale = self._buffers[f"{role}_scale"]
        if scale.numel() != 1:
            return f"{_dtype_name(meta['dtype'])} per channel of axis {meta['axis']}"
        value, zero_point = self._numbers(role)
        return f"{_dtype_name(meta['dtype'])}({value:.4g}, {zero_point})"


def described(x: Any) -> str:
    """What was given for a tensor, for a message."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {_dtype_name(d): d for d in OUTPUT_DTYPES}


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise CheckpointError(f"load: dtype must be one of {sorted(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
