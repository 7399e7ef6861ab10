"""Encoders that others wrote, tried once before they train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..encoders import running
from ..errors import InputError


@torch.no_grad()
def trial(example: Tensor, network: nn.Module, *functions: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The results of a network, and of functions of the network, for an example in eval mode.

    The trial leaves the network's mode and the random numbers as they were.
    """
    training = network.training
    network.eval()
    with torch.random.fork_rng(devices=[]):
        made = [function(example) for function in (network, *functions)]
    network.train(training)
    return made


def checked_width(kind: str, name: str, network: nn.Module, example: Tensor, width: int | None) -> int:
    """The number of features that the user's own encoder makes, counted in a trial.

    Args:
        kind: "image" or "table".
        name: "package.module:factory".
        network: What the factory made.
        example: (2, ...).
        width: The number of features that is needed; None allows any number.

    Raises:
        InputError: The network fails, or does not make (2, width).
    """
    with running(kind, name, "use"):
        (features,) = trial(example, network)
    shape = tuple(features.shape) if isinstance(features, Tensor) else ()
    if len(shape) != 2 or shape[0] != 2 or width not in (None, shape[1]):
        raise InputError(
            f"the {kind} encoder {name} makes {shape or type(features).__name__} of an input {tuple(example.shape)}; "
            f"let the encoder return a tensor (2, {width or 'width'})"
        )
    return shape[1]
