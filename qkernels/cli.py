"""The command line: `python -m qkernels info | selftest | demo | bench`, or `qkernels` where it is installed."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import qkernels
from qkernels.errors import QKernelsError
from qkernels.ops.machine import info
from qkernels.testing import ISAS

INTERRUPTED, NOBODY_READS = 130, 141  # what a shell reports for SIGINT and SIGPIPE


def program() -> int:
    """`main` as a process: whatever stdout cannot take has been reported, so its last flush is not tried again."""
    try:
        return main()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if a check failed, 130 after Ctrl-C. Errors exit with 2."""
    parser = argparse.ArgumentParser(prog="python -m qkernels", description="A quantization runtime for PyTorch.")
    parser.add_argument("--version", action="version", version=f"qkernels {qkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="version, instruction sets, CUDA build, kernels chosen")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_info)

    command = commands.add_parser("selftest", help="every kernel against the plain-torch reference on this machine")
    command.set_defaults(run=_selftest)

    command = commands.add_parser("demo", help="train a small network in float, convert it, compare")
    command.add_argument("--data", help="digits, fashion-mnist or mnist-5k (default: the largest one that is here)")
    command.add_argument("--root", help="where the fashion-mnist files are")
    command.add_argument("--epochs", type=positive, help="training epochs (default: enough for the data set)")
    command.add_argument(
        "--out",
        type=output_file,
        default="qkernels_demo.png",
        help="the picture, which needs matplotlib (default: %(default)s)",
    )
    command.add_argument("--json", type=output_file, help="also write the numbers there")
    command.set_defaults(run=_demo)

    command = commands.add_parser("bench", help="time whole networks against the engines that are installed")
    command.add_argument(
        "--model",
        type=_names,
        default="mobilenet_v2,resnet18,resnet50,efficientnet_lite0",
        help="separated by commas; names other than the default ones are torchvision's (default: %(default)s)",
    )
    command.add_argument(
        "--batch", type=_several_positive, default=[1], help="batch sizes, separated by commas (default: 1)"
    )
    command.add_argument("--size", type=positive, default=224, help="height and width of images (default: %(default)s)")
    command.add_argument(
        "--peers", type=_names_or_none, default="torch,ort,openvino", help="'' for none (default: %(default)s)"
    )
    command.add_argument("--threads", type=positive, default=1, help="of every engine (default: %(default)s)")
    command.add_argument("--rounds", type=positive, default=9, help="blocks of each engine (default: %(default)s)")
    command.add_argument(
        "--isa",
        default="",
        choices=["", *ISAS[1:]],
        help="limit every engine to this instruction set (ONNX Runtime, which cannot be limited, is left out; scalar "
        "is no choice, as no other engine can be limited to it)",
    )
    command.add_argument("--json", type=output_file, help="also write the numbers there")
    command.add_argument("--plot", type=output_file, help="also draw them there (needs matplotlib)")
    command.add_argument(
        "--show", type=existing_file, help="measure nothing: print (and draw) what --json wrote to this file"
    )
    command.set_defaults(run=_bench)

    options = parser.parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return NOBODY_READS
    except KeyboardInterrupt:
        return INTERRUPTED
    except (QKernelsError, OSError) as error:
        parser.exit(2, f"{parser.prog} {options.command}: error: {error}\n")


# ---- types of arguments; the examples take them too ----


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file that exists, got {text!r}")
    return path


def output_file(text: str) -> Path:
    """A file that can be made or replaced: what cannot be written is said before the work, not after it."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file, but {text!r} is a folder or a device")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must lie in a folder that can be written to, got {text!r}")
    return path


def _several_positive(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names separated by commas, got {text!r}")
    return names


def _names_or_none(text: str) -> list[str]:
    return _names(text) if text else []


# ---- commands ----


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
        models=options.model,
        batches=options.batch,
        size=options.size,
        peers=options.peers,
        threads=options.threads,
        rounds=options.rounds,
        isa=options.isa,
        json_path=options.json,
        plot_path=options.plot,
    )
