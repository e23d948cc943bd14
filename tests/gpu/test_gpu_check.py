"""`make gpu-check` refuses clearly where nothing can be checked, its cases are sound on the CPU, and no failure, crash
or hang of one case hides the others."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qkernels import ops

HERE = Path(__file__).parent
SCRIPT = HERE / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import gpu_check

    return gpu_check


@pytest.fixture
def cases(gpu_check):
    import cases

    return cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make gpu-check`")
def test_without_a_gpu_it_says_so_and_fails():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.startswith("gpu-check: nothing was checked: ")


def test_its_linear_cases_run_on_the_cpu(cases):
    dtypes, codes = set(), set()
    for name, pack, epilogue, x, residual in itertools.islice(cases.linear_cases(small=True), 0, None, 11):
        out = ops.linear(x, ops.linear_pack(*pack, epilogue), pack[0].shape[0], epilogue.dtype, residual)
        assert out.dtype == epilogue.dtype, name
        dtypes.add(out.dtype)
        if out.dtype == torch.uint8:
            codes |= set(out.unique().tolist())
    assert len(dtypes) == 6
    assert len(codes) > 64  # not all clamped


def test_its_convolutions_run_on_the_cpu(cases):
    for name, pack, geometry, x, residual, epilogue, size in cases.conv_cases(small=True):
        outputs = pack[0].shape[1] * geometry["groups"] if geometry["transposed"] else pack[0].shape[0]
        out = ops.conv(x, ops.conv_pack(*pack, epilogue, **geometry), residual, outputs, size, epilogue.dtype)
        assert list(out.shape) == [2, outputs, *size], name


def test_every_cuda_op_is_in_its_list(cases, monkeypatch):
    """What gpu-check compares is what the architecture test demands."""
    monkeypatch.syspath_prepend(str(HERE.parent / "architecture"))
    monkeypatch.syspath_prepend(str(HERE.parent / "ops"))
    import test_op_table

    assert sorted(cases.CUDA_OPS) == sorted(test_op_table.CUDA_OPS)


@pytest.mark.parametrize("part", ["linear", "rows", "floats", "ops", "model"])
def test_its_cases_pass_where_the_gpu_is_the_cpu(cases, monkeypatch, part):
    """The code of the cases itself, with the CPU in the place of the GPU."""
    move = cases.on
    monkeypatch.setattr(cases, "on", lambda device, values: move("cpu", values))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: to(self, "cpu"))
    empty = torch.empty
    on_cpu = lambda k: {**k, "device": "cpu"} if k.get("device") == "cuda" else k  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **on_cpu(k)))
    step = 17 if part == "linear" else 1
    names = []
    for name, run in itertools.islice(cases.cases_of(part, True), 0, None, step):
        run()
        names.append(name)
    assert len(set(names)) == len(names)
    assert names


def test_bits_that_differ_are_named(cases):
    nan = float("nan")
    cases.equal(torch.tensor([1.0, nan]), torch.tensor([1.0, nan]))
    with pytest.raises(AssertionError, match=r"1 of 2 values differ, the first at \[1\]: 3.0 instead of 2.0"):
        cases.equal(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))


CHILD = """
import json, os, sys, time
first = int(sys.argv[1])
def say(**message): print("@" + json.dumps(message), flush=True)
def crash(): os.abort()
def hang(): time.sleep(600)
def fail(): raise ValueError("differs")
cases = [("fine", lambda: 1.5), ("wrong", fail), ("crash", crash), ("after", lambda: None), ("last", LAST)]
for number, (name, run) in enumerate(cases):
    if number < first: continue
    say(start=number, name=name)
    try: say(result=run())
    except ValueError as error: say(error=str(error))
say(done=True)
"""


def run_child(gpu_check, tmp_path, last: str, seconds: float):
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("LAST", last))
    command = lambda first: [sys.executable, str(script), str(first)]  # noqa: E731
    return gpu_check.run_part(gpu_check.Part("linear"), command, time.monotonic() + seconds)


def test_a_failure_and_a_crash_do_not_hide_what_follows(gpu_check, tmp_path):
    part = run_child(gpu_check, tmp_path, "lambda: 2", 60)
    assert (part.verdict, part.passed) == ("FAILED", 3)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]
    assert part.failures[0]["error"] == "differs"
    assert "status -6" in part.failures[1]["error"]
    assert part.results == {"fine": 1.5, "last": 2}
    json.dumps(part.to_json())


def test_a_case_that_hangs_is_ended_and_named(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1)
    began = time.monotonic()
    part = run_child(gpu_check, tmp_path, "hang", 4)
    assert time.monotonic() - began < 20
    assert part.failures[-1]["case"] == "last"
    assert "did not end" in part.failures[-1]["error"]


def test_what_was_found_is_written_after_every_part(gpu_check, tmp_path, monkeypatch, capsys):
    script, path = tmp_path / "child.py", tmp_path / "gpu.json"
    script.write_text(CHILD.replace("LAST", "lambda: 2").replace("sys.argv[1]", "sys.argv[4]"))
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    assert gpu_check.run_all(["linear", "conv"], False, {"gpu": "none"}, path, time.monotonic()) == 1
    found = json.loads(path.read_text())
    assert found["gpu"] == "none"
    assert {name: part["verdict"] for name, part in found["parts"].items()} == {"linear": "FAILED", "conv": "FAILED"}
    assert "2 parts failed" in capsys.readouterr().out
    late = time.monotonic() - gpu_check.BUDGET_SECONDS
    assert gpu_check.run_all(["linear"], False, {}, path, late) == 0  # nothing was run: the time is up
    assert json.loads(path.read_text())["parts"]["linear"]["verdict"] == "skipped"


def test_it_needs_torch_and_numpy_alone(tmp_path):
    """A model is prepared, calibrated and converted where neither tqdm nor safetensors is installed."""
    script = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tqdm", "safetensors"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("tqdm", "safetensors") else find(name, package)
sys.path[:0] = sys.argv[1:]
import stand_ins, torch, cases, qkernels
prepared = qkernels.prepare(torch.nn.Linear(3, 2), torch.randn(2, 3))
qkernels.calibrate(prepared, [torch.randn(2, 3)])
model = qkernels.convert(prepared)
try:
    qkernels.save(model, "model.qk")
except ModuleNotFoundError as error:
    print(error)
"""
    folders = [str(HERE), str(HERE.parents[1])]
    run = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert "cannot be saved" in run.stdout, run.stderr
