"""Fixed features of pictures, and runs on them in place of the pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tabular_image.data.features import feature_scale, picture_features, standardised, with_features
from tabular_image.data.module import TabularImageData
from tabular_image.errors import InputError
from tabular_image.models import image_encoder
from test_data import make_samples


def squares(count=12, side=32, colour=True):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, side, side, 3) if colour else (count, side, side)).astype(np.uint8)


@pytest.mark.parametrize(("colour", "width"), [(True, 2136), (False, 1888)])
@pytest.mark.parametrize("side", [16, 32, 50, 64])
def test_every_size_of_picture_has_the_same_features(side, colour, width):
    features = picture_features(squares(2, side, colour))
    assert features.shape == (2, width)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


def test_features_tell_colours_edges_and_places_apart():
    plain = np.full((32, 32, 3), 128, dtype=np.uint8)
    red, edge, corner = plain.copy(), plain.copy(), plain.copy()
    red[..., 0], edge[:, 16:], corner[:16, :16] = 255, 0, 200
    features = picture_features(np.stack([plain, red, edge, edge.transpose(1, 0, 2), corner, corner[::-1]]))
    distances = np.abs(features[:, None] - features[None]).max(axis=2)
    assert (distances + np.eye(6) > 0.05).all()


def test_what_is_constant_in_training_says_nothing_and_outliers_are_cut():
    features = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 5.0], [100.0, 7.0, 5.0]])
    scaled = standardised(features, feature_scale(features, np.array([0, 1])))
    assert scaled.tolist() == [[-1, 0, 0], [1, 0, 0], [5, 0, 0]]
    assert scaled.dtype == torch.float32


def test_a_data_module_hands_out_features_of_its_pictures():
    samples = make_samples()
    plain = TabularImageData(samples, workers=0, image_size=32)
    data = TabularImageData(samples, workers=0, image_size=32, features=True, augment=True)
    assert all(np.array_equal(plain.splits[name], data.splits[name]) for name in plain.splits)
    batch, again = next(iter(data.train_dataloader())), next(iter(data.train_dataloader()))
    assert batch["image"].shape == (len(batch["target"]), data.channels, 1, 1)
    assert torch.equal(batch["image"], again["image"])  # nothing to augment
    train = data._features[data.splits["train"]][..., 0, 0]
    torch.testing.assert_close(train.mean(dim=0), torch.zeros(data.channels), atol=0.1, rtol=0)
    assert image_encoder("features", data.channels)(batch["image"]).shape == (len(batch["target"]), 256)


def test_features_are_computed_once():
    samples = with_features(make_samples(), 32, skip=False)
    assert with_features(samples, 64, skip=False) is samples
    assert np.array_equal(samples.take(np.array([3, 1])).features, samples.features[[3, 1]])


def test_a_picture_that_cannot_be_read_is_told_or_left_out(tmp_path):
    base = make_samples()
    paths = []
    for row in range(len(base)):
        paths.append((tmp_path / f"{row}.png",))
        Image.fromarray(squares(1, 16)[0]).save(paths[-1][0])
    paths[5][0].write_bytes(b"no picture")
    samples = replace(base, images=paths, grey=False)
    with pytest.raises(InputError, match="not an image"):
        with_features(samples, 16, skip=False)
    kept = with_features(samples, 16, skip=True)
    assert len(kept) == len(kept.features) == len(base) - 1
    assert 5 not in [int(path.stem) for (path,) in kept.images]
