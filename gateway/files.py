"""Files: read files that other programs or people provide: secrets, settings, and the provisioner's report."""

import errno
import os
import stat
from pathlib import Path

_NULL = os.stat(os.devnull).st_rdev  # noqa: PTH116  Compose mounts it if no file is given for a secret


def read(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes; the null device is empty.

    Raises OSError if the file cannot be read, is larger, or is not a regular file: reading a FIFO could wait for ever,
    and a device may have no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123  the descriptor is open already
        status = os.fstat(descriptor)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL:
            return b""
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EINVAL, f"it is larger than {most} bytes")
    return data
