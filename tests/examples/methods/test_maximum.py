"""The element-wise maximum of the modalities' features."""

from __future__ import annotations

import torch
from toy import CLASSES, batches, build


def features():
    """Two sets of features (4, width) that differ everywhere."""
    torch.manual_seed(1)
    return torch.randn(4, 256), torch.randn(4, 256)


def test_modalities_change_places_freely_without_a_projection():
    method = build("maximum", settings={"projection": "identity"})
    first, second = features()
    assert torch.equal(method.fuse(first, second), method.fuse(second, first))
    projecting = build("maximum")
    assert not torch.allclose(projecting.fuse(first, second), projecting.fuse(second, first))


def test_the_maximum_of_equal_features_is_the_features():
    method = build("maximum", settings={"projection": "identity"})
    same, _ = features()
    assert torch.equal(method.fuse(same, same), method.head(same))


def test_each_coordinate_sends_its_gradient_to_the_winner_alone():
    method = build("maximum", settings={"projection": "identity"})
    image, table = (tensor.requires_grad_() for tensor in features())
    method.fuse(image, table).square().sum().backward()
    assert torch.equal(image.grad != 0, image > table)
    assert torch.equal(table.grad != 0, table > image)


def test_both_modalities_reach_the_only_prediction():
    method = build("maximum").eval()
    batch = batches()[0]
    logits = method(batch)
    assert list(method.predictions(logits)) == ["fused"]
    assert logits["fused"].shape == (16, CLASSES)
    for modality in ("image", "table"):
        assert not torch.equal(method(batch | {modality: batch[modality].flip(0)})["fused"], logits["fused"])
