"""The one exception that means: the user's input is at fault."""

from __future__ import annotations


class InputError(Exception):
    """Bad input, told in one sentence that names what is wrong, where, and the remedy."""


class ImageError(InputError):
    """An image is missing or damaged. Of several processes only the one that reads it may know."""
