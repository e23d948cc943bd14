"""The example scripts run to their end, shortened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "torch_ao_mobilenet_v2.py": [
        "--data",
        "digits",
        "--images",
        "128",
        "--epochs",
        "1",
        "--qat-epochs",
        "1",
        "--width",
        "0.1",
    ],
    "aimet_quickstart.py": ["--data", "digits", "--images", "256", "--epochs", "1"],
}


@pytest.mark.parametrize("script", SHORT)
def test_example_ends_in_integers_without_a_mismatch(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *SHORT[script]]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    [verified] = [line for line in run.stdout.splitlines() if line.startswith("verify")]
    assert verified.split(":")[-1].split()[0] == "0" or verified.split()[1] == "0"
