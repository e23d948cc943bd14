"""Models are prepared in several threads at once, beside threads that use other models."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels
from qkernels.core.graph import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Slow(nn.Module):
    """Lets other threads run in the middle of its forward, and so in the middle of a trace."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        time.sleep(self.seconds)
        return x * self.scale


def network(seconds=0.0, seed=0):
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        Slow(seconds),
        nn.Conv2d(4, 2, 1),
        nn.Flatten(),
        nn.Linear(72, 5),
        nn.Softmax(-1),
    )
    return nn.Sequential(*layers).eval()


def converted_of(model):
    return qkernels.convert(qkernels.calibrate(qkernels.prepare(model, X, "int8-minmax"), [X]))


@pytest.fixture
def untouched():
    """Whether torch's own module class is as it was, whatever the test did to it."""
    own = nn.Module.__call__, nn.Module.__getattr__
    yield lambda: (nn.Module.__call__, nn.Module.__getattr__) == own
    nn.Module.__call__, nn.Module.__getattr__ = own


def test_models_are_prepared_in_four_threads_at_once(untouched):
    models = [network(0.01, seed) for seed in range(4)]
    expected = [converted_of(model)(X) for model in models]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda model: converted_of(model)(X), models))
    assert untouched()
    assert all(map(torch.equal, got, expected))


def faults_of(model, work):
    """What goes wrong with calls of `model` in another thread during `work`."""
    with torch.no_grad():
        expected = model(X)
    done, calls, faults = threading.Event(), [], []

    @torch.no_grad()
    def serve():
        while not done.is_set():
            try:
                if not torch.equal(model(X), expected):
                    faults.append("other bits")
            except Exception as error:
                faults.append(error)
            calls.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(4):
            work()
    finally:
        done.set()
        thread.join()
    assert len(calls) > 4
    return faults


@pytest.mark.parametrize("served", ["float", "converted", "plan"])
def test_models_are_served_while_another_thread_prepares(served, untouched):
    model = network()
    if served != "float":
        model = converted_of(model)
    if served == "plan":
        with pytest.warns(UserWarning, match="no integer step"):
            model = qkernels.compile(model, X)
    assert faults_of(model, lambda: qkernels.prepare(network(0.05), X)) == []
    assert untouched()


def test_a_model_is_served_while_another_thread_traces_it(untouched):
    model = network(0.02)
    assert faults_of(model, lambda: trace(model, (X,))) == []
    assert untouched()


def test_every_trace_is_one_that_other_threads_pass_by():
    package = Path(qkernels.__file__).parent
    own = package / "core" / "tracing.py"
    texts = {path: path.read_text() for path in package.rglob("*.py") if path != own}
    assert texts
    assert [path for path, text in texts.items() if "fx.Tracer" in text or "symbolic_trace" in text] == []
