"""Errors that are the user's to mend, each told in one sentence; and the borders where such errors come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

_MOST = 200  # characters of a reason: some libraries explain themselves in paragraphs


class InputError(Exception):
    """Bad input, told in one sentence that names what is wrong, where, and the remedy.

    Attributes:
        everywhere: Every process of a run meets the error, so that the first one tells it for all.
    """

    everywhere: ClassVar[bool] = True


class ImageError(InputError):
    """An image is missing or damaged. Of several processes only the one that reads it may know.

    Args:
        message: What is wrong.
        row: The position of its row, where one is met in training.
    """

    everywhere = False

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class DivergenceError(InputError):
    """A loss is no longer finite. Of several processes one may meet that before the others do."""

    everywhere = False


@contextmanager
def border(doing: str, path: Path | str, remedy: str) -> Iterator[None]:
    """Turns whatever reading, writing or decoding raises into an `InputError`; the block should hold nothing else.

    Every kind of exception is caught: decoders raise whatever a damaged file leads them to.

    Args:
        doing: What the block does, such as "read".
        path: What it does that to.
        remedy: What the user can do about it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot {doing} {path} ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    line = " ".join(text.split())
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"
