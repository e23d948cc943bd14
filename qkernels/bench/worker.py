"""The process of one engine: `python -m qkernels.bench.worker --worker ENGINE --threads N`, started by the command."""

import argparse

import torch

from qkernels.bench.engines import ENGINES, Case
from qkernels.bench.harness import serve

TOO_SLOW_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=sorted(ENGINES), required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def build(message: dict):
        case = Case(message["model"], message["batch"], message["size"], options.threads)
        return ENGINES[options.worker].build(case)

    serve(build, TOO_SLOW_SECONDS)


if __name__ == "__main__":
    main()
