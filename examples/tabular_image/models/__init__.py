"""Encoders: an image or a table row in, a feature vector out."""

from .image import image_encoder
from .table import TableMLP, table_encoder

__all__ = ["TableMLP", "image_encoder", "table_encoder"]
