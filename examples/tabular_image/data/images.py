"""Reading images: files or pixels in, square tensors out."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import normalize

from ..errors import InputError
from .samples import Samples

_COLOUR = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # of ImageNet, which pretrained encoders expect
_GREY = ([0.449], [0.226])  # their means over the channels


def read_image(path: Path, grey: bool) -> Image.Image:
    """Decodes one file to mode "L" or "RGB", upright.

    Raises:
        ValueError: The file is not a readable image; the message says why, in a few words.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # PIL's own conversion clips 16 bits instead of scaling them
                upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
            return upright.convert("L" if grey else "RGB")
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Exception as error:  # the decoders raise whatever a broken file leads them to
        reason = str(error) or type(error).__name__
        raise ValueError(reason) from error


def square_image(samples: Samples, row: int, size: int) -> Image.Image:
    """One row's image as a square of `size` pixels, padded to keep its shape; several files make a mosaic.

    Raises:
        InputError: A file cannot be read.
    """
    if isinstance(samples.images, np.ndarray):
        return ImageOps.pad(Image.fromarray(samples.images[row]), (size, size))
    paths = samples.images[row]
    tiles = math.ceil(math.sqrt(len(paths)))
    side = size // tiles
    mosaic = Image.new("L" if samples.grey else "RGB", (size, size))
    for place, path in enumerate(paths):
        try:
            image = read_image(path, samples.grey)
        except ValueError as error:
            raise InputError(f"{samples.where(row)}: cannot read image {path} ({error}); restore the file") from error
        mosaic.paste(ImageOps.pad(image, (side, side)), (place % tiles * side, place // tiles * side))
    return mosaic


def pixels(samples: Samples, rows: np.ndarray, size: int) -> Tensor:
    """uint8 pixels (B, channels, size, size) of some rows; see `square_image`."""
    if isinstance(samples.images, np.ndarray) and samples.images.shape[1:3] == (size, size):
        squares = torch.from_numpy(samples.images[rows])
    else:
        squares = torch.from_numpy(np.stack([np.asarray(square_image(samples, int(row), size)) for row in rows]))
    return squares[:, None] if squares.ndim == 3 else squares.permute(0, 3, 1, 2).contiguous()


def in_memory(samples: Samples, size: int, threads: int) -> Samples:
    """The data set with every image decoded to uint8 pixels of `size`; all files must be readable."""
    with ThreadPoolExecutor(max(1, threads)) as pool:  # the decoders release the interpreter lock
        squares = pool.map(lambda row: np.asarray(square_image(samples, row, size)), range(len(samples)))
        return replace(samples, images=np.stack(list(squares)))


def missing_images(samples: Samples) -> dict[int, str]:
    """Which rows lack a file, in order, and what to tell the user."""
    if isinstance(samples.images, np.ndarray):
        return {}
    return {
        row: f"{samples.where(row)}: image {path} does not exist"
        for row, paths in enumerate(samples.images)
        for path in paths
        if not path.is_file()
    }


def broken_images(samples: Samples, threads: int) -> dict[int, str]:
    """Which rows have a file that cannot be decoded, in order, and what to tell the user.

    Decodes every file once: an error in a worker process would reach the user as a traceback, in the middle of a run.
    """
    if isinstance(samples.images, np.ndarray):
        return {}

    def problem(paths: tuple[Path, ...]) -> str | None:
        for path in paths:
            try:
                read_image(path, samples.grey)
            except ValueError as error:
                return f"cannot read image {path} ({error})"
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:  # the decoders release the interpreter lock
        problems = list(pool.map(problem, samples.images))
    return {row: f"{samples.where(row)}: {text}" for row, text in enumerate(problems) if text}


def normalise(images: Tensor, grey: bool) -> Tensor:
    """Images (B, channels, S, S) in [0, 1] with about zero mean and unit deviation."""
    normalised: Tensor = normalize(images, *(_GREY if grey else _COLOUR))
    return normalised


def random_affine(
    images: Tensor,
    draws: Tensor,
    *,
    degrees: float = 8,
    shift: float = 0.04,
    scale: tuple[float, float] = (0.93, 1.07),
    mirror: bool = False,
) -> Tensor:
    """Rotates, scales, shifts and mirrors each image of a batch by itself, all in one interpolation.

    torchvision's transforms move all images of a batch alike; one by one they cost more than a small CNN.

    Args:
        images: float (B, channels, S, S); what moves in from outside is 0.
        draws: (B, 5) uniform numbers in [0, 1): angle, scale, shift across and down, mirror.
        degrees: most rotation to either side.
        shift: most shift to either side, as a share of the side.
        scale: least and most magnification.
        mirror: mirror half of the images left to right.

    Returns:
        (B, channels, S, S).
    """
    angle, size, across, down, flip = draws.to(images).unbind(dim=1)
    angle = (2 * angle - 1) * math.radians(degrees)
    zoom = 1 / (scale[0] + (scale[1] - scale[0]) * size)
    side = torch.where(flip < 0.5, -1.0, 1.0) if mirror else torch.ones_like(flip)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # affine_grid counts in [-1, 1], so a shift by a share of the side is twice that.
    rows = [side * cos, sin, 2 * shift * (2 * across - 1), -side * sin, cos, 2 * shift * (2 * down - 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
