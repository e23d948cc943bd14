"""The PEP 517 backend: setuptools', which first asks for torch.

The compiled part is built against the torch of the user's environment, so an isolated build must not fetch another
one. Without this check such a build ends in a traceback.
"""

import importlib.util
import sys

from setuptools import build_meta as _setuptools


def _needs_torch(hook):
    def checked(*args, **kwargs):
        if importlib.util.find_spec("torch") is None:
            sys.exit(
                "qkernels: no torch in the build environment. Install torch, then run: "
                "pip install --no-build-isolation ."
            )
        return hook(*args, **kwargs)

    return checked


get_requires_for_build_wheel = _needs_torch(_setuptools.get_requires_for_build_wheel)
get_requires_for_build_editable = _needs_torch(_setuptools.get_requires_for_build_editable)
get_requires_for_build_sdist = _needs_torch(_setuptools.get_requires_for_build_sdist)
prepare_metadata_for_build_wheel = _needs_torch(_setuptools.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _needs_torch(_setuptools.prepare_metadata_for_build_editable)
build_wheel = _needs_torch(_setuptools.build_wheel)
build_editable = _needs_torch(_setuptools.build_editable)
build_sdist = _needs_torch(_setuptools.build_sdist)
