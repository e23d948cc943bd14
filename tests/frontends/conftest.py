"""AIMET, if it is in a folder of its own: QKERNELS_AIMET_PATH. What this environment has comes first."""

import os
import sys

sys.path += filter(None, os.environ.get("QKERNELS_AIMET_PATH", "").split(os.pathsep))
