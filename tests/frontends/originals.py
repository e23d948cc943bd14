"""Runs the cases of a script with the package that they were written for, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def results(script: str, variable: str, folder: Path) -> dict:
    """What `script` saves; a skip if the environment variable names no folders to import the package from."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no folders with the original and what it imports")
    saved = folder / "results.pt"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), str(saved)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(saved, weights_only=False)
