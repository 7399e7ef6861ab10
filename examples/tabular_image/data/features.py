"""Fixed features of pictures, which were used before networks, and still beat small networks on small data.

A picture is described by a histogram of oriented gradients (Dalal and Triggs, CVPR 2005) on 8 x 8 cells, a thumbnail of
8 x 8 pixels, and histograms of its colours, in the whole picture and in its quarters.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .images import pixels, without
from .samples import Samples

_CELLS = 8  # a side: cells of the gradients, and pixels of the thumbnail
_BINS = 12  # bins of each histogram of colours
_PART = 1024  # pictures decoded at a time


def picture_features(squares: np.ndarray) -> np.ndarray:
    """Features of pictures.

    Args:
        squares: uint8 pixels, (N, S, S) for grey pictures and (N, S, S, 3) for colour, S at least 16.

    Returns:
        float32 (N, F), where F is 1,888 for grey pictures and 2,136 for colour.
    """
    return np.stack([_features(square) for square in squares])


def with_features(samples: Samples, size: int, *, skip: bool) -> Samples:
    """The data set with the features of its pictures, read as squares of `size` pixels.

    Args:
        samples: The data set; a data set that has features stays as it is.
        size: Side of the pictures, at least 16.
        skip: Leave out rows whose pictures cannot be read.

    Raises:
        InputError: A picture cannot be read and `skip` is false, or no picture can be read.
    """
    if samples.features is not None:
        return samples
    parts, problems = [], {}
    for start in range(0, len(samples), _PART):
        rows = np.arange(start, min(start + _PART, len(samples)))
        squares, failed = pixels(samples, rows, size)
        problems |= {start + place: problem for place, problem in failed.items()}
        parts.append(described(squares))
    return without(replace(samples, features=np.concatenate(parts)), problems, skip=skip)


def feature_scale(features: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (F,) of features (N, F) in the rows `train`."""
    return features[train].mean(axis=0), features[train].std(axis=0)


def standardised(features: np.ndarray, scale: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Features (N, F) with mean 0 and deviation 1 in the rows of `scale`; features that are constant there become 0.

    Values are clipped to 5 deviations: a pixel that is nearly constant in training may be far off elsewhere.
    """
    mean, deviation = scale
    scaled = np.where(deviation > 1e-6, (features - mean) / np.maximum(deviation, 1e-6), 0)
    return torch.from_numpy(scaled.clip(-5, 5).astype(np.float32))


def described(squares: Tensor) -> np.ndarray:
    """Features (B, F) of uint8 pixels (B, 1, S, S) or (B, 3, S, S)."""
    return picture_features((squares[:, 0] if squares.shape[1] == 1 else squares.permute(0, 2, 3, 1)).numpy())


def _features(square: np.ndarray) -> np.ndarray:
    # Every run would wait for these imports, and few runs use features.
    from skimage.color import rgb2hsv
    from skimage.feature import hog
    from skimage.transform import resize

    colour = square.ndim == 3
    image, side = square / 255, len(square)
    gradients = hog(
        image, pixels_per_cell=(side // _CELLS,) * 2, cells_per_block=(2, 2), channel_axis=-1 if colour else None
    )
    values = rgb2hsv(image) if colour else image[..., None]
    half = side // 2
    places = [slice(None), *((slice(*rows), slice(*columns)) for rows in _halves(half) for columns in _halves(half))]
    histograms = [_histogram(values[place][..., channel]) for place in places for channel in range(values.shape[-1])]
    thumbnail = resize(image, (_CELLS, _CELLS), anti_aliasing=True).ravel()
    return np.concatenate([gradients, thumbnail, *histograms]).astype(np.float32)


def _halves(half: int) -> tuple[tuple[int | None, int | None], ...]:
    return (None, half), (half, None)


def _histogram(values: np.ndarray) -> np.ndarray:
    """Square roots of the shares (12,) of values in [0, 1]: their products are Bhattacharyya's coefficient."""
    counts, _ = np.histogram(values, bins=_BINS, range=(0, 1))
    return np.sqrt(counts / values.size)
