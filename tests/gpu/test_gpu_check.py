"""`make gpu-check` refuses clearly where nothing can be checked, its cases are sound on the CPU, and no failure, crash
or hang of one case hides the others."""

import dataclasses
import itertools
import json
import os
import shutil
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
    for case in itertools.islice(cases.linear_cases(small=True), 0, None, 11):
        pack, epilogue, x, residual = case.arguments()
        out = ops.linear(x, ops.linear_pack(*pack, epilogue), case.n, case.dtype, residual)
        assert out.dtype == case.dtype, case.name
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


@pytest.mark.parametrize("which", ["linear_cases", "wgmma_cases"])
def test_its_full_linear_cases_can_be_packed(cases, which):
    """The sums fit whatever a case is on: one row of the weight shows it."""
    everything = list(getattr(cases, which)(small=False))
    for case in everything:
        pack, epilogue, *_ = dataclasses.replace(case, m=1, n=1).arguments()
        ops.linear_pack(*pack, epilogue)
    assert len({case.name for case in everything}) == len(everything)


def test_its_full_convolutions_can_be_packed(cases):
    names = []
    for name, pack, geometry, _, _, epilogue, _ in cases.conv_cases(small=False):
        ops.conv_pack(*pack, epilogue, **geometry)
        names.append(name)
    assert len(set(names)) == len(names)


def test_wgmma_meets_every_type_around_every_edge(cases):
    everything = list(cases.wgmma_cases(small=False))
    types = {(case.dtype, case.input_dtype) for case in everything}
    assert len(types) == 12
    for size in {(case.m, case.n, case.k) for case in everything}:
        assert {(c.dtype, c.input_dtype) for c in everything if (c.m, c.n, c.k) == size} == types
    for case in everything:  # what csrc/gemm/cuda.cu asks for
        assert (case.m >= 65, case.zero_points, case.lies) == (True, False, "aligned")


PLAN = """
#include <iostream>
#include "csrc/conv/cuda.h"
int main() {
  const qk::CudaMachine h100{90, 132, 227 << 10, 228 << 10};
  long m, n, k, groups, is_conv;
  while (std::cin >> m >> n >> k >> groups >> is_conv) {
    const auto tiles = is_conv ? qk::cuda::kConvCudaTiles : qk::kAllCudaTiles;
    const auto plan = qk::plan_cuda_gemm(m, n, qk::cuda_depth(k), groups, h100, tiles);
    std::cout << plan.tile << ' ' << plan.splits << '\\n';
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the plan with")
def test_its_cases_reach_every_tile(cases, tmp_path):
    """On a GPU of 132 multiprocessors, by the plan itself."""
    source, root = tmp_path / "plan.cc", HERE.parents[1]
    source.write_text(PLAN)
    command = ["g++", "-std=c++20", f"-I{root / 'tests/simt'}", f"-I{root}", source, "-o", tmp_path / "plan"]
    subprocess.run(command, check=True)

    def tiles(layers: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        text = "\n".join(" ".join(map(str, layer)) for layer in layers)
        plan = subprocess.run([tmp_path / "plan"], input=text, capture_output=True, text=True, check=True).stdout
        return [tuple(map(int, line.split())) for line in plan.splitlines()]

    linear = tiles([(m, n, k, 1, 0) for m, n, k in cases.TILED_LINEAR])
    assert {tile for tile, _ in linear} == {0, 1, 2, 3, 4}
    assert any(splits > 1 for _, splits in linear)
    layers = []
    for inner, outer, _, kernel, stride, padding, dilation, transposed, _, size in cases.TILED_CONV:
        rows, columns = ops.conv_output_size(size, kernel, stride, padding, dilation, transposed)
        layers.append((2 * rows * columns, outer, kernel[0] * kernel[1] * inner, 1, 1))
    conv = tiles(layers)
    assert {tile for tile, _ in conv} == {1, 2, 3, 4}
    assert any(splits > 1 for _, splits in conv)


def test_every_cuda_op_is_in_its_list(cases, monkeypatch):
    """What gpu-check compares is what the architecture test demands."""
    monkeypatch.syspath_prepend(str(HERE.parent / "architecture"))
    monkeypatch.syspath_prepend(str(HERE.parent / "ops"))
    import test_op_table

    assert sorted(cases.CUDA_OPS) == sorted(test_op_table.CUDA_OPS)


@pytest.mark.parametrize("part", ["linear", "wgmma", "conv", "rows", "floats", "ops", "model"])
def test_its_cases_pass_where_the_gpu_is_the_cpu(cases, monkeypatch, part):
    """The code of the cases itself, with the CPU in the place of the GPU."""
    if part == "wgmma":
        monkeypatch.setenv("QKERNELS_WGMMA", "0")  # so that it is put back
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    move = cases.on
    monkeypatch.setattr(cases, "on", lambda device, values: move("cpu", values))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: to(self, "cpu"))
    empty = torch.empty
    on_cpu = lambda k: {**k, "device": "cpu"} if k.get("device") == "cuda" else k  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **on_cpu(k)))
    first, step = {"linear": (0, 17), "wgmma": (1, 5)}.get(part, (0, 1))  # wgmma's first is about the kernel alone
    names = []
    for name, run in itertools.islice(cases.cases_of(part, True), first, None, step):
        run()
        names.append(name)
    assert len(set(names)) == len(names)
    assert names


def test_an_input_keeps_its_rows_and_its_alignment(cases, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(cases, "on", lambda device, values: tuple(values))
    empty, linear, seen = torch.empty, ops.linear, []
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(*a, **k))
    monkeypatch.setattr(
        ops, "linear", lambda x, *rest: seen.append((x.storage_offset(), x.stride())) or linear(x, *rest)
    )
    for lies, expected in [("aligned", (0, 112)), ("off by one", (1, 112)), ("dense", (0, 100)), ("apart", (2, 103))]:
        seen.clear()
        cases.compare_linear(cases.LinearCase(0, 17, 65, 100, torch.uint8, torch.uint8, False, lies))
        assert seen == [(expected[0], (expected[1], 1))] * 2


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
cases = [("fine", lambda: 1.5), ("wrong", fail), ("crash", crash), ("middle", MIDDLE), ("last", lambda: 2)]
for number, (name, run) in enumerate(cases):
    if number < first: continue
    say(start=number, name=name)
    try: say(result=run())
    except ValueError as error: say(error=str(error))
say(done=True)
"""


