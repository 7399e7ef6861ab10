"""Encoders: shapes, initial weights and refusals."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from tabular_image.errors import InputError
from tabular_image.models import TableMLP, image_encoder
from torch import nn
from torchvision import models


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 13, 28, 64, 128])
def test_small_encoder_takes_any_usual_size(channels: int, size: int):
    encoder = image_encoder("small", channels)
    features = encoder(torch.randn(2, channels, size, size))
    assert features.shape == (2, encoder.width) == (2, 256)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnets_end_in_features(name: str, width: int, channels: int):
    encoder = image_encoder(name, channels).eval()
    assert encoder.width == width
    with torch.no_grad():
        assert encoder(torch.randn(2, channels, 32, 32)).shape == (2, width)


def test_grey_pretrained_resnet_equals_the_grey_image_in_three_channels(monkeypatch: pytest.MonkeyPatch):
    build = models.get_model
    torch.manual_seed(0)
    weights = build("resnet18").state_dict()

    def with_weights(name: str, **_: object) -> nn.Module:
        resnet = build(name, weights=None)
        resnet.load_state_dict(weights)
        return resnet

    monkeypatch.setattr(models, "get_model", with_weights)
    grey, colour = (image_encoder("resnet18", channels, pretrained=True).eval() for channels in (1, 3))
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash value")])
def test_failed_download_is_the_users_to_solve(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*_: object, **__: object) -> nn.Module:
        raise error

    monkeypatch.setattr(models, "get_model", fail)
    with pytest.raises(InputError, match=r"weights of resnet18 could not be downloaded.*random weights"):
        image_encoder("resnet18", 3, pretrained=True)


def test_wrong_names_are_refused():
    with pytest.raises(InputError, match="no image encoder 'vgg'; choose one of small, features, resnet18, resnet50"):
        image_encoder("vgg", 3)
    with pytest.raises(InputError, match="no ImageNet weights"):
        image_encoder("small", 3, pretrained=True)


def test_table_encoder_starts_as_specified():
    torch.manual_seed(0)
    encoder = TableMLP(400, 256)
    first, norm, activation, last = encoder.layers
    assert [type(layer) for layer in (norm, activation)] == [nn.BatchNorm1d, nn.ReLU]
    for layer in (first, last):
        assert (layer.bias == 0).all()
        assert layer.weight.std().item() == pytest.approx((2 / layer.in_features) ** 0.5, rel=0.02)
    features = encoder(torch.randn(5, 400))
    assert features.shape == (5, encoder.width)
    assert (features < 0).any(), "no activation at the end"
