"""Prints what qkernels needs beside torch: the dependencies of pyproject.toml and of the extras named as arguments."""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
names = list(project["dependencies"])
for extra in sys.argv[1:]:
    names += project["optional-dependencies"][extra]
print("\n".join(name for name in names if not name.startswith("torch")))
