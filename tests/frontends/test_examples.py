"""The example scripts run to their end, shortened and on a small data set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


SHORTENED = {
    "nni_quickstart.py": [],
    "nni_quantizers.py": ["--images", "320"],
    "torch_ao_mobilenet_v2.py": ["--images", "128", "--qat-epochs", "1", "--width", "0.1"],
    "aimet_quickstart.py": ["--images", "256"],
}


@pytest.mark.parametrize("script", SHORTENED)
def test_example(script):
    command = [sys.executable, script, "--epochs", "1", "--data", "digits", *SHORTENED[script]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verify: 0 codes differ" in done.stdout
