"""What the front ends share: checks of keys and names, and what they say."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qkernels.core.layers import PREPARED
from qkernels.errors import InvalidArgument, close_matches

WEIGHTED = tuple(PREPARED)  # the classes of layers whose weight can be rounded


def check_keys(entry: Any, known: Iterable[str], where: str) -> None:
    """Refuses what is no dict, and keys that mean nothing."""
    if not isinstance(entry, Mapping):
        raise InvalidArgument(f"{where}: must be a dict, got {entry!r}")
    for key in entry:
        if key not in known:
            raise InvalidArgument(f"{where}.{key}: unknown key{close_matches(str(key), known)}")


def from_json(source: Any) -> Any:
    """What a JSON file holds; anything that is no path as it is.

    Raises:
        InvalidArgument: the file holds something else.
        OSError: it cannot be read, of the kind that the system says.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        return json.loads(Path(source).read_text())
    except ValueError as error:
        raise InvalidArgument(f"{os.fspath(source)!r}: must be a JSON file: {error}") from None


def check_one_of(value: Any, known: Iterable[Any], where: str) -> None:
    if value not in known:
        raise InvalidArgument(f"{where}: must be one of {list(known)}, got {value!r}")


def check_words(words: Any, where: str) -> None:
    """Refuses what is no list of strings; one string is not one."""
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise InvalidArgument(f"{where}: must be a list of strings, got {words!r}")


def with_names(modules: Mapping[str, nn.Module], names: Iterable[str], where: str) -> set[str]:
    """The paths `names`, all of which must exist; of a module that has several, the first."""
    check_words(names, where)
    for name in names:
        if name not in modules:
            raise InvalidArgument(f"{where}: the model has no module {name!r}{close_matches(name, modules)}")
    return first_names(modules, names)


def first_names(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> set[str]:
    """The first path of each module that one of `paths` leads to."""
    firsts = {module: path for path, module in reversed(modules.items())}
    return {firsts[modules[path]] for path in paths}


def with_types(modules: Mapping[str, nn.Module], names: Iterable[str], known: Iterable[type], where: str) -> set[str]:
    """The paths of the modules whose class has one of `names`; "default" stands for `WEIGHTED`.

    The classes `known` may be named though the model has none of them.
    """
    check_words(names, where)
    names, types = set(names), {path: type(m).__name__ for path, m in modules.items()}
    there = {*types.values(), *(cls.__name__ for cls in known), "default"}
    for name in names - there:
        raise InvalidArgument(f"{where}: no module is a {name!r}{close_matches(name, there)}")
    if "default" in names:
        names |= {cls.__name__ for cls in WEIGHTED}
    return first_names(modules, (path for path, name in types.items() if name in names))
