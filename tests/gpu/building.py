"""How `make gpu-check` comes to an extension for the GPU at hand, and how it runs other processes."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 1800
START_SECONDS = 90  # for the start of a process, and for the first case of a child


def refuse(reason: str) -> None:
    print(f"gpu-check: nothing was checked: {reason}")
    sys.exit(2)


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """A process in a group of its own, its errors in its output."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> None:
    """Ends it with all that it has started. One that the driver holds fast is left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)


def run(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """The exit status, None if it did not end in time, and the output."""
    process = start(command, **environment)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        end(process)
    return process.returncode, output


PROBE = """
import json, sys
sys.path.insert(0, "tests/gpu")
import stand_ins
from qkernels import _C
print("@" + json.dumps({"archs": _C.cuda_archs, "fingerprint": getattr(_C, "source_fingerprint", "")}))
"""


def extension() -> tuple[dict[str, str], str]:
    """What the extension that is there says of itself, and why there is nothing if it says nothing. Asked in a process
    of its own: what was imported cannot be replaced.
    """
    _, output = run([sys.executable, "-c", PROBE], START_SECONDS)
    said = re.findall(r"@({.*?})", output)  # maybe behind a warning without an end of line
    return (json.loads(said[-1]), "") if said else ({}, output.strip()[-1000:] or "it cannot be imported")


def has_kernels(archs: str, major: int, minor: int) -> bool:
    """Whether code for `archs` runs on that compute capability as it is: that of a lower minor version does."""
    found = (re.fullmatch(r"sm_(\d+)(\d)", arch) for arch in archs.split())
    return any(m is not None and int(m[1]) == major and int(m[2]) <= minor for m in found)


def build_script() -> ModuleType:
    """setup.py, for what it knows of toolkits and sources."""
    spec = importlib.util.spec_from_file_location("qkernels_setup", ROOT / "setup.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not_carried(script: ModuleType, major: int, minor: int) -> str:
    """Empty if the extension that is there will do as it is: kernels of other sources must not pass for these."""
    found, why = extension()
    if not found:
        return why
    if not has_kernels(found["archs"], major, minor):
        return f"it is built for {found['archs'] or 'the CPU only'}, this GPU needs sm_{major}{minor}"
    if found["fingerprint"] != script.fingerprint():
        return "it was built from other sources"
    return ""


def build(torch) -> str:
    """Builds for this GPU whatever is there, if there is a compiler for it; "here" or "carried"."""
    major, minor = torch.cuda.get_device_capability()
    try:
        script = build_script()
    except ModuleNotFoundError as error:
        refuse(f"{sys.executable} has no {error.name}, which setup.py needs")
    if script.find_toolkit() is None:
        if why := why_not_carried(script, major, minor):
            refuse(f"there is no nvcc to build with, and the extension that is there will not do: {why}")
        print("gpu-check: no nvcc; the extension that is there was built from these sources for this GPU", flush=True)
        return "carried"
    arch, environment = f"sm_{major}{minor}", {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}

    def is_fit() -> bool:
        return arch in extension()[0].get("archs", "").split()

    # Without ninja, setuptools takes a build for another GPU for current.
    force = [] if is_fit() else ["--force"]
    print(f"gpu-check: building for {arch} ...", flush=True)
    began = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace", *force]
    status, output = run(command, BUILD_SECONDS, **environment)
    if status != 0:
        print(output[-6000:])
        refuse("the build failed" if status else f"the build did not end in {BUILD_SECONDS} s")
    if not is_fit():
        found, why = extension()
        refuse(f"it was built, but this GPU needs {arch}: {why or 'it is built for ' + (found['archs'] or 'the CPU')}")
    print(f"gpu-check: built in {time.monotonic() - began:.0f} s", flush=True)
    return "here"
