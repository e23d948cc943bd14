"""How long `import qkernels` takes after `import torch`: the median over fresh processes. Promise: at most 0.15 s."""

import argparse
import json
import statistics
import subprocess
import sys

import harness

CODE = "import time, torch; t = time.perf_counter(); import qkernels; print(time.perf_counter() - t)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--json", type=harness.output_file, help="also write the result, with machine and commit, to this file"
    )
    options = parser.parse_args()
    runs = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        for _ in range(options.repeats)
    ]
    seconds = [float(run.stdout) for run in runs]
    result = {"import_s": {"median": statistics.median(seconds), "min": min(seconds), "runs": options.repeats}}
    print(json.dumps(result))
    if options.json:
        harness.write_json(options.json, result)


if __name__ == "__main__":
    main()
