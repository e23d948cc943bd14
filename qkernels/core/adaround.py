"""AdaRound: learns which weights to round up and which down, layer by layer, from calibration inputs alone.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization (2020).

Rounding to nearest minimizes the error of each weight, not that of what the layer computes. For a layer f with float
weight w on a grid of scale s, AdaRound minimizes over V, one number a weight,

    sum over channels of mean (act(f(x; w)) - act(f(x'; s * clamp(floor(w / s) + h(V)))))^2
        + regularization * sum(1 - |2 h(V) - 1|^beta)

x: the layer's input in the float model; x': in the rounded one, the layers before it done already; act: the clamp
fused into the layer. h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1), the rectified sigmoid, reaches 0 and 1; beta falls from
20 to 2 by a cosine, so that roundings are free first and decided in the end. Each starts where it leaves its weight
unchanged.

What was learned becomes the layer's weight_correction: with it added, rounding to nearest gives the chosen codes. A
layer on whose samples the result is no better than rounding to nearest keeps that.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from qkernels.core import graph as g
from qkernels.core import operations as o
from qkernels.core.bias import hooked, without_rounding
from qkernels.core.corrections import AdaRound
from qkernels.core.fusion import clamp_of, is_fused
from qkernels.core.layers import Prepared
from qkernels.core.lowering import Clamp
from qkernels.core.observers import as_first_rank
from qkernels.core.prepare import PreparedModel, prepared_layers
from qkernels.core.samples import Call, Samples

FIRST_BETA, LAST_BETA = 20.0, 2.0
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1


@torch.no_grad()
def learn_rounding(prepared: nn.Module, layers: Sequence[Prepared], samples: Samples, options: AdaRound) -> None:
    """Gives every one of `layers` a weight_correction that chooses the codes AdaRound finds."""
    calls = samples.first(options.samples)
    clamps = fused_clamps(prepared)
    generator = torch.Generator().manual_seed(options.seed)
    for layer in tqdm(in_order(prepared, layers, calls[0]), desc="adaround", unit="layer", disable=None):
        with without_rounding(prepared):
            _, expected = capture(prepared, layer, calls)
        inputs, _ = capture(prepared, layer, calls)
        problem = _Problem(layer, inputs, expected, clamps.get(layer, Clamp()), options)
        codes = problem.solve(generator)
        if problem.error(codes) < problem.error(problem.nearest()):
            layer.weight_correction.copy_(problem.weight_of(codes) - layer.rows(layer.weight))
        as_first_rank(layer.weight_correction)  # each has other samples


@torch.no_grad()
def rounded_weights(
    prepared: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    options: Callable[[int], AdaRound],
) -> dict[str, Tensor]:
    """The weights of all layers of `prepared`, whose grids are chosen, rounded as AdaRound finds, by their names.

    `forward(prepared, batch)` runs a batch, `options(n)` says how to learn from n samples.
    """
    layers, samples = [layer.with_corrections(["adaround"]) for layer in prepared_layers(prepared)], Samples(2**31)
    with prepared.register_forward_pre_hook(samples, with_kwargs=True):
        for batch in batches:
            forward(prepared, batch)
    learn_rounding(prepared, layers, samples, options(samples.count))
    return {layer.quantizers["weight"].source: layer.quantized_weight() for layer in layers}


class _Problem:
    """The reconstruction of one layer's output. Codes are float tensors in the layout of `layer.rows`."""

    def __init__(self, layer: Prepared, inputs: Tensor, expected: Tensor, clamp: Clamp, options: AdaRound):
        self.layer, self.inputs, self.clamp, self.options = layer, inputs, clamp, options
        self.expected = expected.clamp(clamp.low, clamp.high)
        self.spec = layer.quantizers["weight"].spec
        grid = layer.quantizers["weight"].qparams()
        rows = layer.rows(layer.weight)
        along_rows = [-1] + [1] * (rows.dim() - 1)
        with torch.inference_mode(False):  # a gradient goes by them
            self.scale = grid.scale.clone().reshape(along_rows)
            self.zero_point = grid.zero_point.to(torch.float32, copy=True).reshape(along_rows)
        self.position = rows / self.scale + self.zero_point
        self.below = torch.floor(self.position)

    def on_grid(self, codes: Tensor) -> Tensor:
        return codes.clamp(self.spec.qmin, self.spec.qmax)

    def nearest(self) -> Tensor:
        return self.on_grid(torch.round(self.position))

    def weight_of(self, codes: Tensor) -> Tensor:
        return (codes - self.zero_point) * self.scale

    def output(self, codes: Tensor, x: Tensor) -> Tensor:
        weight = self.layer.from_rows(self.weight_of(codes))
        return self.layer.compute(x, weight, self.layer.bias).clamp(self.clamp.low, self.clamp.high)

    def solve(self, generator: torch.Generator) -> Tensor:
        """The learned codes."""
        options, count = self.options, len(self.inputs)
        channel = 1 if not isinstance(self.layer, nn.Linear) else -1
        with torch.inference_mode(False), torch.enable_grad():
            v = start_of(self.position - self.below).requires_grad_()
            optimizer = torch.optim.Adam([v], lr=options.learning_rate)
            for step in range(options.steps):
                chosen = torch.randint(count, (min(options.batch, count),), generator=generator, device="cpu")
                up = rectified_sigmoid(v)
                output = self.output(self.on_grid(self.below + up), self.inputs[chosen])
                loss = (output - self.expected[chosen]).square().sum(channel).mean()
                progress = step / options.steps
                if progress >= options.warm_start:
                    loss = loss + options.regularization * undecided(up, beta_at(progress, options.warm_start))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self.on_grid(self.below + (rectified_sigmoid(v.detach()) >= 0.5))

    def error(self, codes: Tensor) -> float:
        """The sum of squared errors over all samples."""
        batches = zip(self.inputs.split(self.options.batch), self.expected.split(self.options.batch), strict=True)
        return sum(float((self.output(codes, x) - y).double().square().sum()) for x, y in batches)


