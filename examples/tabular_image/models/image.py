"""Image encoders, by name."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models

from ..encoders import IMAGE_ENCODERS, TIMM, check_image_encoder, own_encoder
from ..errors import InputError, border, reason
from .trial import checked_width, trial

_OTHER = "choose another --image_encoder"


class ImageEncoder(nn.Module):
    """A network that makes feature maps, and the mean over their positions as the features.

    Attributes:
        maps: (B, channels, S, S) to (B, width, H, W).
        width: Features.
    """

    def __init__(self, maps: nn.Module, width: int) -> None:
        super().__init__()
        self.maps = maps
        self.width = width

    def forward(self, image: Tensor) -> Tensor:
        """Features (B, width)."""
        features: Tensor = self.maps(image).mean((2, 3))
        return features


class WholeEncoder(nn.Module):
    """A network that makes features by itself, such as a model of timm or the user's own.

    Args:
        network: (B, channels, S, S) to (B, width).
        width: Number of features.
        spatial: The network's `forward_features` makes maps (B, width, H, W). Else the features are maps of one
            position.
    """

    def __init__(self, network: nn.Module, width: int, spatial: bool = False) -> None:
        super().__init__()
        self.network = network
        self.width = width
        self.spatial = spatial

    def forward(self, image: Tensor) -> Tensor:
        """Features (B, width)."""
        features: Tensor = self.network(image)
        return features

    def maps(self, image: Tensor) -> Tensor:
        """Feature maps (B, width, H, W)."""
        maps: Tensor = self.network.forward_features(image) if self.spatial else self(image)[:, :, None, None]
        return maps


class SmallCNN(nn.Module):
    """Four blocks of convolution, batch normalisation and ReLU, pooling between them.

    (B, channels, S, S) to (B, 256, H, W), for S from 8 to 128. The first convolution has stride 2, and the channels are
    last in memory: at 64 pixels, forward and backward then take less than a millisecond an image on one CPU core.
    """

    width = 256

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _block(channels, 24, stride=2),
            nn.MaxPool2d(2, ceil_mode=True),  # ceil: an 8 x 8 image has shrunk to 1 x 1 before the last block
            _block(24, 48),
            nn.MaxPool2d(2, ceil_mode=True),
            _block(48, 96),
            nn.MaxPool2d(2, ceil_mode=True),
            _block(96, self.width),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        """Feature maps (B, 256, H, W)."""
        maps: Tensor = self.blocks(image.contiguous(memory_format=torch.channels_last))
        return maps


class FeatureMLP(nn.Module):
    """One hidden layer on fixed features of a picture, (B, features, 1, 1) to (B, 256, 1, 1): maps of one position.

    Dropout is strong, as small data sets have more features than pictures.
    """

    width = 256

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, self.width),
            nn.BatchNorm1d(self.width),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(self.width, self.width),
            nn.Unflatten(1, (self.width, 1, 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, 256, 1, 1)."""
        maps: Tensor = self.layers(features)
        return maps


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def image_encoder(name: str, channels: int, pretrained: bool = False, *, size: int = 64) -> ImageEncoder | WholeEncoder:
    """An encoder from (B, channels, S, S) to (B, width), with feature maps (B, width, H, W) as `maps`.

    Args:
        name: "small", "features", "resnet18" or "resnet50"; "timm:NAME" for a model of timm; or the user's own
            "package.module:factory", whose factory is called with `channels=` and returns a module.
        channels: 1 or 3; for "features" the number of features.
        pretrained: Start from the weights of torchvision or timm, which are downloaded once.
        size: S. Some models of timm are built for S. Other models of timm and the user's own are tried on S.

    Raises:
        InputError: The name is unknown, the encoder has no pretrained weights, the download fails, or the encoder does
            not make features (B, width).

    Example:
        >>> image_encoder("timm:convnext_atto", channels=3, size=64).width
        320
    """
    check_image_encoder(name)
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM), channels, pretrained, size)
    if pretrained and not name.startswith("resnet"):
        what = f"the image encoder {name!r} has no ImageNet weights"
        if name not in IMAGE_ENCODERS:
            raise InputError(f"{what} in the pipeline; leave --pretrained out and load weights in the factory")
        raise InputError(f"{what}; choose resnet18, resnet50 or a model of timm")
    if name not in IMAGE_ENCODERS:
        return _own(name, channels, size)
    if name in ("small", "features"):
        network = SmallCNN if name == "small" else FeatureMLP
        return ImageEncoder(network(channels), network.width)
    return _resnet(name, channels, pretrained)


def _resnet(name: str, channels: int, pretrained: bool) -> ImageEncoder:
    try:
        resnet = models.get_model(name, weights="IMAGENET1K_V1" if pretrained else None)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the checksum of a broken download
        raise InputError(
            f"the ImageNet weights of {name} could not be downloaded ({error}); connect to the internet once, put the "
            f"file into {torch.hub.get_dir()}/checkpoints, or leave --pretrained out to start from random weights"
        ) from error
    if channels != 3:
        first = resnet.conv1
        resnet.conv1 = nn.Conv2d(
            channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
        )
        if pretrained:  # as if the grey image stood in all three channels
            resnet.conv1.weight.data.copy_(first.weight.data.sum(1, keepdim=True))
    width = resnet.fc.in_features
    del resnet.avgpool, resnet.fc
    return ImageEncoder(nn.Sequential(OrderedDict(resnet.named_children())), width)


def _of_timm(model: str, channels: int, pretrained: bool, size: int) -> WholeEncoder:
    import timm  # takes seconds
    from huggingface_hub.constants import HF_HUB_CACHE

    if pretrained and not timm.is_model_pretrained(model):
        raise InputError(f"timm has no pretrained weights of {model}; leave --pretrained out, or choose another model")
    settings = {"pretrained": pretrained, "num_classes": 0, "in_chans": channels}
    usual = timm.get_pretrained_cfg(model, allow_unregistered=True)
    advice = f"give --image_size {usual.input_size[-1]}, or another --image_encoder" if usual else _OTHER
    with border("use", f"{TIMM}{model} on pictures of side {size}", advice):
        try:
            network = _sized(model, size if usual and usual.fixed_input_size else None, settings)
        except OSError as error:
            raise InputError(
                f"the weights of {TIMM}{model} cannot be loaded ({reason(error)}); connect to the internet once, copy "
                f"the weights into {HF_HUB_CACHE} or {torch.hub.get_dir()}/checkpoints, or leave --pretrained out"
            ) from error
        features, maps = trial(torch.zeros(2, channels, size, size), network, network.forward_features)
    width = features.shape[1]
    return WholeEncoder(network, width, spatial=maps.ndim == 4 and maps.shape[1] == width)


def _sized(model: str, size: int | None, settings: dict[str, Any]) -> nn.Module:
    """A model of timm, built for pictures of a size if the model takes a size."""
    import timm

    if size is not None:
        with contextlib.suppress(TypeError):  # the model takes no size: the trial tells whether the pictures fit
            return timm.create_model(model, img_size=size, **settings)
    return timm.create_model(model, **settings)


def _own(name: str, channels: int, size: int) -> WholeEncoder:
    network = own_encoder("image", name, channels=channels)
    width = checked_width("image", name, network, torch.zeros(2, channels, size, size), getattr(network, "width", None))
    return WholeEncoder(network, width)
