"""The command line: `python -m qkernels info | selftest | demo | bench`."""

import argparse
import json
from collections.abc import Sequence

from qkernels.errors import QKernelsError
from qkernels.ops.machine import info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 if a check failed. Bad arguments exit with 2."""
    parser = argparse.ArgumentParser(prog="python -m qkernels", description="A quantization runtime for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="version, instruction sets, CUDA build, kernels chosen")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_info)

    command = commands.add_parser("selftest", help="every kernel against the plain-torch reference on this machine")
    command.set_defaults(run=_selftest)

    command = commands.add_parser("demo", help="train a small network in float, convert it, compare")
    command.add_argument("--data", help="digits, fashion-mnist or mnist-5k (default: the richest one that is here)")
    command.add_argument("--root", help="where the fashion-mnist files are")
    command.add_argument("--epochs", type=_positive, help="training epochs (default: enough for the data set)")
    command.add_argument("--out", default="qkernels_demo.png", help="the picture (default: %(default)s)")
    command.add_argument("--json", help="also write the numbers there")
    command.set_defaults(run=_demo)

    command = commands.add_parser("bench", help="time whole networks against the engines that are installed")
    command.add_argument(
        "--model",
        default="mobilenet_v2,resnet18,resnet50,efficientnet_lite0",
        help="separated by commas; names other than the default ones are torchvision's (default: %(default)s)",
    )
    command.add_argument(
        "--batch", type=_several_positive, default=[1], help="batch sizes, separated by commas (default: 1)"
    )
    command.add_argument(
        "--size", type=_positive, default=224, help="height and width of images (default: %(default)s)"
    )
    command.add_argument("--peers", default="torch,ort,openvino", help="'' for none (default: %(default)s)")
    command.add_argument("--threads", type=_positive, default=1, help="of every engine (default: %(default)s)")
    command.add_argument("--rounds", type=_positive, default=9, help="blocks of each engine (default: %(default)s)")
    command.add_argument(
        "--isa",
        default="",
        choices=["", "avx2", "avxvnni", "avx512vnni"],
        help="limit every engine to this instruction set (ONNX Runtime, which cannot be limited, is left out)",
    )
    command.add_argument("--json", help="also write the numbers there")
    command.add_argument("--plot", help="also draw them there (needs matplotlib)")
    command.add_argument("--show", help="measure nothing: print (and draw) what --json wrote to this file")
    command.set_defaults(run=_bench)

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except QKernelsError as error:
        parser.exit(2, f"{parser.prog} {options.command}: error: {error}\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _several_positive(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _info(options: argparse.Namespace) -> int:
    facts = info()
    if options.json:
        print(json.dumps(facts))
        return 0
    kernels = facts.pop("kernels")
    for name, value in facts.items():
        print(f"{name:15s} {value}")
    print("kernels")
    for op, kernel in kernels.items():
        print(f"  {op:20s} {kernel}")
    return 0


def _selftest(options: argparse.Namespace) -> int:
    from qkernels.selftest import run

    return run()


def _demo(options: argparse.Namespace) -> int:
    from qkernels.demo import run

    return run(options.data, options.root, options.epochs, options.out, options.json)


def _bench(options: argparse.Namespace) -> int:
    from qkernels.bench.command import run, show

    if options.show:
        return show(options.show, options.plot)
    return run(
        models=options.model.split(","),
        batches=options.batch,
        size=options.size,
        peers=[peer for peer in options.peers.split(",") if peer],
        threads=options.threads,
        rounds=options.rounds,
        isa=options.isa,
        json_path=options.json,
        plot_path=options.plot,
    )
