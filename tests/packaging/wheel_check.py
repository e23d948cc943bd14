"""Builds a wheel with one Python environment and checks it under others: one binary serves several versions of torch.

    python tests/packaging/wheel_check.py BUILD_PYTHON RUN_PYTHON [RUN_PYTHON ...]

The wheel is unpacked next to nothing else and imported from there; no environment is changed.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ["qkernels/py.typed", "dist-info/licenses/LICENSE", "qkernels/ops/__init__.py"]


def build_wheel(python: str, folder: Path) -> Path:
    for stale in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:
        subprocess.run(["rm", "-rf", str(stale)], check=True)
    command = [python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # the ninja of that environment
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    [wheel] = folder.glob("*.whl")
    return wheel


def main(build_python: str, *run_pythons: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build_wheel(build_python, Path(temporary))
        site = Path(temporary) / "site"
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(site)
        missing = [name for name in EXPECTED if not any(entry.endswith(name) for entry in names)]
        stray = [name for name in names if not name.startswith("qkernels")]
        if missing or stray:
            sys.exit(f"{wheel.name}: missing {missing}, stray {stray}")
        for python in run_pythons:
            env = {**os.environ, "PYTHONPATH": str(site)}
            check_ops = Path(__file__).with_name("check_ops.py")
            subprocess.run([python, str(check_ops), str(site)], check=True, env=env, cwd=temporary)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
