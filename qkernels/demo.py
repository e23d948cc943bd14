"""The main job on real data: train in float, calibrate, convert, verify, compare. `python -m qkernels demo`.

Every engine is measured in a process of its own (`python -m qkernels.demo ENGINE FOLDER`), so that none inherits the
threads, caches or settings of another.
"""

import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels
from qkernels.data import Images, load_images
from qkernels.errors import QKernelsError, Unsupported
from qkernels.report.picture import check_picture
from qkernels.report.plot import plot_demo

BATCHES = (1, 64)
_SIZES = {"digits": (32, 15), "mnist-5k": (16, 10), "fashion-mnist": (16, 1)}  # channels of the stem, epochs


class Block(nn.Module):
    """conv-bn-relu, conv-bn, added to the input (or to a strided 1x1 convolution of it), relu."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResidualNet(nn.Module):
    """A small ResNet: a stem, three blocks, an average, a classifier."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


def run(
    data: str | None,
    root: str | None,
    epochs: int | None,
    picture: str | os.PathLike,
    numbers: str | os.PathLike | None,
) -> int:
    """The demo; returns 0 if the converted model gives the codes of the simulation everywhere, else 1."""
    draws = _can_draw(picture)
    torch.manual_seed(0)
    images = load_images(data, root)
    width, default_epochs = _SIZES[images.name]
    _say(f"data        {images.name}: {len(images.train_x)} training and {len(images.test_x)} test images")
    model = ResidualNet(images.train_x.shape[1], images.classes, width)
    train(model, images, epochs or default_epochs)

    calibration = list(images.train_x[:512].split(64))
    start = time.perf_counter()
    prepared = qkernels.prepare(model, images.test_x[:1], recipe="int8")
    with qkernels.calibrating(prepared):
        for batch in calibration:
            prepared(batch)
    converted = qkernels.convert(prepared)
    _say(f"convert     prepared, calibrated on 512 images and converted in {time.perf_counter() - start:.1f} s")

    batches = list(images.test_x[:512].split(64))
    report = qkernels.verify(prepared, converted, batches)
    _say(f"verify      {report.total_mismatches} of the codes differ from the simulation on {len(batches) * 64} images")
    comparison = qkernels.compare(model, converted, batches)

    with tempfile.TemporaryDirectory() as folder:
        _write_job(Path(folder), model, converted, images, width, calibration)
        rows = []
        for engine in ENGINES:
            try:
                rows.append(_measure(engine, folder))
            except EngineError as error:
                if engine != "torch_ao":
                    raise
                _say(f"torch.ao int8 is left out: {str(error).strip().splitlines()[-1]}")
    _say(f"\n{table(rows)}\n\n{comparison}\n")
    if numbers:
        facts = {"data": images.name, "mismatches": report.total_mismatches, "rows": rows, "info": qkernels.info()}
        Path(numbers).write_text(json.dumps(facts, indent=1) + "\n")
    if draws:
        plot_demo(rows, comparison, f"{images.name}, {os.cpu_count()} CPUs, {qkernels.info()['isa_active']}", picture)
        _say(f"picture     {picture}")
    return 0 if report.total_mismatches == 0 else 1


def _say(text: str) -> None:
    """At once, in a pipe too."""
    print(text, flush=True)


def _can_draw(picture: str | os.PathLike) -> bool:
    """Whether there is matplotlib; says so if not. Another ending than matplotlib's is an error."""
    try:
        check_picture(picture)
    except Unsupported as error:
        _say(f"picture     left out: {error}")
        return False
    return True


