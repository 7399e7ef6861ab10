"""Reading images: files or pixels in, square tensors out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import normalize

from ..errors import ImageError, InputError
from .decoding import read_image, unidentified
from .samples import Samples

_PART = 256  # files that a thread reads in one go: a task for each would cost as much as opening it
_COLOUR = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # of ImageNet, which pretrained encoders expect
_GREY = ([0.449], [0.226])  # their means over the channels


def square_image(samples: Samples, row: int, size: int) -> Image.Image:
    """One row's image as a square of `size` pixels, padded to keep its shape.

    Several files make a mosaic. Its grid is the smallest square that holds them, filled line by line. A None is a black
    tile. The grid depends on the row's own number of files.

    Raises:
        ImageError: A file cannot be read, no file is named, or `size` is too small for a pixel of each tile.
    """
    if isinstance(samples.images, np.ndarray):
        return _padded(Image.fromarray(samples.images[row]), size)
    paths = samples.images[row]
    files = _files(samples, row)
    tiles = math.ceil(math.sqrt(len(paths)))
    side = size // tiles
    if not side:
        raise ImageError(
            f"{samples.where(row)}: {len(paths)} images do not fit into {size} x {size} pixels; "
            f"give an --image_size of at least {tiles}"
        )
    mosaic = Image.new("L" if samples.grey else "RGB", (size, size))
    for place, path in files:
        try:
            tile = _padded(read_image(path, samples.grey), side)
        except Exception as error:
            raise _told(samples, row, path, error) from error
        mosaic.paste(tile, (place % tiles * side, place // tiles * side))
    return mosaic


def pixels(samples: Samples, rows: np.ndarray, size: int) -> tuple[Tensor, dict[int, str]]:
    """uint8 pixels (B, channels, size, size) of some rows, and a message for each unreadable one, by place.

    An unreadable picture is black.
    """
    if isinstance(samples.images, np.ndarray) and samples.images.shape[1:3] == (size, size):
        squares, problems = samples.images[rows], {}
    else:
        squares, read = _reader(samples, rows, size)
        with _quiet():
            problems = _failures(read, range(len(rows)))
    images = torch.from_numpy(squares)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous(), problems


def in_memory(samples: Samples, size: int, threads: int) -> tuple[Samples, dict[int, str]]:
    """The data set with every image decoded to uint8 pixels of `size`, and a message for each unreadable row."""
    squares, read = _reader(samples, np.arange(len(samples)), size)
    problems = _parallel_failures(read, len(samples), threads)
    return replace(samples, images=squares), problems


def unidentified_images(samples: Samples, threads: int) -> dict[int, str]:
    """A message for each row with a file that is missing or is not an image, in order.

    Only the header of a file is read. Pixels are decoded when they are needed.
    """
    if isinstance(samples.images, np.ndarray):
        return {}

    def identify(row: int) -> None:
        for _, path in _files(samples, row):
            try:
                with Image.open(path):
                    pass
            except Exception as error:
                raise _told(samples, row, path, error) from error

    return _parallel_failures(identify, len(samples), threads)


def without(samples: Samples, problems: dict[int, str], *, skip: bool) -> Samples:
    """The data set without the rows that have problems.

    Raises:
        InputError: A row has a problem and `skip` is false, or all rows have problems.
    """
    if not problems:
        return samples
    first = next(iter(problems.values()))
    more = f" (and {len(problems) - 1} more rows have no readable image)" if len(problems) > 1 else ""
    if not skip:
        raise InputError(
            f"{first}{more}; give each row a readable image, or leave such rows out with --skip_corrupt true"
        )
    if len(problems) == len(samples):
        raise InputError(f"no image of {samples.name} can be read; correct paths or files, the first being: {first}")
    return samples.take(np.delete(np.arange(len(samples)), list(problems)))


def _files(samples: Samples, row: int) -> list[tuple[int, Path]]:
    """The places and paths of one row's files.

    Raises:
        ImageError: The row has no file.
    """
    files = [(place, path) for place, path in enumerate(samples.images[row]) if path is not None]
    if not files:
        raise ImageError(f"{samples.where(row)}: no image is named")
    return files


def _padded(image: Image.Image, side: int) -> Image.Image:
    """An image in the middle of a black square of `side` pixels, as large as fits.

    Each side keeps at least one pixel: Pillow's own `pad` leaves nothing of a picture of 1 x 1000.
    """
    width, height = (max(1, round(length / max(image.size) * side)) for length in image.size)
    square = Image.new(image.mode, (side, side))
    square.paste(image.resize((width, height)), (round((side - width) / 2), round((side - height) / 2)))
    return square


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides Pillow's warnings about pictures that Pillow can read.

    Warning filters belong to the whole process, so the threads of a pool must not enter here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # odd metadata
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a large picture; twice as large is an error
        yield


def _reader(samples: Samples, rows: np.ndarray, size: int) -> tuple[np.ndarray, Callable[[int], None]]:
    """Black squares for some rows, uint8 (B, size, size[, 3]), and a function that fills the square at a place."""
    squares = np.zeros((len(rows), size, size) if samples.grey else (len(rows), size, size, 3), dtype=np.uint8)

    def read(place: int) -> None:
        squares[place] = np.asarray(square_image(samples, int(rows[place]), size))

    return squares, read


def _failures(read: Callable[[int], None], places: range) -> dict[int, str]:
    """The messages of the places where `read` fails."""
    failures = {}
    for place in places:
        try:
            read(place)
        except ImageError as error:
            failures[place] = str(error)
    return failures


def _parallel_failures(read: Callable[[int], None], count: int, threads: int) -> dict[int, str]:
    """The failures at places 0 to `count`, in order, found by threads: decoders release the interpreter lock."""
    parts = [range(start, min(start + _PART, count)) for start in range(0, count, _PART)]
    with _quiet(), ThreadPoolExecutor(max(1, threads)) as pool:
        failures = pool.map(partial(_failures, read), parts)
        return {place: failure for part in failures for place, failure in part.items()}


def _told(samples: Samples, row: int, path: Path, error: Exception) -> ImageError:
    """The error for a file that is not a readable image. Decoders raise any kind of exception at a broken file."""
    match error:
        case FileNotFoundError():
            return ImageError(f"{samples.where(row)}: image {path} does not exist")
        case UnidentifiedImageError():
            reason = unidentified(path)
        case OSError(strerror=str(reason)):
            pass
        case _:
            reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{samples.where(row)}: cannot read image {path} ({reason})")


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

    torchvision's transforms move all images of a batch in the same way. Called for each image, the transforms cost more
    than a small CNN.

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
    # affine_grid counts in [-1, 1], so a shift by a share of the side is twice that share.
    rows = [side * cos, sin, 2 * shift * (2 * across - 1), -side * sin, cos, 2 * shift * (2 * down - 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
