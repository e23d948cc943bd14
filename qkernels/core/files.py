"""Files that are the old one or the new one, whatever happens while they are written."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, blob: bytes | bytearray) -> None:
    """Writes and syncs a file beside `path`, then takes its place: never a part of the new content, never none.

    Raises:
        OSError: of the kind that the system says; it names `path`, not the file beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
