"""Reading images: files or pixels in, square tensors out."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

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


def image_transform(grey: bool, augment: bool) -> Callable[[Image.Image], Tensor]:
    """Square PIL image to a normalised float tensor (channels, S, S).

    Args:
        grey: One channel instead of three.
        augment: Small random rotation, shift and scale; colour images are also mirrored. Grey ones are not, because a
            scan or a silhouette may be another class in the mirror. All draws are from torch's default generator.
    """
    mean, std = _GREY if grey else _COLOUR
    steps: list[v2.Transform] = [v2.PILToTensor()]
    if augment:
        bilinear = v2.InterpolationMode.BILINEAR
        steps += [v2.RandomAffine(degrees=8, translate=(0.04, 0.04), scale=(0.93, 1.07), interpolation=bilinear)]
        steps += [] if grey else [v2.RandomHorizontalFlip()]
    transform: Callable[[Image.Image], Tensor] = v2.Compose(
        [*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    )
    return transform