def train(model: nn.Module, images: Images, epochs: int) -> None:
    """Plain training in float."""
    model.train().to(memory_format=torch.channels_last)
    _use_the_faster_thread_count(model, images.train_x[:64])
    start, steps = time.perf_counter(), epochs * -(-len(images.train_x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images.train_x)).split(64):
            loss = F.cross_entropy(model(images.train_x[chosen]), images.train_y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    seconds, threads = time.perf_counter() - start, torch.get_num_threads()
    _say(f"train       {epochs} epochs in {seconds:.1f} s on {threads} threads, last loss {loss.item():.3f}")


def _use_the_faster_thread_count(model: nn.Module, x: Tensor) -> None:
    """One thread is the faster choice where other programs keep the other CPUs busy."""
    seconds: dict[int, float] = {}
    for count in (torch.get_num_threads(), 1):
        torch.set_num_threads(count)
        model(x).sum().backward()
        start = time.perf_counter()
        for _ in range(4):
            model(x).sum().backward()
        seconds[count] = time.perf_counter() - start
    model.zero_grad()
    torch.set_num_threads(min(seconds, key=lambda count: seconds[count]))


def table(rows: list[dict[str, Any]]) -> str:
    """The result as text."""
    lines = [f"{'engine':24s} {'accuracy':>9s} {'size':>9s} {'batch 1':>10s} {'batch 64':>10s} {'speed-up':>14s}"]
    base = rows[0]["latency_ms"]
    for row in rows:
        latency = row["latency_ms"]
        gain = " / ".join(f"{base[b] / latency[b]:.1f}x" for b in latency)
        times = " ".join(f"{ms:7.3f} ms" for ms in latency.values())
        lines.append(f"{row['engine']:24s} {row['accuracy']:8.2%} {row['bytes'] / 1024:6.0f} kB {times} {gain:>14s}")
    return "\n".join(lines)


# ---- one engine in one process ----


def _write_job(
    folder: Path, model: nn.Module, converted: nn.Module, images: Images, width: int, calibration: list[Tensor]
) -> None:
    qkernels.save(converted, folder / "int8.safetensors")
    job = {
        "shape": (images.train_x.shape[1], images.classes, width),
        "state": model.state_dict(),
        "calibration": torch.cat(calibration),
        "x": images.test_x,
        "y": images.test_y,
    }
    torch.save(job, folder / "job.pt")


class EngineError(QKernelsError, RuntimeError):
    """An engine does not run here; the message ends as its own output did."""


def _measure(engine: str, folder: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "qkernels.demo", engine, folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise EngineError(f"demo: the engine {engine} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _worker(engine: str, folder: Path) -> None:
    """Measures one engine and prints one JSON line."""
    job = torch.load(folder / "job.pt", weights_only=True)
    model = ResidualNet(*job["shape"])
    model.load_state_dict(job["state"])
    with torch.inference_mode():
        label, run, size = ENGINES[engine](model.eval(), job, folder)
        predictions = torch.cat([run(x).argmax(1) for x in job["x"].split(256)])
        row = {
            "engine": label,
            "accuracy": (predictions == job["y"]).float().mean().item(),
            "bytes": size,
            "latency_ms": {str(n): latency_ms(run, job["x"][:n].contiguous()) for n in BATCHES},
        }
    print(json.dumps(row))


Engine = tuple[str, Callable[[Tensor], Tensor], int]


def _float(model: nn.Module, job: dict[str, Any], folder: Path) -> Engine:
    """Eager float32, in the memory format that is faster at each batch size."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    runs = [model, lambda x: last(x.contiguous(memory_format=torch.channels_last))]
    best = {}
    for n in (*BATCHES, 256):
        x = job["x"][:n].contiguous()
        best[n] = min(runs, key=lambda run, x=x: latency_ms(run, x, seconds=0.2))
    return "float32", lambda x: best.get(len(x), model)(x), _pickled_bytes(model.state_dict())


def _torch_ao(model: nn.Module, job: dict[str, Any], folder: Path) -> Engine:
    """torch's own int8: FX graph mode, engine x86, its default qconfig."""
    warnings.simplefilter("ignore")
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    with torch.inference_mode(False), torch.no_grad():
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (job["x"][:1],))
        for x in job["calibration"].split(64):
            prepared(x)
        converted = convert_fx(prepared)
    return "torch.ao int8 (x86)", converted, _pickled_bytes(converted.state_dict())


def _ours(model: nn.Module, job: dict[str, Any], folder: Path) -> Engine:
    path = folder / "int8.safetensors"
    return "qkernels int8", qkernels.load(path), path.stat().st_size


ENGINES: dict[str, Callable[[nn.Module, dict[str, Any], Path], Engine]] = {
    "float": _float,
    "torch_ao": _torch_ao,
    "qkernels": _ours,
}


def _pickled_bytes(state: dict[str, Any]) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def latency_ms(run: Callable[[Tensor], Any], x: Tensor, seconds: float = 0.5) -> float:
    """The best time of a call with one thread or with all, after a warm-up: other programs only ever add to it."""
    threads = torch.get_num_threads()
    best = float("inf")
    for count in {1, threads}:
        torch.set_num_threads(count)
        start = time.perf_counter()
        while (begin := time.perf_counter()) < start + 1.3 * seconds:
            run(x)
            if begin > start + 0.3 * seconds:
                best = min(best, time.perf_counter() - begin)
        if best == float("inf"):
            best = time.perf_counter() - start
    torch.set_num_threads(threads)
    return 1e3 * best


if __name__ == "__main__":
    _worker(sys.argv[1], Path(sys.argv[2]))
