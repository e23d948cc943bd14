"""Runs the kernel benchmarks of bench/csrc (no torch in the process) and keeps their lines as JSON.

cmake --preset release && cmake --build --preset release
python bench/python/bench_kernels.py --json bench/results/kernels.json
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import BENCH, output_file, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, default=BENCH.parent / "build/release")
    parser.add_argument("--json", type=output_file)
    args = parser.parse_args()
    results = {}
    for program in sorted(args.programs.glob("bench_*")):
        run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
        results[program.name] = [" ".join(line.split()) for line in run.stdout.splitlines() if line.strip()]
        print(run.stdout)
    if args.json:
        write_json(args.json, {"results": results})


if __name__ == "__main__":
    main()
