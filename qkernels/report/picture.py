"""matplotlib, imported when a picture is asked for; it is not a dependency of qkernels."""

import os
from typing import Any

from qkernels.core.files import file_path
from qkernels.errors import InvalidArgument, Unsupported


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of that many inches.

    Raises:
        Unsupported: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(f"a picture needs matplotlib: pip install matplotlib ({error})") from error
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(path: str | os.PathLike) -> None:
    """Raises what drawing to `path` would, before there is anything to draw.

    Raises:
        Unsupported: there is no matplotlib.
        InvalidArgument: matplotlib writes no format of that ending.
    """
    path = file_path("picture", path)
    formats = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise InvalidArgument(f"picture: the ending of {path} must be one of {sorted(formats)}")
