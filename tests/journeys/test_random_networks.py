"""Any structure: what was evaluated is what runs, as modules, as a plan, and from a file."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from random_networks import RandomNetwork

import qkernels

EXAMPLE, OTHER, EMPTY = (2, 3, 8, 12), (1, 3, 10, 6), (0, 3, 8, 12)
RECIPES = ("int8", "int8-minmax", "w4a8", "int8-bias", "w2a2")
RULES = ("ste", "lsq", "lsq_plus", "range")


def check_everything_agrees(prepared, converted, folder):
    inputs = [torch.randn(shape) for shape in (EXAMPLE, OTHER, EMPTY)]
    report = qkernels.verify(prepared, converted, inputs[:2])
    assert report.total_mismatches == 0
    assert report.simulation_sqnr_db > 40.0  # a tie here and there may round to the other side
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "compile: torch runs")  # an activation between floats
        plan = qkernels.compile(converted, inputs[0])
    qkernels.save(converted, folder / "model.qk")
    runners = [plan, qkernels.load(folder / "model.qk")]
    if isinstance(plan, qkernels.Plan):
        plan.save(folder / "plan")
        runners.append(qkernels.load_plan(folder / "plan"))
    for x in inputs:
        expected = converted(x)
        for runner in runners:
            assert torch.equal(runner(x), expected)


@pytest.mark.parametrize("seed", range(40))
def test_calibrated_network_of_any_structure(seed, tmp_path):
    torch.manual_seed(seed)
    prepared = qkernels.prepare(RandomNetwork(seed).eval(), torch.randn(EXAMPLE), recipe=RECIPES[seed % len(RECIPES)])
    qkernels.calibrate(prepared, [torch.randn(EXAMPLE) for _ in range(2)])
    check_everything_agrees(prepared, qkernels.convert(prepared), tmp_path)


@pytest.mark.parametrize("seed", range(100, 124))
def test_trained_network_of_any_structure(seed, tmp_path):
    torch.manual_seed(seed)
    forward, rule = ("int8", "float")[seed % 2], RULES[seed // 2 % len(RULES)]
    prepared = qkernels.prepare_qat(RandomNetwork(seed), torch.randn(EXAMPLE), rule=rule, forward=forward)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(torch.randn(4, *EXAMPLE[1:])).square().mean().backward()
        optimizer.step()
    check_everything_agrees(prepared, qkernels.convert(prepared), tmp_path)
