"""Shared by the examples: photographs that come with packages, and how an int8 network compares with its float one."""

import argparse
import copy
import importlib.util
import json
import platform
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels
from qkernels.bench.harness import commit
from qkernels.cli import output_file, positive
from qkernels.core.recipe import RECIPES
from qkernels.data import DATA_SETS, Images, load_images
from qkernels.errors import InvalidArgument

# Colour photographs inside the wheels of scikit-image and scikit-learn.
PHOTOS = {
    "skimage": "astronaut.png chelsea.png coffee.png rocket.jpg motorcycle_left.png motorcycle_right.png retina.jpg "
    "hubble_deep_field.jpg ihc.png",
    "sklearn": "china.jpg flower.jpg",
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def photos() -> list[Tensor]:
    """The photographs as float [3, H, W] in [0, 255]."""
    import numpy
    from PIL import Image

    found = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        folder = Path(spec.submodule_search_locations[0]) / FOLDERS[package]
        for path in (folder / name for name in names.split()):
            if path.is_file():
                pixels = numpy.asarray(Image.open(path).convert("RGB"))
                found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.float32))
    if not found:
        raise SystemExit("this example needs photographs: pip install scikit-image scikit-learn pillow")
    return found


def random_views(count: int, size: int, seed: int) -> Tensor:
    """`count` random crops, flipped at random, resized to `size` x `size`: [count, 3, size, size] in [0, 255]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    images, views = photos(), []
    for i in range(count):
        image = images[i % len(images)]
        side = int(min(image.shape[1:]) * uniform(0.4, 1.0))
        top, left = (int(uniform(0, extent - side + 1)) for extent in image.shape[1:])
        crop = image[:, top : top + side, left : left + side].unsqueeze(0)
        view = F.interpolate(crop, (size, size), mode="bilinear", antialias=True).clamp(0, 255)
        views.append(view.flip(3) if uniform(0, 1) < 0.5 else view)
    return torch.cat(views)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--views", type=positive, default=220, help="evaluated views (default: %(default)s)")
    parser.add_argument("--calibration", type=positive, default=96, help="calibration views (default: %(default)s)")
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=sorted(RECIPES),
        default=["int8-bias"],
        metavar="NAME",
        help="of the recipes in docs/ptq.md (default: int8-bias)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the calibration views; the others' is the next (default: %(default)s)"
    )
    parser.add_argument("--save", type=output_file, help="also write the int8 model (of the last recipe) there")
    add_json(parser)
    return parser


def add_data(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    described = "%(default)s" if default else "the largest one that is here"
    parser.add_argument("--data", choices=DATA_SETS, default=default, help=f"the images (default: {described})")


def existing_file(text: str) -> Path:
    """For argparse."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file that is there, got {text!r}")
    return path


def data_set(name: str | None, root: str | None = None) -> Images:
    """`load_images`; what is missing ends the script with one line."""
    try:
        return load_images(name, root)
    except InvalidArgument as error:
        raise SystemExit(str(error)) from error


def digits(name: str | None, size: int = 28, root: str | None = None) -> Images:
    """Images of qkernels.data by name, resized to `size` x `size` if they have another size."""
    images = data_set(name, root)
    if images.train_x.shape[-1] == size:
        return images
    x, test_x = (F.interpolate(x, (size, size), mode="bilinear") for x in (images.train_x, images.test_x))
    return replace(images, train_x=x, test_x=test_x)


def fastest_float(model: nn.Module, x: Tensor) -> float:
    """Milliseconds a call of the float model, in the better of two memory layouts."""
    model, last = copy.deepcopy(model).eval(), torch.channels_last
    plain = milliseconds(model, x)
    return min(plain, milliseconds(model.to(memory_format=last), x.to(memory_format=last)))


def milliseconds(model: nn.Module, x: Tensor, calls: int = 15) -> float:
    """The best time of a call."""
    best = float("inf")
    with torch.inference_mode():
        for _ in range(calls):
            start = time.perf_counter()
            model(x)
            best = min(best, time.perf_counter() - start)
    return 1e3 * best


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=output_file, help="also write the results there, with the command and the machine"
    )


def write_results(path: Path | None, seed: int, **results: Any) -> None:
    """Writes `results` with what one needs to get them again; nothing if `path` is None."""
    if path is None:
        return
    facts = {
        "command": command_line(),
        "commit": commit(),
        "seed": seed,
        "qkernels": qkernels.__version__,
        "torch": torch.__version__,
        "machine": {
            "isa": qkernels.info()["isa_active"],
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
        },
    }
    path.write_text(json.dumps(_rounded(facts | results), indent=1) + "\n")


def command_line() -> str:
    """The line that started this script, without --json."""
    words = list(sys.argv[1:])
    for at, word in enumerate(words):
        if word.startswith("--json"):
            del words[at : at + (1 if "=" in word else 2)]
            break
    return shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *words])


def _rounded(value: Any) -> Any:
    """Floats to six digits, at any depth."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def quantize_and_compare(model: nn.Module, calibration: Tensor, views: Tensor, options: argparse.Namespace) -> None:
    """Calibrates and converts `model` by each recipe, and prints how the results compare with it on `views`."""
    model = model.eval()
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in views.split(16)])
    float_ms, rows = milliseconds(model, views[:1]), {}
    for recipe in options.recipe:
        prepared = qkernels.prepare(model, calibration[:1], recipe)
        qkernels.calibrate(prepared, calibration.split(16))
        converted = qkernels.convert(prepared)
        print(prepared.report)
        report = qkernels.verify(prepared, converted, [views[:8]])
        with torch.inference_mode():
            got = torch.cat([converted(batch) for batch in views.split(16)])
        noise = (got - expected).double().square().sum()
        agreement = (got.argmax(1) == expected.argmax(1)).double().mean().item()
        sqnr = (10 * torch.log10(expected.double().square().sum() / noise)).item()
        rows[recipe] = {"top1_agreement": agreement, "logits_sqnr_db": sqnr, "mismatches": report.total_mismatches}
        print(f"recipe            {recipe}")
        print(f"top-1 agreement   {agreement:.1%} of {len(views)} views")
        print(f"logits SQNR       {sqnr:.1f} dB")
        print(f"simulation        {report.total_mismatches} codes differ from it")
        print(f"latency, batch 1  {float_ms:.2f} ms float, {milliseconds(converted, views[:1]):.2f} ms int8")
    if options.save:
        qkernels.save(converted, options.save)
        print(f"saved             {options.save}")
    write_results(
        options.json,
        options.seed,
        views=len(views),
        calibration=len(calibration),
        mismatches=sum(row["mismatches"] for row in rows.values()),
        rows=rows,
    )
