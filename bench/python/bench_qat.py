"""A training step with quantization against a float step: time ratios, one thread.

    python bench/python/bench_qat.py [--json FILE] [--model mnist mobilenet_v2] [--rounds 15] [--threads 1]

A step is forward, loss, backward and SGD with momentum, in training mode with live batch norms, on one batch. Engines:
float (torch), qat_float and qat_int8 (`prepare_qat` with forward="float" and "int8"), lsq_int8 (the same with learned
grids), ao (torch.ao FX, default QAT config of x86). They take turns, one step at a time, in one process; a ratio is the
median of the ratios of neighbours, "best" that of the shortest times, for busy machines. Models are channels_last.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import commit, machine, output_file, write_json
from torch import nn

import qkernels
from qkernels.bench.networks import float_network


class Mnist(nn.Module):
    """The network of NNI's quantization tutorial."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)
        self.relu1 = nn.ReLU6()
        self.relu2 = nn.ReLU6()
        self.relu3 = nn.ReLU6()
        self.max_pool1 = nn.MaxPool2d(2, 2)
        self.max_pool2 = nn.MaxPool2d(2, 2)
        self.batchnorm1 = nn.BatchNorm2d(20)

    def forward(self, x):
        x = self.max_pool1(self.relu1(self.batchnorm1(self.conv1(x))))
        x = self.max_pool2(self.relu2(self.conv2(x)))
        x = x.reshape(-1, 4 * 4 * 50)
        x = self.fc2(self.relu3(self.fc1(x)))
        return F.log_softmax(x, dim=1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mnist": (Mnist, (64, 1, 28, 28), 10),
    "mobilenet_v2": (lambda: float_network("mobilenet_v2"), (16, 3, 224, 224), 1000),
}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def ao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (x,))


ENGINES: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "float": lambda model, x: model,
    "qat_float": lambda model, x: qkernels.prepare_qat(model, x, forward="float"),
    "qat_int8": lambda model, x: qkernels.prepare_qat(model, x, forward="int8"),
    "lsq_int8": lambda model, x: qkernels.prepare_qat(model, x, rule="lsq", forward="int8"),
    "ao": ao,
}


def step_of(engine: str, model: str) -> Callable[[], None]:
    make, shape, classes = MODELS[model]
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    y = torch.randint(0, classes, (shape[0],))
    trained = ENGINES[engine](make().to(memory_format=torch.channels_last), x).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()

    return step


def measure(model: str, engines: list[str], rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    steps = {engine: step_of(engine, model) for engine in engines}
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for turn in range(rounds + 2):
        for engine, step in steps.items():
            start = clock()
            step()
            if turn >= 2:
                times[engine].append(clock() - start)
    result = {}
    for engine in engines:
        ratios = [t / f for t, f in zip(times[engine], times["float"], strict=True)]
        result[engine] = {
            "ms": 1e3 * statistics.median(times[engine]),
            "ratio": statistics.median(ratios),
            "best_ms": 1e3 * min(times[engine]),
            "best_ratio": min(times[engine]) / min(times["float"]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--engine", nargs="+", choices=sorted(ENGINES), default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=0, help="0: 60 for mnist, 8 for mobilenet_v2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: less sensitive to a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engines = ["float", *(e for e in options.engine if e != "float")]
    payload = {"machine": machine(), "commit": commit(), "torch": torch.__version__, "threads": options.threads}
    payload["clock"] = options.clock
    results = payload["results"] = {}
    for model in options.model:
        rounds = options.rounds or (60 if model == "mnist" else 8)
        results[model] = measure(model, engines, rounds, CLOCKS[options.clock])
        print(f"{model}: {rounds} rounds, batch {MODELS[model][1][0]}")
        for engine, row in results[model].items():
            print(
                f"  {engine:<10} {row['ms']:9.1f} ms  ratio {row['ratio']:.2f}   best {row['best_ms']:9.1f} ms "
                f" ratio {row['best_ratio']:.2f}"
            )
    if options.json:
        write_json(options.json, payload)


if __name__ == "__main__":
    main()
