"""How long `import qkernels` takes after `import torch`: the median over fresh processes. Promise: at most 0.15 s."""

import argparse
import json
import statistics
import subprocess
import sys

CODE = "import time, torch; t = time.perf_counter(); import qkernels; print(time.perf_counter() - t)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    runs = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(repeats)
    ]
    seconds = [float(run.stdout) for run in runs]
    print(json.dumps({"import_s": {"median": statistics.median(seconds), "min": min(seconds), "runs": repeats}}))


if __name__ == "__main__":
    main()
