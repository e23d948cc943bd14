"""qkernels: a quantization runtime for PyTorch.

`prepare`, `calibrating`, `convert`, `verify`, `save` and `load` are the main verbs; `qkernels.ops` holds the kernels.
"""

import os
import sys

import torch  # noqa: F401  (loads the libraries that the compiled part links to)

try:
    from qkernels import _C  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "qkernels._C":
        raise
    raise ImportError(
        "qkernels was imported from a source tree without its compiled part. Build it with "
        "`pip install --no-build-isolation .` or, in place, `python setup.py build_ext --inplace`."
    ) from error
except ImportError as error:
    # `python -m qkernels` and the installed `qkernels`: a line, no traceback.
    if os.path.basename("".join(sys.argv[:1])) in ("-m", "qkernels") and "QKERNELS_ISA" in str(error):
        sys.exit(f"qkernels: {error}")
    raise

from qkernels import errors, nn, ops, testing
from qkernels.core.convert import convert
from qkernels.core.exact import exact
from qkernels.core.phases import calibrate, calibrating, non_finite_counts
from qkernels.core.prepare import prepare
from qkernels.core.qspec import QParams, QSpec
from qkernels.core.recipe import Recipe
from qkernels.core.state import load, save
from qkernels.core.training import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze,
    freeze_bn,
    phase,
    prepare_qat,
    reestimate_bn,
    unfreeze_bn,
)
from qkernels.core.verify import verify
from qkernels.ops.machine import info
from qkernels.plan import Plan, compile, load_plan
from qkernels.report import compare

__all__ = [
    "Plan",
    "QParams",
    "QSpec",
    "Recipe",
    "calibrate",
    "calibrating",
    "compare",
    "compile",
    "convert",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "errors",
    "exact",
    "freeze",
    "freeze_bn",
    "info",
    "load",
    "load_plan",
    "nn",
    "non_finite_counts",
    "ops",
    "phase",
    "prepare",
    "prepare_qat",
    "reestimate_bn",
    "save",
    "testing",
    "unfreeze_bn",
    "verify",
]
__version__ = "0.1.0"
