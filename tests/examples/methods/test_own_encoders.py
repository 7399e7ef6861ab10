"""Encoders in methods: those of timm, an FT-Transformer, and one's own with every way in which it can be wrong."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tabular_image import train
from tabular_image.errors import InputError
from tabular_image.methods import METHODS
from tabular_image.models import image_encoder, table_encoder
from tabular_image.models.table import TableFTTransformer
from test_borders import told
from toy import build, equal_states, fit

MODULE = '''
"""Encoders."""
import torch
from torch import nn

NUMBER = 3


class Flat(nn.Sequential):
    """One layer on the brightness of the picture."""

    def __init__(self, channels, width=12):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, width), nn.Dropout(0.1))


def table(table_width, width):
    return nn.Sequential(nn.LazyLinear(width), nn.BatchNorm1d(width))


def says_less(channels):
    network = Flat(channels)
    network.width = 5
    return network


def maps(channels):
    return nn.Conv2d(channels, 8, 3)


def pair(channels):
    class Pair(nn.Module):
        def forward(self, image):
            return image, image

    return Pair()


def large_pictures_alone(channels):
    return nn.Sequential(nn.Conv2d(channels, 8, 50), nn.Flatten())


def narrow(table_width, width):
    return nn.Linear(table_width, width - 1)


def nothing(channels):
    return None


def careless(channels):
    return 1 / 0


def without_arguments():
    return Flat(1)
'''


@pytest.fixture
def name(tmp_path, monkeypatch):
    """The name of a module in the current folder."""
    (tmp_path / "my_encoders.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    yield "my_encoders"
    sys.modules.pop("my_encoders", None)


def test_an_image_encoder_of_ones_own(name):
    torch.manual_seed(0)
    encoder = image_encoder(f"{name}:Flat", 3, size=20)
    after = torch.rand(1)
    assert encoder.width == 12
    assert encoder.training, "the trial changes no mode"
    pictures = torch.randn(5, 3, 20, 20)
    features = encoder.eval()(pictures)
    assert features.shape == (5, 12)
    assert torch.equal(encoder.maps(pictures), features[:, :, None, None])
    torch.manual_seed(0)
    sys.modules[name].Flat(3)
    assert torch.equal(torch.rand(1), after), "the trial draws no random number"


@pytest.mark.parametrize("method", ["gaal", "mmcl", "daft", "tip", "charms"])
def test_methods_train_encoders_of_ones_own(method, name):
    table = {"table_encoder": f"{name}:table"} if method in ("gaal", "mmcl") else {}
    method = build(method, image_encoder=f"{name}:Flat", **table)
    before = {key: value.clone() for key, value in method.encoders.state_dict().items()}
    fit(method, epochs=1)
    moved = [key for key, value in method.encoders.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("image.network.2") for key in moved)
    assert not table or any(key.startswith("table.0") for key in moved)


@pytest.mark.slow
def test_a_run_with_encoders_of_ones_own_resumes(name, arguments, tmp_path):
    words = {"image_encoder": f"{name}:Flat", "table_encoder": f"{name}:table", "pictures": "false"}
    assert train.main(arguments(tmp_path / "run", **words)) == 0
    assert f"table_encoder: {name}:table" in (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "results.json").unlink()
    assert train.main(["--out", str(tmp_path / "run"), "--resume", "true"]) == 0
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize(
    ("option", "encoder", "words"),
    [
        ("image_encoder", "my_encoder:Flat", ["No module named 'my_encoder'", "lies in the current folder"]),
        ("image_encoder", "my_encoders:Flatt", ["has no 'Flatt'", "did you mean 'Flat'?"]),
        ("image_encoder", "my_encoders:", ["has no ''", "define '' in"]),
        ("image_encoder", "my_encoders:NUMBER", ["is int", "function or class"]),
        ("image_encoder", "my_encoders:without_arguments", ["called with channels=", "accept this call"]),
        ("table_encoder", "my_encoders:maps", ["called with table_width=, width=", "accept this call"]),
        ("table_encoder", "broken:table", ["broken:table", "invalid syntax"]),
        ("table_encoder", "ft_transfomer", ["did you mean 'ft_transformer'?", "mlp"]),
        ("image_encoder", "resnet81", ["did you mean 'resnet18'?", "timm:NAME"]),
    ],
)
def test_a_wrong_name_is_told_before_the_data_are_read(option, encoder, words, name, arguments, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def table(:")
    assert train.main(arguments(tmp_path / "run", path="there is no such table", **{option: encoder})) == 2
    error = told(capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("says_less", [r"makes \(2, 12\) of an input \(2, 3, 32, 32\)", r"\(2, 5\)"]),
        ("maps", [r"makes \(2, 8, 30, 30\)", r"\(2, width\)"]),
        ("pair", ["makes tuple of"]),
        ("nothing", ["returns NoneType", "an nn.Module"]),
        ("careless", ["cannot build", "ZeroDivisionError", "line 51 of .*my_encoders.py"]),
        ("large_pictures_alone", ["cannot use", "RuntimeError"]),
    ],
)
def test_an_image_encoder_that_makes_no_features_is_refused(factory, words, name):
    with pytest.raises(InputError, match=".*".join(words)):
        image_encoder(f"{name}:{factory}", 3, size=32)


def test_a_table_encoder_of_another_width_is_refused(name):
    with pytest.raises(InputError, match=r"table encoder my_encoders:narrow makes \(2, 11\) .*\(2, 4\).*\(2, 12\)"):
        table_encoder(f"{name}:narrow", [], table_width=4, width=12)


def test_weights_of_ones_own_encoder_are_the_factorys(name):
    with pytest.raises(InputError, match="leave --pretrained out and load weights in the factory"):
        image_encoder(f"{name}:Flat", 3, pretrained=True)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "table" not in method.modalities])
def test_a_method_without_a_table_encoder_refuses_one(method, arguments, tmp_path, capsys):
    words = arguments(tmp_path / "run", method=method, table_encoder="ft_transformer", path="there is no such table")
    assert train.main(words) == 2
    assert f"--method {method} has no use for --table_encoder ft_transformer" in told(capsys)


@pytest.mark.parametrize("method", ["daft", "tip", "charms"])
def test_methods_on_feature_maps_train_a_model_of_timm(method):
    method = build(method, image_encoder="timm:test_resnet")
    before = method.encoders["image"].network.conv1[0].weight.clone()
    fit(method, epochs=1)
    assert not torch.equal(method.encoders["image"].network.conv1[0].weight, before)


def test_the_table_encoder_of_methods_is_the_chosen_one_and_starts_alike():
    options = {"image_encoder": "timm:test_resnet", "table_encoder": "ft_transformer"}
    methods = [build(name, **options) for name in ("gaal", "concatenation", "kd", "table")]
    first = methods[0].encoders["table"]
    assert isinstance(first, TableFTTransformer)
    for method in methods[1:]:
        assert equal_states(method.encoders["table"].state_dict(), first.state_dict())
    before = copy.deepcopy(first.state_dict())
    fit(methods[0])
    assert not equal_states(first.state_dict(), before)
