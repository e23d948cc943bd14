"""Part graph: what is captured in a CUDA graph gives, replayed, the bits of an eager repetition from the same state."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import device
import torch
import torch.nn.functional as F
from cases import Cases
from device import all_equal, tensors
from gpu_networks import NETWORKS, TRAINED, batches, float_network
from model_cases import calibrated
from op_cases import CUDA_OPS, PACKED, detached
from torch import Tensor, nn
from weighted_cases import some_linear, weighted_calls

import qkernels
from qkernels import ops

REPLAYS = 3
# Packing for inference is on the host and waits for the device; layers pack once, outside of a graph.
ON_THE_HOST = ("linear_pack", "conv_pack", "binary_weight_pack")


def copies(values: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in values]


@torch.no_grad()
def restore(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)


def repeat(step: Callable[[], Any], refill: Callable[[], Any], state: Sequence[Tensor] = ()) -> None:
    """Captures `step` and replays it on what `refill` writes to its inputs. Results, and the tensors of `state` that it
    changes, have the bits of an eager step from the same state.
    """
    replay, captured = device.capture(step)
    for _ in range(REPLAYS):
        refill()
        before = copies(state)
        replay()
        got = copies([*captured, *state])
        restore(state, before)
        eager = [*tensors(step()), *state]
        all_equal(got, copies(eager))


def shuffled(inputs: Sequence[Tensor]) -> None:
    """Other contents of the same kind: the same elements in another order."""
    for t in inputs:
        t.copy_(t.flatten()[torch.randperm(t.numel(), device=t.device)].reshape(t.shape))


def one_call(call: Callable[..., Any], make: Callable[[], tuple]) -> None:
    """Its first argument is what may have any contents: not packed bytes or a grid."""
    arguments = detached(make())
    inputs = tensors([arguments[0]])
    if all(t.numel() > 0 for t in inputs):  # else nothing is launched
        repeat(lambda: call(*arguments), lambda: shuffled(inputs), tensors(arguments))


def inference(m: int, n: int, k: int) -> None:
    packed, x = some_linear(m, n, k)
    grid = device.on((torch.tensor([0.05]), torch.zeros(1, dtype=torch.int32)))
    y = torch.randn(m, n, device=device.NAME)
    step = lambda: (ops.linear(x, packed, n), ops.fake_quant(y, *grid, None, -128, 127))  # noqa: E731
    repeat(step, lambda: (x.copy_(torch.randint_like(x, 0, 256)), y.normal_()))


def packed_in_training() -> None:
    """The weight is packed on the device within the graph, and multiplied."""
    weight, x = device.on((torch.randint(-128, 128, (96, 80)).to(torch.int8), torch.randint(0, 256, (40, 80)).byte()))
    scale, bias = torch.full((96,), 0.01, device=device.NAME), torch.randn(96, device=device.NAME)
    grid = device.on((torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)))

    def step() -> Tensor:
        packed = ops.pack_on_grid(weight, scale, None, bias, *grid, torch.uint8)
        return ops.linear(x, packed, 96, torch.float32)

    repeat(step, lambda: (shuffled([weight, x]), bias.normal_()))


def noise() -> None:
    """Without a seed each replay rounds gradients with noise of its own."""
    x = torch.randn(64, 300, device=device.NAME, requires_grad=True)
    step = lambda: torch.autograd.grad(ops.round_gradient(x, 2).sin().sum(), x)  # noqa: E731
    replay, [gradient] = device.capture(step)
    replay()
    [first] = copies([gradient])
    replay()
    assert gradient.isfinite().all()
    assert not torch.equal(first, gradient), "two replays draw the same noise"


def network(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """A whole converted network."""
    model = calibrated(float_network(make), batches(shape)).to(device.NAME)
    x = device.on(batches(shape, 1)[0])
    with torch.no_grad():
        repeat(lambda: model(x), x.normal_)


def training_step(rule: str, optimizer: str) -> None:
    """Forward, backward and optimizer of a network in training, on grids that move."""
    make, shape = TRAINED
    x, y = torch.randn(shape, device=device.NAME), torch.randint(0, 10, shape[:1], device=device.NAME)
    model = qkernels.prepare_qat(float_network(make).train(), batches(shape, 1)[0], rule=rule).to(device.NAME)
    if optimizer == "SGD":
        update = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    else:
        update = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=device.NAME == "cuda")

    def step() -> tuple[Tensor, ...]:
        update.zero_grad(set_to_none=True)
        output = model(x)
        loss = F.cross_entropy(output, y)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        update.step()
        return output.detach(), loss.detach(), *gradients  # no graph of autograd outlives its step

    def refill() -> None:
        x.normal_()
        y.random_(0, 10)

    # Else the order of sums is anybody's.
    with device.cudnn(deterministic=True, benchmark=False):
        for _ in range(3):  # grids begin, and the optimizer's state
            step()
        of_optimizer = [t for s in update.state.values() for t in s.values() if isinstance(t, Tensor)]
        state = [*model.parameters(), *model.buffers(), *(t for t in of_optimizer if t.device.type == device.NAME)]
        before = copies(state)
        first = copies([*step(), *state])
        restore(state, before)
        try:
            all_equal(copies([*step(), *state]), first)
        except AssertionError as error:
            raise AssertionError(f"eager steps from one state differ already, {error}") from None
        repeat(step, refill, state)


def graph(small: bool) -> Cases:
    from opcheck_samples import SAMPLES

    for size in [(4, 512, 1024), (16, 256, 8192), (200, 256, 512)]:  # few rows; a split of K; tiles
        yield f"linear {size}", functools.partial(inference, *size)
    for op in [name for name in CUDA_OPS if name not in PACKED and name not in ON_THE_HOST] + ["pack_on_grid"]:
        call = getattr(torch.ops.qkernels, op).default
        for number, make in enumerate(SAMPLES[op]):
            yield f"{op} sample {number}", functools.partial(one_call, call, lambda make=make: device.on(make()))
    for name, call, make in weighted_calls():
        yield name, functools.partial(one_call, call, make)
    yield "pack_on_grid and linear", packed_in_training
    yield "gradients rounded without a seed", noise
    for name, (make, shape) in NETWORKS.items():
        yield f"network {name}", functools.partial(network, make, shape)
    for rule, optimizer in (("ste", "SGD"), ("ste", "Adam"), ("lsq", "SGD"), ("lsq", "Adam")):
        yield f"training step, {rule}, {optimizer}", functools.partial(training_step, rule, optimizer)