def run_child(gpu_check, tmp_path, middle: str, seconds: float):
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("MIDDLE", middle))
    command = lambda first: [sys.executable, str(script), str(first)]  # noqa: E731
    return gpu_check.run_part(gpu_check.Part("linear"), command, time.monotonic() + seconds)


def test_a_failure_and_a_crash_do_not_hide_what_follows(gpu_check, tmp_path):
    part = run_child(gpu_check, tmp_path, "lambda: None", 60)
    assert (part.verdict, part.passed) == ("FAILED", 3)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]
    assert part.failures[0]["error"] == "differs"
    assert "status -6" in part.failures[1]["error"]
    assert part.results == {"fine": 1.5, "last": 2}
    json.dumps(part.to_json())


@pytest.fixture
def impatient(gpu_check, monkeypatch):
    for limit in ("LEAST_SECONDS", "CASE_SECONDS", "START_SECONDS"):
        monkeypatch.setattr(gpu_check, limit, 4)


@pytest.mark.usefixtures("impatient")
def test_a_case_that_hangs_is_ended_and_what_follows_runs(gpu_check, tmp_path):
    part = run_child(gpu_check, tmp_path, "hang", 60)
    assert [f["case"] for f in part.failures] == ["wrong", "crash", "middle"]
    assert "did not end in 4 s" in part.failures[-1]["error"]
    assert part.results == {"fine": 1.5, "last": 2}
    assert part.seconds < 30


@pytest.mark.usefixtures("impatient")
def test_every_case_has_a_limit_of_its_own(gpu_check, tmp_path):
    part = run_child(gpu_check, tmp_path, 'lambda: time.sleep(2.6)), ("more", lambda: time.sleep(2.6)', 60)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]


@pytest.mark.usefixtures("impatient")
def test_a_slow_case_has_the_time_that_it_needs(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.SLOW_CASES, "middle", 30)
    part = run_child(gpu_check, tmp_path, "lambda: time.sleep(6)", 60)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]


def test_a_case_is_not_blamed_for_the_end_of_the_time(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0)
    part = run_child(gpu_check, tmp_path, "hang", 6)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]
    assert part.note == "stopped at case 3: the time is up"