def rectified_sigmoid(v: Tensor) -> Tensor:
    return (torch.sigmoid(v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0.0, 1.0)


def start_of(fraction: Tensor) -> Tensor:
    """The v with rectified_sigmoid(v) == fraction."""
    return torch.logit((fraction - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))


def undecided(up: Tensor, beta: float) -> Tensor:
    """The number of roundings that are neither 0 nor 1, softly."""
    return (1.0 - (2.0 * up - 1.0).abs().pow(beta)).sum()


def beta_at(progress: float, warm_start: float) -> float:
    part = (progress - warm_start) / (1.0 - warm_start)
    return LAST_BETA + 0.5 * (FIRST_BETA - LAST_BETA) * (1.0 + math.cos(math.pi * part))


# --- what a layer reads and gives ------------------------------------------------------------------------------------


class _Stop(BaseException):
    """The layer that was waited for has run. No Exception: fx prints the line of the graph for those."""


def capture(prepared: nn.Module, layer: Prepared, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """The input and output of `layer` over `calls`, samples in dimension 0; what comes after it does not run."""
    inputs, outputs = [], []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)
        raise _Stop

    with hooked([layer], note):
        for args, kwargs in calls:
            with contextlib.suppress(_Stop):
                prepared(*args, **kwargs)
    return torch.cat(inputs), torch.cat(outputs)


def in_order(prepared: nn.Module, layers: Sequence[Prepared], call: Call) -> list[Prepared]:
    """Those of `layers` that run, in the order of execution."""
    order: dict[Prepared, None] = {}
    args, kwargs = call

    def note(layer: Prepared, inputs: tuple, output: Tensor) -> None:
        order.setdefault(layer)

    with hooked(layers, note):
        prepared(*args, **kwargs)
    return list(order)


def fused_clamps(prepared: nn.Module) -> dict[Prepared, Clamp]:
    """The clamp behind each layer that has one as its only reader."""
    found = {}
    for part in prepared.modules():
        if isinstance(part, PreparedModel):
            modules = g.modules_of(part)
            for node in part.graph.nodes:
                layer = modules.get(node.target) if node.op == "call_module" else None
                if isinstance(layer, Prepared) and (clamp := _clamp_behind(node, modules)) is not None:
                    found[layer] = clamp
    return found


def _clamp_behind(node: fx.Node, modules: dict[str, nn.Module]) -> Clamp | None:
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    op = o.operation(reader, modules)
    if op is None or op.kind not in o.CLAMPS or not is_fused(o.operation(node, modules).kind, op.kind):
        return None
    return clamp_of(op)
