"""Files that are the old one or the new one, whatever happens while they are written."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from qkernels.errors import InvalidArgument, InvalidType


def file_path(verb: str, path: Any) -> Path:
    """What a verb takes as the name of a file: a string, bytes or os.PathLike."""
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise InvalidType(f"{verb}: path must be a string or os.PathLike, got {type(path).__name__}") from None
    if not name:
        raise InvalidArgument(f"{verb}: path must name a file, got {path!r}")
    return Path(name)


def write_atomically(path: Path, blob: bytes | bytearray) -> None:
    """Writes and syncs a file beside `path`, then takes its place: never a part of the new content, never none.

    A symbolic link stays and the file that it leads to is replaced; a file that was there keeps its permissions.

    Raises:
        OSError: of the kind that the system says, or `path` is a device or a pipe, or a file that this user may not
            write; it names `path`, not the file beside it.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise FileExistsError(errno.EEXIST, "There is something that is no regular file", str(path))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")  # short, for a long name is a good one too
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if target.is_file():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
