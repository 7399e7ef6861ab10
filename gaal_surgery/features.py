"""Features of one batch for fresh guidance: one pass through an encoder serves the modality's guide and its turn."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gaal_surgery.rounds import Round


class FreshFeatures:
    """The features of one batch by modality, computed on first use and kept up to date.

    An encoder changes only in the turn of its modality. Until that turn is over, one pass with its graph serves the
    turn itself and the guides of other turns. Afterwards ``features[modality]`` runs the encoder again, without a
    graph. Only the encoder of the last turn runs once in a round: give the costly encoder the last turn.

    A repeated pass leaves the encoder's buffers unchanged, so that batch normalisation counts a batch once. Dropout
    draws one mask for a pass. Both uses of the pass see this mask.

    Args:
        optimizer: the :class:`GradientAlignedAlternator` whose turns are taken, or a trainer's wrapper around it.
        encoders: by modality, the function that gives features; an ``nn.ModuleDict``, or a mapping of callables. The
            buffers of an encoder are kept only if the encoder is an ``nn.Module``.
        inputs: by modality, what the encoder is called on.

    Raises:
        KeyError: a modality has no encoder or no input.

    Example:
        >>> encoders = torch.nn.ModuleDict(
        ...     {"table": torch.nn.Linear(4, 8), "image": torch.nn.Linear(16, 8)}
        ... )
        >>> head = torch.nn.Linear(8, 3)
        >>> adam = torch.optim.Adam([*encoders.parameters(), *head.parameters()])
        >>> optimizer = GradientAlignedAlternator(adam, shared=head)
        >>> inputs = {"table": torch.randn(32, 4), "image": torch.randn(32, 16)}
        >>> target = torch.randint(3, (32,))
        >>> features = FreshFeatures(optimizer, encoders, inputs)
        >>> for turn in optimizer.turns("table", "image"):
        ...     F.cross_entropy(head(features[turn.modality]), target).backward()
        ...     for guide in turn.guides:
        ...         optimizer.guide(guide, features[guide], target)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(self, optimizer: Optimizer, encoders: Any, inputs: Mapping[str, Any]) -> None:
        self._optimizer, self._encoders, self._inputs = optimizer, encoders, inputs
        self._passes: dict[str, tuple[int, Tensor]] = {}

    def __getitem__(self, modality: str) -> Tensor:
        """The features of a modality, with a graph until the modality's turn is over."""
        current: Round = self._optimizer._round  # type: ignore[attr-defined]
        encoder, earlier = self._encoders[modality], self._passes.get(modality)
        if earlier is None:
            self._passes[modality] = current.now, encoder(self._inputs[modality])
        elif current.has_stepped(modality, earlier[0]):
            with torch.no_grad(), _buffers_set_aside(encoder):
                self._passes[modality] = current.now, encoder(self._inputs[modality])
        return self._passes[modality][1]


@contextmanager
def _buffers_set_aside(encoder: Callable[..., Tensor]) -> Iterator[None]:
    """Let copies stand in for the encoder's buffers for the length of the block."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    slots = [(m._buffers, name, x) for m in modules for name, x in m._buffers.items() if x is not None]
    try:
        for table, name, buffer in slots:
            table[name] = buffer.clone()
        yield
    finally:
        for table, name, buffer in slots:
            table[name] = buffer
