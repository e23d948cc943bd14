"""The example scripts run to their end, shortened and on a small data set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RESULTS = EXAMPLES.parent / "bench" / "results"


def run_example(script, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, script, *map(str, options)]
    return subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True)


SHORTENED = {
    "nni_quickstart.py": [],
    "nni_quantizers.py": ["--images", "320"],
    "torch_ao_mobilenet_v2.py": ["--images", "128", "--qat-epochs", "1", "--width", "0.1"],
    "aimet_quickstart.py": ["--images", "256"],
}


@pytest.mark.parametrize("script", SHORTENED)
def test_example(script, tmp_path):
    options, file = ["--epochs", "1", "--data", "digits", *SHORTENED[script]], tmp_path / "results.json"
    done = run_example(script, *options, "--json", file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verify: 0 codes differ" in done.stdout
    written = json.loads(file.read_text())
    assert written["command"] == " ".join(["python", f"examples/{script}", *options])
    assert (written["mismatches"], type(written["seed"])) == (0, int)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("example_*.json")), ids=lambda path: path.stem)
def test_committed_results_say_how_they_came_about(path):
    written = json.loads(path.read_text())
    assert {"command", "seed", "machine", "torch", "qkernels"} <= written.keys()
    script = written["command"].split()[1]
    assert (EXAMPLES.parent / script).is_file()
    assert written.get("mismatches", 0) == 0


def test_accuracy_runs_on_every_data_set_and_keeps_how_each_row_was_made(tmp_path):
    file = tmp_path / "results.json"
    options = ["lenet", "--data", "digits", "--runs"]
    done = run_example("accuracy.py", *options, "float", "int8", "--float-weights", tmp_path / "w.pth", "--json", file)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["float", "int8"]
    for row in rows.values():
        assert row["command"].startswith("python examples/accuracy.py lenet --data digits --runs float int8")
        assert row["commit"]
        assert row["autocast"] is False
    assert rows["int8"]["mismatches"] == 0
    done = run_example("accuracy.py", "wide", "--data", "digits", "--json", file)
    assert "holds rows of lenet on digits" in done.stderr


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("efficientnet_lite0.py", ["--views", "0"], "--views: must be a whole number of at least 1, got '0'"),
        ("mobilenet_v2.py", ["--calibration", "-4"], "--calibration: must be a whole number of at least 1, got '-4'"),
        ("resnet.py", ["--weights", "none.pth"], "--weights: must be a file that is there, got 'none.pth'"),
        ("efficientnet_lite0.py", ["--recipe", "int7"], "--recipe: invalid choice: 'int7'"),
        ("accuracy.py", ["lenet", "--data", "cats"], "--data: invalid choice: 'cats'"),
        ("accuracy.py", ["lenet", "--root", "/nowhere"], "no fashion-mnist idx files in /nowhere"),
        ("nni_quickstart.py", ["--json", "/nowhere/x.json"], "--json: must lie in a folder that can be written to"),
    ],
)
def test_bad_arguments_are_named_without_a_traceback(script, options, message):
    done = run_example(script, *options)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
