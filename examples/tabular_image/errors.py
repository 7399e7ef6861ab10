"""Errors that the user can correct, each told in one sentence, and the borders where such errors come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

_MOST = 200  # characters of a reason: some libraries write paragraphs


class InputError(Exception):
    """Bad input, told in one sentence that names what is wrong, where, and the remedy.

    Attributes:
        everywhere: Every process of a run meets the error, so that the first one tells it for all.
    """

    everywhere: ClassVar[bool] = True


class ImageError(InputError):
    """An image is missing or damaged. Of several processes only the process that reads the image may meet the error.

    Args:
        message: What is wrong.
        row: The position of the image's row, for an image that is met in training.
    """

    everywhere = False

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class DivergenceError(InputError):
    """A loss is no longer finite. One of several processes may meet this error before the others."""

    everywhere = False


@contextmanager
def border(doing: str, path: Path | str, remedy: str) -> Iterator[None]:
    """Turns any exception of reading, writing or decoding into an `InputError`; the block should do nothing else.

    Every kind of exception is caught, as decoders raise any kind at a damaged file.

    Args:
        doing: What the block does, such as "read".
        path: What the block reads, writes or decodes.
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
