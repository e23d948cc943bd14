"""The PEP 517 backend: setuptools', after a look at what the build needs.

The compiled part is built against the torch of the user's environment, so an isolated build must not fetch another
one. Without this check a missing torch or an old setuptools ends in a traceback.
"""

import importlib.util
import sys
from importlib import metadata

MIN_SETUPTOOLS = 77


def _complaint() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "no torch in the build environment. Install torch, then run: pip install --no-build-isolation ."
    if importlib.util.find_spec("setuptools") is None:
        return f"the build needs setuptools >= {MIN_SETUPTOOLS}. Run: pip install -U setuptools"
    version = metadata.version("setuptools")
    if int(version.split(".")[0]) < MIN_SETUPTOOLS:
        return f"the build needs setuptools >= {MIN_SETUPTOOLS}, found {version}. Run: pip install -U setuptools"
    return None


def _hook(name: str):
    def hook(*args, **kwargs):
        complaint = _complaint()
        if complaint is not None:
            sys.exit(f"qkernels: {complaint}")
        from setuptools import build_meta

        return getattr(build_meta, name)(*args, **kwargs)

    return hook


get_requires_for_build_wheel = _hook("get_requires_for_build_wheel")
get_requires_for_build_editable = _hook("get_requires_for_build_editable")
get_requires_for_build_sdist = _hook("get_requires_for_build_sdist")
prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable")
build_wheel = _hook("build_wheel")
build_editable = _hook("build_editable")
build_sdist = _hook("build_sdist")
