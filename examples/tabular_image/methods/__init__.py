"""The methods, one file each."""

from __future__ import annotations

from .alternating import Alternating
from .base import Method
from .concatenation import Concatenation
from .gaal import GAAL
from .gaal_star import GAALStar
from .image_only import ImageOnly
from .table_only import TableOnly

METHODS: dict[str, type[Method]] = {
    "image": ImageOnly,
    "table": TableOnly,
    "concatenation": Concatenation,
    "alternating": Alternating,
    "gaal": GAAL,
    "gaal_star": GAALStar,
}

__all__ = ["METHODS", "Method"]
