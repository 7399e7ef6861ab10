"""Image encoders, by name."""

from __future__ import annotations

from collections import OrderedDict
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models

from ..errors import InputError

IMAGE_ENCODERS = ("small", "features", "resnet18", "resnet50")


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
            nn.MaxPool2d(2, ceil_mode=True),  # ceil: an 8 x 8 image is down to 1 x 1 before the last block
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


def image_encoder(name: str, channels: int, pretrained: bool = False) -> ImageEncoder:
    """An encoder from (B, channels, S, S) to (B, width).

    Args:
        name: "small", "features", "resnet18" or "resnet50".
        channels: 1 or 3; for "features", how many there are.
        pretrained: Start from ImageNet weights (ResNets only; downloaded once by torchvision).

    Raises:
        InputError: An unknown name, no weights for the encoder, or a failed download.
    """
    if name not in IMAGE_ENCODERS:
        raise InputError(f"there is no image encoder {name!r}; choose one of {', '.join(IMAGE_ENCODERS)}")
    if name in ("small", "features"):
        if pretrained:
            raise InputError(f"the image encoder {name!r} has no ImageNet weights; choose resnet18 or resnet50")
        network = SmallCNN if name == "small" else FeatureMLP
        return ImageEncoder(network(channels), network.width)
    try:
        resnet = models.get_model(name, weights="IMAGENET1K_V1" if pretrained else None)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the checksum of a broken download
        raise InputError(
            f"the ImageNet weights of {name} could not be downloaded ({error}); connect to the internet once, put the "
            f"file into {torch.hub.get_dir()}/checkpoints, or start from random weights"
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
