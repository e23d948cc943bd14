"""Two gloo processes on two shards do what one process does on all the data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(qkernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
SCRIPT = Path(__file__).with_name("_ranks.py")


def ranks(folder: Path, case: str, option: str, world: int) -> list[dict[str, torch.Tensor]]:
    command = [sys.executable, str(SCRIPT), case, option]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        for rank in range(world)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    return [torch.load(folder / f"{case}_{world}_{rank}.pt", weights_only=True) for rank in range(world)]


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if tolerance:
            torch.testing.assert_close(
                other[name].float(), value.float(), rtol=tolerance, atol=tolerance, msg=f"{name} differs"
            )
        else:
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram"])
def test_ranks_on_shards_calibrate_like_one_process(tmp_path, observer):
    (alone,), both = ranks(tmp_path, "calibrate", observer, 1), ranks(tmp_path, "calibrate", observer, 2)
    assert_alike(both[0], both[1], 0)
    assert_alike(alone, both[0], 1e-3 if observer == "histogram" else 0)


@pytest.mark.parametrize("correction", ["bias", "adaround"])
def test_ranks_find_the_same_corrections(tmp_path, correction):
    (alone,) = ranks(tmp_path, "calibrate", f"minmax-{correction}", 1)
    both = ranks(tmp_path, "calibrate", f"minmax-{correction}", 2)
    assert_alike(both[0], both[1], 0)
    assert any(value.any() for name, value in both[0].items() if "correction" in name)
    if correction == "bias":  # the means of all samples; the roundings are those of the first rank
        assert_alike(alone, both[0], 1e-5)


@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_ranks_train_like_one_process(tmp_path, rule):
    (alone,), both = ranks(tmp_path, "train", rule, 1), ranks(tmp_path, "train", rule, 2)
    assert_alike(both[0], both[1], 0)
    if rule == "ste":  # a learned grid starts from the first batch of a rank
        assert_alike(alone, both[0], 2e-2)


@pytest.mark.parametrize("rule", ["lsq", "lsq_plus", "range"])
def test_ranks_train_learned_grids_that_wait_at_first(tmp_path, rule):
    assert_alike(*ranks(tmp_path, "train", f"{rule}-2", 2), 0)


@pytest.mark.parametrize("rule", ["lsq", "lsq_plus"])
def test_ranks_start_from_the_same_grids(tmp_path, rule):
    assert_alike(*ranks(tmp_path, "started", rule, 2), 0)


@pytest.mark.parametrize("fault", ["nan", "empty"])
def test_a_fault_on_one_rank_does_not_leave_the_others_waiting(tmp_path, fault):
    assert_alike(*ranks(tmp_path, "faulty", fault, 2), 0)


@pytest.mark.parametrize("rule", ["ste", "lsq"])
def test_fully_sharded_ranks_train_like_one_process(tmp_path, rule):
    (alone,), both = ranks(tmp_path, "fsdp", rule, 1), ranks(tmp_path, "fsdp", rule, 2)
    assert_alike(both[0], both[1], 0)
    assert_alike(alone, both[0], 2e-2)
