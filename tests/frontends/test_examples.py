"""The example scripts run to their end, shortened and on a small data set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RESULTS = EXAMPLES.parent / "bench" / "results"


SHORTENED = {
    "nni_quickstart.py": [],
    "nni_quantizers.py": ["--images", "320"],
    "torch_ao_mobilenet_v2.py": ["--images", "128", "--qat-epochs", "1", "--width", "0.1"],
    "aimet_quickstart.py": ["--images", "256"],
}


@pytest.mark.parametrize("script", SHORTENED)
def test_example(script, tmp_path):
    options, file = ["--epochs", "1", "--data", "digits", *SHORTENED[script]], tmp_path / "results.json"
    command = [sys.executable, script, *options, "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True)
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
