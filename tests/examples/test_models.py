"""Encoders: shapes, initial weights and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from tabular_image import train
from tabular_image.data.tables import TableColumn
from tabular_image.errors import InputError
from tabular_image.models import TableMLP, image_encoder, table_encoder
from tabular_image.models.table import categories
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


# Of timm.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "width", "positions"),
    [
        ("test_resnet", 96, (2, 2)),
        ("test_convnext", 64, (2, 2)),
        ("test_mambaout", 256, (1, 1)),  # its maps have other features than its output
        ("test_vit", 64, (1, 1)),  # tokens
        ("test_vit3", 96, (1, 1)),  # takes no picture but those of the size that it is built for
    ],
)
def test_a_model_of_timm_ends_in_features_and_has_maps(
    name: str, width: int, positions: tuple[int, int], channels: int
):
    encoder = image_encoder(f"timm:{name}", channels, size=64)
    assert encoder.width == width
    assert encoder.training
    pictures = torch.randn(2, channels, 64, 64)
    assert encoder(pictures).shape == (2, width)
    assert encoder.maps(pictures).shape == (2, width, *positions)


@pytest.mark.slow
def test_gaal_trains_a_model_of_timm_on_digits(tmp_path: Path):
    words = ["--image_encoder", "timm:test_resnet", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert train.main([*words, "--threads", "1", "--accelerator", "cpu", "--pictures", "false"]) == 0
    figures = json.loads((tmp_path / "run" / "results.json").read_text())
    assert figures["test"]["image"]["accuracy"] > 0.2


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the only place of pretrained weights."""
    from huggingface_hub import constants  # comes with timm

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_pretrained_weights_of_timm_lie_in_a_folder_or_are_told_to_be_missing(hub: Path):
    with pytest.raises(
        InputError, match=f"weights of timm:test_resnet cannot be loaded .*{hub}.* leave --pretrained out"
    ):
        image_encoder("timm:test_resnet", 3, pretrained=True)
    stored = image_encoder("timm:test_resnet", 3).network
    stored.fc = nn.Linear(96, 1000)  # as published
    model = hub / "models--timm--test_resnet.r160_in1k"
    (model / "snapshots" / "0").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0")
    save_file(stored.state_dict(), model / "snapshots" / "0" / "model.safetensors")
    grey = image_encoder("timm:test_resnet", 1, pretrained=True).network
    assert torch.equal(grey.conv1[0].weight, stored.conv1[0].weight.sum(1, keepdim=True))
    assert torch.equal(grey.layer4[0].conv1.weight, stored.layer4[0].conv1.weight)


def test_models_of_timm_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="timm has no model 'resnett18'; did you mean 'resnet18'"):
        image_encoder("timm:resnett18", 3)
    with pytest.raises(InputError, match=r"timm has no model 'qqq'; timm.list_models\(\)"):
        image_encoder("timm:qqq", 3)
    with pytest.raises(InputError, match="no pretrained weights of mixer_s32_224"):
        image_encoder("timm:mixer_s32_224", 3, pretrained=True)
    with pytest.raises(InputError, match="Invalid pretrained tag"):
        image_encoder("timm:test_resnet.other", 3)
    for name, usual in (("xcit_nano_12_p16_224", 224), ("test_vit3", 160)):  # refused when built, and when tried
        with pytest.raises(InputError, match=rf"cannot use timm:{name} on pictures of side 8 .*--image_size {usual}"):
            image_encoder(f"timm:{name}", 3, size=8)
    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    with pytest.raises(InputError, match="needs the package timm; pip install timm"):
        image_encoder("timm:resnet18", 3)


# Of tables.


def test_ft_transformer_reads_numbers_and_categories():
    columns = [
        TableColumn("size", 0, 1, False),
        TableColumn("age", 1, 2, False),
        TableColumn("colour", 2, 5, True),
        TableColumn("smoker", 5, 7, True),
    ]
    rows = torch.tensor([[0.5, -1, 0, 0, 1, 1, 0], [0.5, -1, 0, 0, 1, 0, 0], [0.5, -1, 1, 0, 0, 1, 0]])
    assert categories(rows, columns[2:]).tolist() == [[3, 1], [3, 0], [1, 1]]
    torch.manual_seed(0)
    encoder = table_encoder("ft_transformer", columns, table_width=7, width=24).eval()
    features = encoder(rows)
    assert features.shape == (3, 24)
    assert len(features.unique(dim=0)) == 3, "an unknown category is none of the known ones"
    for column in (0, 1):
        changed = rows.clone()
        changed[:, column] += 1
        assert not torch.allclose(encoder(changed), features)
    features.sum().backward()
    unknown = encoder.network.cat_embeddings.embeddings[1].weight.grad[0]
    assert unknown.abs().sum() > 0


@pytest.mark.parametrize("kind", [False, True])
def test_ft_transformer_takes_a_table_of_one_kind(kind: bool):
    encoder = table_encoder("ft_transformer", [TableColumn("only", 0, 1, kind)], table_width=1, width=8)
    assert encoder(torch.ones(4, 1)).shape == (4, 8)
