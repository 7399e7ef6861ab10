"""A zoo of heads: whatever PyTorch trains is a head. Each kind is built anew, with a batch that it takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SAMPLES, WIDTH, CLASSES = 8, 5, 3


@dataclass(frozen=True)
class Kind:
    """How a kind of head is built, and how it is called in training.

    Attributes:
        build: makes the module.
        shape: of one sample's features.
        make: makes features of a shape.
        around: what the user's loop is inside.
        tolerance: relative, of gradients.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (WIDTH,)
    make: Callable[..., torch.Tensor] = torch.randn
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    tolerance: float = 1e-5

    def batch(self, seed: int = 0, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and target."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make((samples, *self.shape)), torch.randint(CLASSES, (samples,))


def linear(width: int = WIDTH, classes: int = CLASSES, **settings: Any) -> nn.Linear:
    return nn.Linear(width, classes, **settings)


class Function(nn.Module):
    """A module whose forward pass is a function of itself and the features."""

    def __init__(self, forward: Callable[..., torch.Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.function(self, features)


def shared_activation() -> nn.Module:
    activation = nn.PReLU()
    return nn.Sequential(linear(5, 5), activation, linear(5, 5), activation, linear())


def layer_used_twice() -> nn.Module:
    layer = linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, linear())


def tied_weights() -> nn.Module:
    head = nn.Sequential(linear(5, 5), nn.Tanh(), linear(5, 5), nn.Tanh(), linear())
    head[2].weight = head[0].weight
    return head


def transposed_weight() -> nn.Module:
    return Function(
        lambda self, x: self.out(F.linear(self.first(x), self.first.weight.T)), first=linear(5, 4), out=linear()
    )


class Reverse(torch.autograd.Function):
    """Of the old form, which ``torch.func`` refuses: context and result in one method."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(features)
        return features**2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (features,) = ctx.saved_tensors
        return 2 * features * gradient


class StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return torch.round(weight * 8) / 8

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.cell = cell(WIDTH, 4, batch_first=True, **settings)
        self.out = linear(8 if settings.get("bidirectional") else 4)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(features)[0][:, -1])


class Remembers(nn.Module):
    """Keeps what it has seen: a tensor, a list, a count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.attention = None
        self.history: list[torch.Tensor] = []
        self.calls = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        attention = features.softmax(dim=1)
        self.attention = attention.detach() if self.training else attention
        self.newest = self.layer(features * attention)
        self.newest = self.newest.detach() if self.training else self.newest
        self.history.append(self.newest)
        self.calls += 1
        return self.layer(features * attention)


class Counts(nn.Module):
    """Buffers that change in eval mode too, in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(dim=0)
        return self.layer(features)


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * F.normalize(features) @ F.normalize(self.weight).T


class Quantised(nn.Module):
    """A frozen integer weight as the first parameter, a float adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-9, 9, (CLASSES, WIDTH), dtype=torch.int8), requires_grad=False)
        self.adapter = linear(bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight.to(features.dtype) / 9) + self.adapter(features)


def frozen_bfloat16() -> nn.Module:
    return nn.Sequential(linear(5, 5).bfloat16().requires_grad_(False), linear())


def float64_inside() -> nn.Module:
    return Function(lambda self, x: self.layer(x.double()), layer=linear().double())


def routed(self: Any, features: torch.Tensor) -> torch.Tensor:
    """Rows go to one of two experts by a mask."""
    logits = features.new_zeros(len(features), CLASSES)
    first = features[:, 0] > 0
    logits[first] = self.one(features[first])
    logits[~first] = self.other(features[~first])
    return logits


def hooked() -> nn.Module:
    head = nn.Sequential(linear(5, 5), nn.Tanh(), linear())
    head[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    head[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    head[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return head


def hooked_linear() -> nn.Module:
    head = linear()
    head.register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],))
    return head


def frozen_first() -> nn.Module:
    head = nn.Sequential(linear(5, 5), nn.ReLU(), linear())
    head[0].requires_grad_(False)
    return head


def in_pieces() -> nn.Module:
    """A container that a module list and a dictionary hold together."""
    return Function(
        lambda self, x: sum(layer(x) for layer in self.layers) + x @ self.more["extra"],
        layers=nn.ModuleList([linear(), linear()]),
        more=nn.ParameterDict({"extra": nn.Parameter(torch.randn(WIDTH, CLASSES))}),
    )


def lora() -> nn.Module:
    return Function(
        lambda self, x: self.base(x) + self.up(self.down(x)),
        base=linear().requires_grad_(False),
        down=linear(5, 2, bias=False),
        up=linear(2, bias=False),
    )


def unused_parameter() -> nn.Module:
    return Function(lambda self, x: self.layer(x), layer=linear(), idle=linear())


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still about
        return torch.jit.script(nn.Sequential(linear(5, 5), nn.Tanh(), linear()))


