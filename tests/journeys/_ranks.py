"""Run by test_distributed: one rank of a group of gloo processes. `python _ranks.py CASE RANK WORLD FILE`."""

import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import qkernels
from qkernels.core.corrections import AdaRound
from qkernels.core.prepare import quantizers
from qkernels.core.recipe import make_recipe
from qkernels.errors import CalibrationError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3))


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * (1 + step)


def shard(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return x.chunk(world)[rank]


def train(rank: int, world: int, rule: str) -> nn.Module:
    """Three steps of SGD on the shard of a rank, by a rule and perhaps "-" and its `start_step`."""
    rule, _, start = rule.partition("-")
    model = qkernels.prepare_qat(network(), batch(0), rule=rule, start_step=int(start or 0))
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        wrapped(shard(batch(step), rank, world)).square().mean().backward()
        optimizer.step()
    assert torch.equal(qkernels.convert(wrapped)(batch(0)), qkernels.convert(model)(batch(0)))
    return model


def calibrate(rank: int, world: int, observer: str) -> nn.Module:
    corrections = observer.split("-")[1:]
    if corrections == ["adaround"]:
        corrections = [AdaRound(samples=8, steps=20, batch=4, learning_rate=0.1)]
    model = qkernels.prepare(network(), batch(0), observer=observer.split("-")[0], corrections=corrections)
    with qkernels.calibrating(model):
        for step in range(4):
            model(shard(batch(step), rank, world))
    return model


def started(rank: int, world: int, rule: str) -> nn.Module:
    """Learned grids of activations with the least error on the first batch of all ranks."""
    recipe = make_recipe("int8", observer="moving_average", rule=rule, bits=4)
    activation = replace(recipe.activation, rule_options=(("init", "mse"),))
    model = qkernels.prepare_qat(network(), batch(0), recipe=replace(recipe, activation=activation))
    model(shard(batch(1), rank, world) + rank)
    return model


def faulty(rank: int, world: int, fault: str) -> nn.Module:
    """A second batch that is "nan" or "empty" on the last rank."""
    model, x = qkernels.prepare_qat(network(), batch(0)), shard(batch(1), rank, world).clone()
    model(shard(batch(0), rank, world))
    if rank == world - 1:
        x = x * float("nan") if fault == "nan" else x[:0]
    try:
        model(x).sum().backward()
    except CalibrationError:
        assert fault == "nan"
    else:
        assert fault == "empty"
    return model


def fsdp(rank: int, world: int, rule: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = qkernels.prepare_qat(network(), batch(0), rule=rule)
    model(batch(0))  # learned grids start
    if world > 1:
        mesh = dist.init_device_mesh("cpu", (world,))
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        model(shard(batch(step), rank, world)).square().mean().backward()
        optimizer.step()
    return model


def state(model: nn.Module) -> dict:
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        tensors[name] = value.detach().clone()
    tensors |= {f"{i} seen": torch.cat([q.observer.low, q.observer.high]) for i, q in enumerate(quantizers(model))}
    return tensors


if __name__ == "__main__":
    case, option, rank, world, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    torch.set_num_threads(1)
    if world > 1:
        patience = timedelta(seconds=60)  # a rank that waits for another forever is an error
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    cases = {"train": train, "calibrate": calibrate, "fsdp": fsdp, "started": started, "faulty": faulty}
    result = state(cases[case](rank, world, option))
    torch.save(result, f"{folder}/{case}_{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()
