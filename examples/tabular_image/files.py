"""Files that are either complete or not there."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import border

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, then: str | None = None) -> Iterator[Path]:
    """Like `replacing`, for a file of a run folder, which reaches the disk before it takes its place.

    Args:
        path: The file.
        then: What the user is to do once the cause of an error is gone; by default resume the run.

    Raises:
        InputError: The file cannot be written.
    """
    then = then or f"go on with {resume_command(path.parent)}"
    try:
        with replacing(path) as temporary:
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        with border("write", path, f"{'free some space' if full else 'make its folder writable'} and {then}"):
            raise


def resume_command(folder: Path) -> str:
    """The command that continues the run in a folder."""
    return f"python examples/tabular_image/train.py --out {shlex.quote(str(folder))} --resume true"
