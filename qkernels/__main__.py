"""`python -m qkernels`."""

import sys

from qkernels.cli import program

sys.exit(program())
