"""Times whole networks: `python -m qkernels bench` from the checkout, with the commit in the JSON.

python bench/python/bench_models.py --model mobilenet_v2,resnet18,resnet50 --json bench/results/models.json
"""

import sys

import harness  # noqa: F401  (finds the checkout)

from qkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
