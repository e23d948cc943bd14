"""The native side of a compiled plan: tensors in, tensors out, through addresses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels import _C
from qkernels.errors import InvalidArgument, InvalidState, InvalidType

DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_STRIDED = torch.strided
_REMEMBERED = 64  # layouts of inputs whose outputs are known


def plan_checksum(data: bytes, skip: int = -1) -> int:
    """The checksum of a plan file; the 8 bytes at `skip` count as zero. See csrc/plan/format.h."""
    return _C.plan_checksum(data, skip)


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
        self.inputs = [(name, DTYPES[dtype], tuple(sizes)) for name, dtype, sizes in self.packed.inputs]
        self._dtypes = tuple(dtype for _, dtype, _ in self.inputs)
        self._specs: dict[Any, list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]] = {}

    def _pack(self) -> "_C.Plan":
        return _C.Plan(self.data, self.cache_bytes)

    @property
    def metadata(self) -> str:
        return self.packed.metadata

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs.

        Raises:
            InvalidType, InvalidArgument: an input has the wrong dtype, shape or device; the message names it.
        """
        return self._run(tensors)[0]

    def profile(self, tensors: Sequence[Tensor]) -> list[int]:
        """Runs once; the nanoseconds of every step of `describe`."""
        return self._run(tensors, profile=True)[1]

    def describe(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Steps, kernels and memory for inputs of these sizes and strides."""
        layouts = [self._checked(i, x) for i, x in enumerate(tensors)]
        try:
            return self.packed.describe(layouts)
        except InvalidState:
            self.packed = self._pack()
            return self.packed.describe(layouts)

    def _run(self, tensors: Sequence[Tensor], profile: bool = False) -> tuple[list[Tensor], list[int]]:
        sources, key = [], []
        for x, dtype in zip(tensors, self._dtypes, strict=False):
            plain = type(x) is Tensor and x.layout is _STRIDED
            if not plain or x.dtype is not dtype or not x.is_cpu or x.is_neg():
                self._refuse(tensors)
            sizes, strides = x.shape, x.stride()
            sources.append((x.data_ptr(), sizes, strides))
            key.append((sizes, strides))
        key = tuple(key)
        packed, specs = self.packed, self._specs.get(key)
        if specs is None or len(tensors) != len(self._dtypes):
            specs = self._new_specs(tensors, key)
            packed = self.packed
        outputs, targets = [], []
        for dtype, sizes, strides, size in specs:
            out = torch.empty_strided(sizes, strides, dtype=dtype)
            outputs.append(out)
            targets.append((out.data_ptr(), size))
        try:
            return outputs, packed.profile(sources, targets) if profile else packed.run(sources, targets)
        except InvalidState:  # another instruction set is active now
            self.packed, self._specs = self._pack(), {}
            return self._run(tensors, profile)

    def _new_specs(self, tensors: Sequence[Tensor], key: Any) -> list:
        """Sizes and strides of the outputs, asked once for each layout of the inputs."""
        if len(tensors) != len(self.inputs):
            raise InvalidArgument(f"plan: expected {len(self.inputs)} inputs, got {len(tensors)}")
        layouts = [self._checked(i, x) for i, x in enumerate(tensors)]
        try:
            found = self.packed.output_specs(layouts)
        except InvalidState:
            self.packed = self._pack()
            found = self.packed.output_specs(layouts)
        specs = []
        for name, sizes, strides in found:
            dtype = DTYPES[name]
            specs.append((dtype, tuple(sizes), tuple(strides), _bytes(sizes, strides, dtype.itemsize)))
        if len(self._specs) >= _REMEMBERED:
            self._specs = {}
        self._specs[key] = specs
        return specs

    def _checked(self, i: int, x: Tensor) -> tuple[Sequence[int], Sequence[int]]:
        name, dtype, sizes = self.inputs[i]
        if not isinstance(x, Tensor):
            raise InvalidType(f"plan: {name} must be a tensor, got {type(x).__name__}")
        if x.layout is not torch.strided:
            raise InvalidType(f"plan: {name} must be a dense tensor, got {x.layout}")
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


def _bytes(sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    if 0 in sizes:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))) * itemsize
