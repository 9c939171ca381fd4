"""check_target: where a file is to appear whole or not at all, and whether it can."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import TemporaryFile


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the place that a file of this name has, links followed, having found out that one can be put there.

    Raises OSError, with the name as given, when the folder cannot be written, or when what is there already is no
    regular file: a device, a pipe or a folder must not be replaced by a file.
    """
    given, target = Path(path), Path(os.path.realpath(path))
    try:
        # Asked of the name as given: a link such as /dev/stdout may lead to what has no name.
        if given.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if given.exists() and not given.is_file():
            raise FileExistsError(errno.EEXIST, "it exists and is not a regular file")
        with TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return target


def same_file(left: str | os.PathLike[str], right: str | os.PathLike[str]) -> bool:
    """Return whether two names lead to one file: by links of either kind, or, where there is none yet, to its place."""
    try:
        return os.path.samefile(left, right)
    except OSError:
        return os.path.realpath(left) == os.path.realpath(right)
