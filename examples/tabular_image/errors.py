"""The one exception that means: the user's input is at fault."""

from __future__ import annotations


class InputError(Exception):
    """Bad input, told in one sentence that names what is wrong, where, and the remedy."""


class ImageError(InputError):
    """An image is missing or damaged. Of several processes only the one that reads it may know.

    Args:
        message: What is wrong.
        row: The position of its row, where one is met in training.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
