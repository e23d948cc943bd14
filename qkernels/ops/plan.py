"""The native side of a compiled plan: tensors in, tensors out, through addresses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_tls_is_dispatch_key_included, _get_tracing_state, _len_torch_dispatch_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from qkernels import _C
from qkernels.errors import InvalidArgument, InvalidState, InvalidType, Unsupported

DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_STRIDED, _CPU = torch.strided, torch.device("cpu")
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_LOW_ADDRESS = 1 << 40  # most memory is above; a view of freed memory is at its offset
_REMEMBERED = 64  # layouts of inputs whose outputs are known


def plan_checksum(data: bytes, skip: int = -1) -> int:
    """The checksum of a plan file; the 8 bytes at `skip` count as zero. See csrc/plan/format.h."""
    return _C.plan_checksum(data, skip)


_Spec = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]  # dtype, sizes, strides, bytes


class _Packed:
    """A plan packed for one instruction set, and the outputs that it is known to give, by the layout of the inputs."""

    def __init__(self, plan: "_C.Plan"):
        self.plan = plan
        self.specs: dict[Any, list[_Spec]] = {}


class NativePlan:
    """The executor of one plan. Any number of threads may call it at once.

    Its weights are packed for one instruction set; if another one is active, the next call packs them again.
    `cache_bytes`: what the activations of a slice of the batch may fill; 0: most of this machine's L2.

    Raises:
        CheckpointError: the bytes are damaged, or of another version.
    """

    def __init__(self, data: bytes, cache_bytes: int = 0):
        self.data, self.cache_bytes = data, cache_bytes
        self.packed = self._pack()
        plan = self.packed.plan
        self.metadata, self.output_count = plan.metadata, plan.output_count
        self.inputs = [(name, DTYPES[dtype], tuple(sizes)) for name, dtype, sizes in plan.inputs]

    def _pack(self) -> _Packed:
        return _Packed(_C.Plan(self.data, self.cache_bytes))

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs.

        Raises:
            InvalidType, InvalidArgument: an input has the wrong dtype, shape or device, or no memory; the message
                names it.
            Unsupported: torch.jit.trace or make_fx records the call, of which they would see nothing.
        """
        return self._run(tensors)[0]

    def profile(self, tensors: Sequence[Tensor]) -> list[int]:
        """Runs once; the nanoseconds of every step of `describe`."""
        return self._run(tensors, profile=True)[1]

    def describe(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Steps, kernels and memory for inputs of these sizes and strides."""
        layouts = self._layouts(tensors)
        try:
            return self.packed.plan.describe(layouts)
        except InvalidState:
            self.packed = self._pack()
            return self.packed.plan.describe(layouts)

    def _run(self, tensors: Sequence[Tensor], profile: bool = False) -> tuple[list[Tensor], list[int]]:
        if _get_tracing_state() or _len_torch_dispatch_stack() or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
            _refuse_tracing()
        sources, key = [], []
        for x, (name, dtype, _) in zip(tensors, self.inputs, strict=False):
            plain = type(x) is Tensor and x.layout is _STRIDED
            if not plain or x.dtype is not dtype or not x.is_cpu or x.is_neg() or x.is_nested:
                self._refuse(tensors)
            sizes, strides = x.shape, x.stride()
            sources.append((_address(x, name), sizes, strides))
            key.append((sizes, strides))
        key, packed = tuple(key), self.packed
        try:
            specs = packed.specs.get(key)
            if specs is None or len(tensors) != len(self.inputs):
                specs = self._new_specs(packed, tensors, key)
            outputs, targets = [], []
            for dtype, sizes, strides, size in specs:
                out = torch.empty_strided(sizes, strides, dtype=dtype, device=_CPU)
                outputs.append(out)
                targets.append((_address(out), size))
            plan = packed.plan
            return outputs, plan.profile(sources, targets) if profile else plan.run(sources, targets)
        except InvalidState:  # another instruction set is active now
            self.packed = self._pack()
            return self._run(tensors, profile)

    def _new_specs(self, packed: _Packed, tensors: Sequence[Tensor], key: Any) -> list[_Spec]:
        """Sizes and strides of the outputs, asked once for each layout of the inputs."""
        specs = []
        for name, sizes, strides in packed.plan.output_specs(self._layouts(tensors)):
            dtype = DTYPES[name]
            specs.append((dtype, tuple(sizes), tuple(strides), _bytes(sizes, strides, dtype.itemsize)))
        if len(packed.specs) >= _REMEMBERED:
            packed.specs = {}
        packed.specs[key] = specs
        return specs

    def _layouts(self, tensors: Sequence[Tensor]) -> list[tuple[Sequence[int], Sequence[int]]]:
        if len(tensors) != len(self.inputs):
            raise InvalidArgument(f"plan: expected {len(self.inputs)} inputs, got {len(tensors)}")
        return [self._checked(i, x) for i, x in enumerate(tensors)]

    def _checked(self, i: int, x: Tensor) -> tuple[Sequence[int], Sequence[int]]:
        name, dtype, sizes = self.inputs[i]
        if not isinstance(x, Tensor):
            raise InvalidType(f"plan: {name} must be a tensor, got {type(x).__name__}")
        if x.layout is not torch.strided or x.is_nested:
            got = "a nested one" if x.is_nested else x.layout
            raise InvalidType(f"plan: {name} must be a dense tensor, got {got}")
        if x.dtype is not dtype:
            raise InvalidType(f"plan: {name} must be {dtype}, as in the example, got {x.dtype} {list(x.shape)}")
        if not x.is_cpu:
            raise InvalidArgument(f"plan: {name} must be on the CPU, got {x.device}")
        if x.is_neg():
            raise InvalidArgument(f"plan: {name} is a lazy negation; pass x.resolve_neg()")
        if x.dim() != len(sizes) or any(want not in (-1, got) for want, got in zip(sizes, x.shape, strict=True)):
            expected = ", ".join("any" if size == -1 else str(size) for size in sizes)
            raise InvalidArgument(f"plan: {name} must be [{expected}], got {list(x.shape)}")
        return x.shape, x.stride()

    def _refuse(self, tensors: Sequence[Tensor]) -> None:
        """Raises what is wrong with the inputs; a subclass of Tensor is all right if it is a plain one inside."""
        for i, x in enumerate(tensors[: len(self.inputs)]):
            self._checked(i, x)


def _address(x: Tensor, name: str | None = None) -> int:
    """Where the numbers of an input, or of an output if it has no name, begin."""
    try:
        address = x.data_ptr()
    except RuntimeError as error:
        raise InvalidArgument(_without_memory(name)) from error
    if address < _LOW_ADDRESS and address == x.storage_offset() * x.itemsize and x.numel():
        raise InvalidArgument(_without_memory(name))
    return address


def _without_memory(name: str | None) -> str:
    what = "an output" if name is None else f"input {name!r}"
    return f"plan: {what} has no memory (a fake, functional, zero or freed tensor)"


def _refuse_tracing() -> None:
    """Raises if torch records operations: it would see none of a plan's. Other modes may watch."""
    if _get_tracing_state() or get_proxy_mode() is not None:
        raise Unsupported("plan: cannot be traced; trace the converted modules")


def _bytes(sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    if 0 in sizes:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))) * itemsize
