"""`make gpu-check` refuses clearly where nothing can be checked, takes no kernels of other sources for these, and no
failure, crash or hang of one case hides the others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import gpu_check

    return gpu_check


@pytest.fixture
def building(gpu_check):
    import building

    return building


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make gpu-check`")
def test_without_a_gpu_it_says_so_and_fails():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.startswith("gpu-check: nothing was checked: ")


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
        monkeypatch.setattr(gpu_check, limit, 3)


@pytest.mark.usefixtures("impatient")
def test_a_case_that_hangs_is_ended_and_what_follows_runs(gpu_check, tmp_path):
    part = run_child(gpu_check, tmp_path, "hang", 60)
    assert [f["case"] for f in part.failures] == ["wrong", "crash", "middle"]
    assert "did not end in 3 s" in part.failures[-1]["error"]
    assert part.results == {"fine": 1.5, "last": 2}
    assert part.seconds < 30


@pytest.mark.usefixtures("impatient")
def test_every_case_has_a_limit_of_its_own(gpu_check, tmp_path):
    part = run_child(gpu_check, tmp_path, 'lambda: time.sleep(2)), ("more", lambda: time.sleep(2)', 60)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]


@pytest.mark.usefixtures("impatient")
def test_a_slow_case_has_the_time_that_it_needs(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.SLOW_CASES, "middle", 30)
    part = run_child(gpu_check, tmp_path, "lambda: time.sleep(4)", 60)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]


def test_a_case_is_not_blamed_for_the_end_of_the_time(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0)
    part = run_child(gpu_check, tmp_path, "hang", 4)
    assert [f["case"] for f in part.failures] == ["wrong", "crash"]
    assert part.note == "stopped at case 3: the time is up"
    assert part.is_cut_short


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
    script = f"(sleep 2; touch {tmp_path}/made) & sleep 600"
    assert gpu_check.run(["sh", "-c", script], 1) == (None, "")
    time.sleep(1.5)
    assert not (tmp_path / "made").exists()


def test_a_complaint_is_no_reason_to_refuse(building, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.stderr.write('a warning')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from qkernels import _C

    assert building.extension() == ({"archs": _C.cuda_archs, "fingerprint": _C.source_fingerprint}, "")


def test_an_extension_that_cannot_be_imported_says_why(building, monkeypatch):
    monkeypatch.setattr(building, "PROBE", "raise ImportError('no compiled part')")
    found, why = building.extension()
    assert not found
    assert "no compiled part" in why


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("sm_80 sm_90 compute_90", (9, 0), True),
        ("sm_80 sm_90", (8, 9), True),
        ("sm_80 sm_90", (7, 5), False),
        ("sm_89", (8, 6), False),
        ("sm_80 compute_90", (9, 0), False),
        ("sm_90a", (9, 0), False),
        ("sm_90", (12, 0), False),
        ("sm_120", (12, 1), True),
        ("", (9, 0), False),
    ],
)
def test_code_runs_on_the_same_and_on_later_minor_versions(building, archs, capability, runs):
    assert building.has_kernels(archs, *capability) == runs


@pytest.fixture
def without_nvcc(building, monkeypatch):
    """What is there, and what setup.py says of the sources."""
    script = building.build_script()
    monkeypatch.setattr(script, "find_toolkit", lambda: None)
    monkeypatch.setattr(building, "build_script", lambda: script)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return lambda found, why="": monkeypatch.setattr(building, "extension", lambda: (found, why)), script.fingerprint()


def test_without_nvcc_a_build_of_these_sources_will_do(building, without_nvcc):
    there, fingerprint = without_nvcc
    there({"archs": "sm_80 sm_90", "fingerprint": fingerprint})
    assert building.build(torch) == "carried"


def test_without_nvcc_any_other_build_is_refused(building, without_nvcc, capsys):
    there, fingerprint = without_nvcc
    for found, why, words in [
        ({}, "no compiled part", "no compiled part"),
        ({"archs": "", "fingerprint": fingerprint}, "", "built for the CPU only, this GPU needs sm_90"),
        ({"archs": "sm_80", "fingerprint": fingerprint}, "", "built for sm_80, this GPU needs sm_90"),
        ({"archs": "sm_90", "fingerprint": "other"}, "", "built from other sources"),
        ({"archs": "sm_90", "fingerprint": ""}, "", "built from other sources"),
    ]:
        there(found, why)
        with pytest.raises(SystemExit) as end:
            building.build(torch)
        assert end.value.code == 2
        assert words in capsys.readouterr().out


def test_it_builds_for_this_gpu_whatever_the_environment_says(building, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    script = building.build_script()
    monkeypatch.setattr(script, "find_toolkit", lambda: Path("/cuda"))
    monkeypatch.setattr(building, "build_script", lambda: script)
    real = building.run
    for before in ("", "sm_80", "sm_90"):
        answers, commands = iter([before, "sm_80 sm_90"]), []
        monkeypatch.setattr(building, "extension", lambda answers=answers: ({"archs": next(answers)}, ""))

        def run(command, seconds, commands=commands, **environment):
            commands.append(command)
            commands.append(real(["sh", "-c", "echo $FORCE_CUDA $TORCH_CUDA_ARCH_LIST"], 60, **environment))
            return 0, ""

        monkeypatch.setattr(building, "run", run)
        assert building.build(torch) == "here"
        assert commands[0][1:4] == ["setup.py", "build_ext", "--inplace"]
        assert ("--force" in commands[0]) == (before != "sm_90")
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


def test_where_every_part_was_skipped_nothing_was_checked(gpu_check, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu_check.run_all(["linear", "bench"], False, {}, path, time.monotonic()) == 2
    assert {part["verdict"] for part in json.loads(path.read_text())["parts"].values()} == {"skipped"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert "skipped ['linear', 'bench'], cut short by the end of the time ['linear', 'bench']" in last


def test_targets_are_lines_and_no_failures(gpu_check, tmp_path, monkeypatch, capsys):
    def run_part(part, command, deadline):
        part.passed = 1
        part.results = {
            "linear": {
                "targets": [{"name": "POPS", "measured": 0.91234, "target": 0.9, "bound": "least", "reached": True}]
            },
            "step": {"targets": [{"name": "step", "measured": 1.3, "target": 1.15, "bound": "most", "reached": False}]},
            "other": "skipped",
        }
        if part.name == "conv":
            part.results = {}
            part.cut_short("stopped at case 7: the time is up")

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    path = tmp_path / "gpu.json"
    assert gpu_check.run_all(["bench", "conv"], False, {}, path, time.monotonic() + 60) == 0
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert first == "target  reached  POPS: 0.912, at least 0.9"
    assert second == "target  SHORT    step: 1.3, at most 1.15"
    assert "0 parts failed [], skipped [], cut short by the end of the time ['conv']" in last
    assert json.loads(path.read_text())["parts"]["bench"]["results"]["step"]["targets"][0]["reached"] is False


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


@pytest.mark.parametrize("part", ["ops", "model", "bench"])
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
