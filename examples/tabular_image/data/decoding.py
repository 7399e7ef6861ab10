"""Decodes the file of a picture to grey levels or colours of 8 bits.

The rules for what a file may hold:

- 1 bit, 8 bits, palettes, RGB, CMYK, YCbCr, HSV and LAB: Pillow converts the picture. Pillow keeps the upper 8 bits of
  16-bit colours.
- Unsigned integers of more bits: the range of the smallest of 8, 10, 12, 14, 16, 24 and 32 bits that holds the
  picture's highest value becomes 0 to 255. Scanners and cameras store 12 bits in 16.
- Signed integers: the own range of a picture with negative values, lowest to highest, becomes 0 to 255. A picture
  without negative values is read as unsigned.
- Floats: values of 0 to 1 are multiplied by 255. Values of 0 to 255 are kept where the highest is at least 16. The own
  range of any other picture, such as a depth in metres, becomes 0 to 255. A pixel that is not finite takes the lowest
  finite value.
- One value all over: the picture is black where the own range would be used.
- A TIFF that counts from white, `WhiteIsZero`, is inverted.
- Transparency: the picture is laid on mid-grey, (128, 128, 128). A black and a white shape both stay visible there.
- Several frames or pages: the first is read.
- Orientation: the picture is turned upright as EXIF says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_BITS = (8, 10, 12, 14, 16, 24, 32)  # depths that cameras, scanners and microscopes have
_FAINT = 16  # floats of 0 to less than this would be nearly black as levels of 0 to 255
_GROUND = (128, 128, 128, 255)
_WHITE_IS_ZERO, _SAMPLE_FORMAT = 262, 339  # tags of a TIFF: photometric interpretation 0, and 1 unsigned or 2 signed


def read_image(path: Path, grey: bool) -> Image.Image:
    """Decodes the first frame of one file, upright, by the rules above.

    Args:
        path: The file.
        grey: Read grey levels, else colours.

    Returns:
        A picture of mode "L" or "RGB".

    Raises:
        ValueError: No value of the picture is finite, or Pillow cannot convert the picture's mode.
        Exception: Pillow's decoders raise any kind of exception at a broken file.
    """
    # Given a path, Pillow maps plain TIFFs into memory, and then takes the turned picture's sides for the file's sides.
    with path.open("rb") as stream, Image.open(stream) as file:
        file.load()
        tags = getattr(file, "tag_v2", {})
        image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF" or (image.mode == "L" and _is_signed(tags)):
        image = _eight_bits(image, tags)
    try:
        if image.has_transparency_data:
            image = _on_ground(image)
        if image.mode != "L":
            image = image.convert("RGB")  # Pillow converts LAB to RGB alone
    except ValueError as error:
        raise ValueError(f"Pillow cannot convert mode {image.mode}; save the picture as RGB") from error
    return image.convert("L" if grey else "RGB")


def unidentified(path: Path) -> str:
    """Says what a file is, from its first bytes, where Pillow cannot tell."""
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF that is damaged or has a depth that Pillow cannot open; save the picture with 8 or 16 bits"
    if head[4:] == b"ftyp":
        return "a HEIC picture or a film, which Pillow cannot open; save the picture as JPEG"
    return "not an image"


def _eight_bits(image: Image.Image, tags: Mapping[int, object]) -> Image.Image:
    """A picture of more than 8 bits in mode "L", or in "LA" where one value stands for transparency."""
    values = np.asarray(image)
    if values.dtype == np.uint8:  # Pillow swaps signed and unsigned for 8 and 32 bits of a TIFF
        values = values.view(np.int8)
    elif values.dtype == np.int32 and tags and not _is_signed(tags):
        values = values.view(np.uint32)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel has a finite value")
    values = np.where(finite, values, values[finite].min())
    low, high = _range(values)
    levels = np.rint((values.astype(np.float64) - low) / ((high - low) or 1) * 255).astype(np.uint8)
    if tags.get(_WHITE_IS_ZERO) == 0:  # Pillow itself inverts only pictures of few bits
        levels = 255 - levels
    shallow = Image.fromarray(levels)
    if "transparency" in image.info:
        shallow.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return shallow


def _range(values: np.ndarray) -> tuple[float, float]:
    """The values that become 0 and 255."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return low, high
    if values.dtype.kind != "f":
        return 0, next(2**bits - 1 for bits in _BITS if high < 2**bits)
    if high <= 1:
        return 0, 1
    return (0, 255) if _FAINT <= high <= 255 else (low, high)


def _is_signed(tags: Mapping[int, object]) -> bool:
    return tags.get(_SAMPLE_FORMAT) == (2,)


def _on_ground(image: Image.Image) -> Image.Image:
    """A picture with transparency, laid on mid-grey."""
    if image.mode == "La":  # Pillow knows no shorter way from grey that is multiplied by its transparency
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _GROUND), image).convert("RGB")
