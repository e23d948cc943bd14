"""How everything is measured: one process an engine, taking turns, medians of many short blocks.

Each engine lives in a worker process of its own (one thread pool a process). The driver asks the workers for one
block at a time, round robin, so that a noisy moment of the machine hits all engines alike; a ratio is taken between
medians of the same run. bench/README.md in the repository has the protocol.
"""

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkernels.core.files import write_atomically

PACKAGE = Path(__file__).resolve().parent.parent
BLOCK_SECONDS = 0.02
TOO_SLOW_SECONDS = 0.3
PAUSE_SECONDS = 0.05  # the thread pools of the previous engine spin for milliseconds before they sleep


_AVX2_PEERS = {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ISA_CAPS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", **_AVX2_PEERS},
    "avxvnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", **_AVX2_PEERS},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}


def isa_environment(isa: str) -> dict[str, str]:
    """What limits qkernels, torch and OpenVINO to an instruction set; ONNX Runtime's kernels obey no variable."""
    return {"QKERNELS_ISA": isa, **ISA_CAPS[isa]} if isa else {}


def machine() -> dict[str, str]:
    """The facts that a result needs to be read later."""
    flags = [
        f for f in ("avx2", "avx_vnni", "avx512_vnni", "avx512vbmi", "amx_int8") if f in _cpu_field("flags").split()
    ]
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "flags": " ".join(flags),
        "system": platform.platform(),
    }


def _cpu_field(name: str) -> str:
    """A line of /proc/cpuinfo; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return ""


def commit() -> str:
    """The commit of the checkout that qkernels runs from, or "unknown"."""
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def time_block(run: Callable[[], object], calls: int) -> float:
    """Seconds a call over one block of `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def calibrate(run: Callable[[], object], too_slow: float) -> int:
    """Warms up and returns how many calls fill a block."""
    once = time_block(run, 1)
    if once < too_slow:
        once = min(time_block(run, 1) for _ in range(5))
    if once > too_slow:
        raise TimeoutError(f"{once:.2f} s a call: left out")
    return max(1, min(20_000, int(BLOCK_SECONDS / max(once, 1e-7))))


class Worker:
    """An engine in a process of its own: `python *program --worker engine --threads n`, which calls `serve`."""

    def __init__(self, program: Sequence[str], engine: str, threads: int, env: Mapping[str, str] | None = None):
        self.engine = engine
        self.complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in close)
        path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, *program, "--worker", engine, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env=environment,
        )

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": self._end()}
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        return {"error": self._end()}

    def _end(self) -> str:
        """How the worker ended, with the last thing it said."""
        code = self.process.wait()
        self.complaints.seek(0)
        last = self.complaints.read().strip().rpartition("\n")[2]
        return f"{self.engine}: the worker ended with code {code}" + (f": {last}" if last else "")

    def interrupt(self) -> None:
        """Ends what it is doing, for `close` not to wait for it."""
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and `ask` has said so
            self.process.stdin.close()
        self.process.wait()
        self.complaints.close()


def serve(build: Callable[[dict], Callable[[], object]], too_slow: float = TOO_SLOW_SECONDS) -> None:
    """The worker's loop: `setup` builds and warms up a case, `block` times one block of it.

    A case that needs more than `too_slow` seconds a call is left out.
    """
    run, calls = None, 1
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["do"] == "setup":
                run = build(message)
                calls = calibrate(run, too_slow)
                answer = {"calls": calls}
            else:
                answer = {"seconds": time_block(run, calls)}
        except Exception as error:
            run = None
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        print(json.dumps(answer), flush=True)


def measure(workers: Iterable[Worker], setup: Mapping[str, Any], rounds: int) -> dict[str, dict]:
    """Median and minimum seconds a call of every engine, or its error."""
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    workers = list(workers)
    for worker in workers:
        answer = worker.ask({"do": "setup", **setup})
        if "error" in answer:
            errors[worker.engine] = answer["error"]
        else:
            samples[worker.engine] = []
        time.sleep(PAUSE_SECONDS)
    for _ in range(rounds):
        for worker in workers:
            if worker.engine in samples:
                answer = worker.ask({"do": "block"})
                if "error" in answer:
                    errors[worker.engine] = answer["error"]
                    del samples[worker.engine]
                    continue
                samples[worker.engine].append(answer["seconds"])
                time.sleep(PAUSE_SECONDS)
    result = {
        engine: {"median_us": statistics.median(s) * 1e6, "min_us": min(s) * 1e6} for engine, s in samples.items()
    }
    return result | {engine: {"error": text} for engine, text in errors.items()}


def write_json(path: Path, payload: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "commit": commit(), **payload}, indent=1) + "\n"
    write_atomically(path, text.encode())
