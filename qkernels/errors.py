"""What qkernels raises. Every class is also a built-in error, so that `except ValueError` keeps working."""

import difflib
import operator
from collections.abc import Iterable
from typing import Any


class QKernelsError(Exception):
    """The base of all errors raised by the Python part of qkernels."""


class InvalidArgument(QKernelsError, ValueError):
    """An argument has a value that cannot be used; the message names it and says what was expected."""


class InvalidType(QKernelsError, TypeError):
    """An argument has the wrong type or dtype."""


class InvalidState(QKernelsError, RuntimeError):
    """The call does not fit the phase that the model is in, such as converting a model that was never calibrated."""


class Unsupported(QKernelsError, NotImplementedError):
    """The request makes sense but is not available; the message says what to do instead."""


class CalibrationError(QKernelsError, ValueError):
    """The observed data cannot give a grid: NaN or Inf, or no data at all. The message names the module."""


class CheckpointError(QKernelsError, ValueError):
    """A saved model is damaged, incomplete or of an unknown format."""


def close_matches(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...` for a message about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"; there are {sorted(known)}" if len(known) <= 20 else ""


# --- checks of plain values; `what` names the verb and the argument ---------------------------------------------------


def integer(what: str, value: Any, least: int | None = None) -> int:
    """`value` as an int, if it is an integer of any library."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InvalidType(f"{what} must be an integer, got {value!r}")
    if least is not None and number < least:
        raise InvalidArgument(f"{what} must be at least {least}, got {number}")
    return number


def boolean(what: str, value: Any) -> bool:
    """Refuses what is only true or false in a condition: "no" would be True."""
    if not isinstance(value, bool):
        raise InvalidType(f"{what} must be True or False, got {value!r}")
    return value
