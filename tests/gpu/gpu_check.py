"""`make gpu-check`: everything about qkernels that only a GPU can show, in at most 8 minutes after the build.

    python tests/gpu/gpu_check.py [--only PART ...] [--small] [--out FILE]

Needs torch with CUDA and an NVIDIA GPU of compute capability 7.5 or newer; nothing is downloaded. qkernels is built in
place for this GPU, or brought up to date (nvcc, a C++20 compiler, Python.h, setuptools); without nvcc an extension that
is there will do if it has kernels for this GPU and was built from exactly these sources. Parts: linear, conv, rows,
floats, ops, large (every CUDA op against the CPU, bit for bit), model (converted networks, layer by layer), training
(every rule), graph (capture and replay), streams, errors, opcheck, wgmma (the kernel that is off by default, on
capability 9.0), bench (times against targets), sanitizer (compute-sanitizer on small shapes, where it is installed).

A part runs in a process of its own, case by case: a case that fails, crashes, hangs or poisons the device is named and
does not hide the others. Everything found, times too, is in bench/results/<gpu>.json after each part. A target of speed
that is missed is a line at the end, no failure. Exit status: 0 nothing failed, 1 something failed, 2 nothing could be
checked. The last line names what was skipped, and what the end of the time has cut short.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from building import ROOT, START_SECONDS, build, end, refuse, run, start

BUDGET_SECONDS = 480
LEAST_SECONDS = 15  # what a part needs to begin at all
CASE_SECONDS = 60
SLOW_CASES = {"more than 2^31 elements": 120, "inference resnet50": 120, "training resnet18": 120}
MOST_STARTS = 6  # of one part
MOST_HANGS = 2  # of one part
POISONED = 3  # the exit status of a child whose device is lost
sys.path[:0] = [str(ROOT), str(ROOT / "tests/ops"), str(ROOT / "tests/gpu")]

PARTS = (
    *("linear", "conv", "rows", "floats", "ops", "large", "model", "training", "graph", "streams", "errors"),
    *("opcheck", "wgmma", "bench", "sanitizer"),  # what hangs or takes its time does so behind what is in use
)
SMALL = ("linear", "conv", "rows", "floats", "ops", "large")  # what runs under compute-sanitizer


def require_gpu():
    try:
        import numpy  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        refuse(f"{sys.executable} has no {error.name}")
    if torch.version.cuda is None:
        refuse(f"torch {torch.__version__} is a CPU build")
    if not torch.cuda.is_available():
        refuse("torch.cuda.is_available() is False: no NVIDIA GPU, or no driver")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 5):
        refuse(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, the kernels need 7.5")
    return torch


# ---- a child: the cases of one part ----------------------------------------------------------------------------------


def say(**message: Any) -> None:
    print("@" + json.dumps(message), flush=True)


def run_cases(parts: list[str], first: int, small: bool) -> int:
    """Runs the cases of some parts from number `first` on; what they give or raise goes to the parent line by line."""
    import cases
    import torch

    everything = itertools.chain.from_iterable(cases.cases_of(part, small) for part in parts)
    for number, (name, case) in enumerate(everything):
        if number < first:
            continue
        say(start=number, name=name)
        try:
            say(result=case())
        except Exception as error:  # a case that fails must not hide the others
            say(error=f"{type(error).__name__}: {error}"[:2000])
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # nothing more can be launched in this process
                return POISONED
    say(done=True)
    return 0


# ---- the parent ------------------------------------------------------------------------------------------------------


class Part:
    """What is known of a part: how many cases passed, which failed, and what they gave."""

    def __init__(self, name: str):
        self.name, self.passed, self.seconds = name, 0, 0.0
        self.failures: list[dict[str, str]] = []
        self.results: dict[str, Any] = {}
        self.note = ""
        self.is_cut_short = False  # by the end of the time

    @property
    def verdict(self) -> str:
        return "FAILED" if self.failures else "ok" if self.passed else "skipped"

    def cut_short(self, note: str) -> None:
        self.note, self.is_cut_short = note, True

    @property
    def targets(self) -> list[dict[str, Any]]:
        """What its results say of targets."""
        return [t for result in self.results.values() if isinstance(result, dict) for t in result.get("targets", [])]

    def to_json(self) -> dict[str, Any]:
        known = {"verdict": self.verdict, "passed": self.passed, "seconds": round(self.seconds, 1)}
        return known | {"note": self.note, "failures": self.failures, "results": self.results}

    def __str__(self) -> str:
        lines = [f"{self.name:10} {self.verdict:8} {self.passed} passed ({self.seconds:.0f} s) {self.note}".rstrip()]
        lines += [f"    {f['case']}: {f['error']}" for f in self.failures[:20]]
        return "\n".join(lines)


def run_part(part: Part, command: Callable[[int], list[str]], deadline: float) -> Part:
    """Runs a part in children, `command(first case)` each; behind a case that kills a child another one goes on."""
    began, first, hangs = time.monotonic(), 0, 0
    for _ in range(MOST_STARTS):
        if deadline - time.monotonic() < LEAST_SECONDS:
            part.cut_short(f"stopped at case {first}: the time is up")
            break
        running, ending, why = _follow(part, command(first), deadline)
        if ending == "done":
            break
        if ending == "late":
            part.cut_short(f"stopped at case {running[0] if running else first}: the time is up")
            break
        if running is None:
            part.failures.append({"case": f"start at case {first}", "error": why})
            break
        number, name = running
        if not part.failures or part.failures[-1]["case"] != name:
            part.failures.append({"case": name, "error": why})
        first = number + 1
        hangs += ending == "hung"
        if hangs == MOST_HANGS:
            part.note = f"given up after {hangs} cases that hang"
            break
    else:
        part.note = f"given up after {MOST_STARTS} crashes"
    part.seconds = time.monotonic() - began
    return part


def _follow(part: Part, command: list[str], deadline: float) -> tuple[tuple[int, str] | None, str, str]:
    """One child: the last case that it started, how it ended ("done", "died", "hung" or "late"), and why."""
    child, lines = start(command), Queue()

    def read() -> None:
        for line in child.stdout:
            lines.put(line)
        lines.put("")

    Thread(target=read, daemon=True).start()
    running, ending, other = None, "died", []
    seconds, began = START_SECONDS, time.monotonic()
    try:
        while line := lines.get(timeout=max(0, min(began + seconds, deadline) - time.monotonic())):
            if not line.startswith("@"):
                other = [*other[-30:], line]
                continue
            message = json.loads(line[1:])
            if "start" in message:
                seconds = START_SECONDS if running is None else CASE_SECONDS
                running, began = (message["start"], message["name"]), time.monotonic()
                seconds = SLOW_CASES.get(message["name"], seconds)
            elif "error" in message:
                part.failures.append({"case": running[1], "error": message["error"]})
            elif "result" in message:
                part.passed += 1
                if message["result"] is not None:
                    part.results[running[1]] = message["result"]
            elif "done" in message:
                ending = "done"
        child.wait(LEAST_SECONDS)
        why = f"the process ended with status {child.returncode}"
    except (Empty, subprocess.TimeoutExpired):
        if ending != "done":
            ending = "late" if time.monotonic() >= deadline else "hung"
        why = f"did not end in {seconds} s"
    finally:
        end(child)
    return running, ending, f"{why}\n{''.join(other)[-1500:]}".rstrip()


def run_sanitizer(part: Part, deadline: float) -> Part:
    folders = [*os.environ.get("PATH", "").split(os.pathsep), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    began = time.monotonic()
    if tool is None:
        part.note = "no compute-sanitizer in PATH or CUDA_HOME"
        return part
    # A tensor of its own memory: else what is read behind its end is another's, and allowed.
    kinds = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}, "synccheck": {}}
    unfinished = []
    for number, (kind, environment) in enumerate(kinds.items()):
        share = max(1, (deadline - time.monotonic()) / (len(kinds) - number))
        child = [sys.executable, __file__, "--child", *SMALL, "--small"]
        status, output = run([tool, "--tool", kind, "--error-exitcode", "9", *child], share, **environment)
        if status is None:
            unfinished.append(f"{kind} ({share:.0f} s)")
        elif status == 0:
            part.passed += 1
        else:
            part.failures.append({"case": kind, "error": output[-3500:].strip()})
    if unfinished:
        part.cut_short(f"not finished in time: {', '.join(unfinished)}")
    part.seconds = time.monotonic() - began
    return part


def facts(torch, built: str) -> dict[str, Any]:
    import stand_ins  # noqa: F401

    from qkernels import _C
    from qkernels.bench.harness import commit

    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "build": built,
        "built_for": _C.cuda_archs,
    }


def run_all(names: list[str], small: bool, known: dict[str, Any], path: Path, deadline: float) -> int:
    """Runs the parts and keeps what is found in `path`; the exit status."""
    found: dict[str, Part] = {}

    def command(name: str, first: int) -> list[str]:
        own = [sys.executable, __file__, "--child", name, "--from", str(first)]
        return [*own, "--small"] if small else own

    for name in names:
        part = found[name] = Part(name)
        if deadline - time.monotonic() < LEAST_SECONDS:
            part.cut_short("the time is up")
        elif name == "sanitizer":
            run_sanitizer(part, deadline)
        else:
            run_part(part, lambda first, name=name: command(name, first), deadline)
        print(part, flush=True)
        path.write_text(json.dumps({**known, "parts": {n: p.to_json() for n, p in found.items()}}, indent=2) + "\n")
    for line in itertools.chain.from_iterable(map(target_lines, found.values())):
        print(line)
    failed = [name for name, part in found.items() if part.failures]
    skipped = [name for name, part in found.items() if part.verdict == "skipped"]
    cut_short = [name for name, part in found.items() if part.is_cut_short]
    print(
        f"gpu-check: {len(failed)} parts failed {failed}, skipped {skipped}, "
        f"cut short by the end of the time {cut_short}; wrote {path}"
    )
    return 1 if failed else 2 if len(skipped) == len(found) else 0


def target_lines(part: Part) -> list[str]:
    """A line for each target: its name, what was measured, what should be, and whether it is."""
    return [
        f"target  {'reached' if t['reached'] else 'SHORT':8} {t['name']}: {t['measured']:.3g}, "
        f"at {t['bound']} {t['target']:g}"
        for t in part.targets
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--out", help="where what is found goes")
    parser.add_argument("--child", nargs="+", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="first", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_cases(arguments.child, arguments.first, arguments.small)
    torch = require_gpu()
    known = facts(torch, build(torch))
    print(f"gpu-check: {known['gpu']}, torch {known['torch']}, CUDA {known['cuda']}, built for {known['built_for']}")
    name = re.sub(r"[^a-z0-9]+", "_", known["gpu"].lower()).strip("_")
    path = Path(arguments.out) if arguments.out else ROOT / f"bench/results/{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return run_all(arguments.only, arguments.small, known, path, time.monotonic() + BUDGET_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