@pytest.mark.usefixtures("impatient")
def test_a_part_that_hangs_again_and_again_leaves_time_for_others(gpu_check, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("MIDDLE", "hang").replace("os.abort()", "hang()"))
    part = gpu_check.run_part(
        gpu_check.Part("linear"), lambda first: [sys.executable, str(script), str(first)], time.monotonic() + 60
    )
    assert [f["case"] for f in part.failures] == ["wrong", "crash", "middle"]
    assert part.note == "given up after 2 cases that hang"


def test_what_does_not_end_is_ended_with_all_that_it_started(gpu_check, tmp_path):
    script = f"(sleep 3; touch {tmp_path}/made) & sleep 600"
    assert gpu_check.run(["sh", "-c", script], 1) == (None, "")
    time.sleep(3)
    assert not (tmp_path / "made").exists()


def test_a_complaint_is_no_reason_to_refuse(gpu_check, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.stderr.write('a warning')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from qkernels import _C

    for arch in _C.cuda_archs.split():
        assert gpu_check.why_unfit(arch) == ""
    assert "this GPU needs sm_1, and" in gpu_check.why_unfit("sm_1")
    assert "it is built for" in gpu_check.why_unfit("sm_1")


def test_it_builds_for_this_gpu_whatever_the_environment_says(gpu_check, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    real = gpu_check.run
    for is_fit in (False, True):
        answers, commands = iter(["" if is_fit else "it is built for the CPU only", ""]), []
        monkeypatch.setattr(gpu_check, "why_unfit", lambda arch, answers=answers: next(answers))

        def run(command, seconds, commands=commands, **environment):
            commands.append(command)
            commands.append(real(["sh", "-c", "echo $FORCE_CUDA $TORCH_CUDA_ARCH_LIST"], 60, **environment))
            return 0, ""

        monkeypatch.setattr(gpu_check, "run", run)
        gpu_check.build(torch)
        assert commands[0][1:4] == ["setup.py", "build_ext", "--inplace"]
        assert ("--force" in commands[0]) != is_fit
        assert commands[1] == (0, "1 9.0\n")


@pytest.mark.usefixtures("impatient")
def test_what_was_found_is_written_after_every_part(gpu_check, tmp_path, monkeypatch, capsys):
    script, path = tmp_path / "child.py", tmp_path / "gpu.json"
    script.write_text(CHILD.replace("MIDDLE", "hang").replace("sys.argv[1]", "sys.argv[4]"))
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    assert gpu_check.run_all(["linear", "conv"], False, {"gpu": "none"}, path, time.monotonic() + 60) == 1
    found = json.loads(path.read_text())
    assert found["gpu"] == "none"
    assert {name: part["verdict"] for name, part in found["parts"].items()} == {"linear": "FAILED", "conv": "FAILED"}
    assert "2 parts failed" in capsys.readouterr().out
    assert gpu_check.run_all(["linear"], False, {}, path, time.monotonic()) == 0  # nothing was run: the time is up
    assert json.loads(path.read_text())["parts"]["linear"]["verdict"] == "skipped"


HIDE = """
import importlib.util, sys
hidden = ("tqdm", "safetensors")
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
"""


@pytest.mark.parametrize("part", ["linear", "ops", "model"])
def test_a_child_needs_torch_and_numpy_alone(tmp_path, part):
    """The process of a part comes to its first case where neither tqdm nor safetensors is installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    command = [sys.executable, SCRIPT, "--child", part, "--small"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.stdout.startswith('@{"start": 0'), run.stderr
    assert "ModuleNotFoundError" not in run.stdout + run.stderr


def test_a_model_is_converted_without_tqdm_and_safetensors(tmp_path):
    script = """
import stand_ins, torch, qkernels
prepared = qkernels.prepare(torch.nn.Linear(3, 2), torch.randn(2, 3))
qkernels.calibrate(prepared, [torch.randn(2, 3)])
model = qkernels.convert(prepared)
try:
    qkernels.save(model, "model.qk")
except ModuleNotFoundError as error:
    print(error)
"""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join(map(str, (tmp_path, HERE, HERE.parents[1])))
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert "cannot be saved" in run.stdout, run.stderr