def inside_checkpoint(reentrant: bool) -> nn.Module:
    return Function(
        lambda self, x: self.out(checkpoint(self.first, x, use_reentrant=reentrant)),
        first=nn.Sequential(linear(5, 5), nn.Tanh()),
        out=linear(),
    )


def attention_over_tokens() -> nn.Module:
    return nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True),
        Function(lambda self, x: self.out(x.mean(dim=1)), out=linear(4)),
    )


def random_ints(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(7, shape)


KINDS = {
    "linear": Kind(linear),
    "linear without bias": Kind(partial(linear, bias=False)),
    "linear on sequences": Kind(lambda: Function(lambda self, x: self.layer(x).mean(1), layer=linear()), (4, WIDTH)),
    "mlp": Kind(lambda: nn.Sequential(linear(5, 6), nn.ReLU(), linear(6, 4, bias=False), nn.GELU(), linear(4))),
    "mlp in place": Kind(lambda: nn.Sequential(linear(5, 6), nn.ReLU(inplace=True), linear(6))),
    "in-place first operation": Kind(lambda: nn.Sequential(nn.LeakyReLU(inplace=True), linear())),
    "residual mlp": Kind(
        lambda: Function(lambda self, x: self.out(x + self.a(x).tanh()), a=linear(5, 5), out=linear())
    ),
    "gated mlp": Kind(
        lambda: Function(lambda self, x: self.out(x * self.a(x).sigmoid()), a=linear(5, 5), out=linear())
    ),
    "frozen first layer": Kind(frozen_first),
    "activation used twice": Kind(shared_activation),
    "layer used twice": Kind(layer_used_twice),
    "tied weights": Kind(tied_weights),
    "transposed weight": Kind(transposed_weight),
    "container": Kind(in_pieces),
    "adapter": Kind(lora),
    "unused parameter": Kind(unused_parameter),
    "0-dim parameter": Kind(Cosine),
    "batch norm": Kind(lambda: nn.Sequential(nn.BatchNorm1d(5), linear())),
    "batch statistics": Kind(lambda: nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), linear())),
    "centred on the batch": Kind(lambda: Function(lambda self, x: self.layer(x - x.mean(0)), layer=linear())),
    "layer norm": Kind(lambda: nn.Sequential(nn.LayerNorm(5), linear(5, 4), nn.SiLU(), linear(4))),
    "convolution": Kind(lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), linear(12)), (2, 6)),
    "embedding": Kind(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), linear(12)), (3,), random_ints),
    "embedding bag": Kind(lambda: nn.Sequential(nn.EmbeddingBag(7, 4), linear(4)), (3,), random_ints),
    "dropout": Kind(lambda: nn.Sequential(nn.Dropout(0.5), linear(5, 4), nn.Dropout1d(0.5), linear(4))),
    "lstm": Kind(lambda: Recurrent(nn.LSTM), (6, WIDTH)),
    "gru": Kind(lambda: Recurrent(nn.GRU, bidirectional=True), (6, WIDTH)),
    "rnn with dropout": Kind(lambda: Recurrent(nn.RNN, num_layers=2, dropout=0.5), (6, WIDTH)),
    "transformer": Kind(attention_over_tokens, (3, 4)),
    "weight norm": Kind(lambda: nn.utils.parametrizations.weight_norm(linear())),
    "spectral norm": Kind(lambda: nn.utils.parametrizations.spectral_norm(linear())),
    "hooks": Kind(hooked),
    "backward pre-hook": Kind(hooked_linear),
    "old-form function": Kind(
        lambda: nn.Sequential(linear(5, 4), Function(lambda self, x: Reverse.apply(x)), linear(4))
    ),
    "quantisation-aware": Kind(
        lambda: Function(lambda self, x: F.linear(x, StraightThrough.apply(self.layer.weight)), layer=linear())
    ),
    "routing by a mask": Kind(lambda: Function(routed, one=linear(), other=linear())),
    "keeps tensors": Kind(Remembers),
    "counts in eval mode": Kind(Counts),
    "frozen int8": Kind(Quantised, make=torch.rand),
    "float64 inside": Kind(float64_inside),
    "float64": Kind(lambda: linear().double()),
    "frozen bfloat16 under autocast": Kind(
        frozen_bfloat16, around=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=2e-2
    ),
    "saved on the host": Kind(
        lambda: nn.Sequential(linear(5, 4), nn.Tanh(), linear(4)), around=torch.autograd.graph.save_on_cpu
    ),
    "checkpoint inside": Kind(partial(inside_checkpoint, False)),
    "reentrant checkpoint inside": Kind(partial(inside_checkpoint, True)),
    "averaged model": Kind(lambda: torch.optim.swa_utils.AveragedModel(nn.Sequential(linear(5, 4), linear(4)))),
    "data parallel": Kind(lambda: nn.DataParallel(linear())),
    "scripted": Kind(scripted),
}
