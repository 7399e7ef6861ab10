"""Encoders: an image or a table row in, a feature vector out."""

from .image import image_encoder
from .table import TableMLP

__all__ = ["TableMLP", "image_encoder"]
