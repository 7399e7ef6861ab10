"""The library waits for no device: whole rounds on the meta device, where every read of a value raises.

What a GPU would have to send to the host (``item``, a condition on a tensor, ``nonzero``, indexing by a mask) has no
value there. The CPU's branches are not taken, and no kernel runs, so that shapes and dtypes are all that is compared.
"""

import pytest
import reference
import torch
import torch.nn.functional as F
from heads import KINDS
from strategies import RULES
from torch import nn
from wrapped import ALIGN

from gaal_surgery import (
    GradientAlignedAlternator,
    HalfSpace,
    align,
    binary_entropy,
    combine,
    entropy,
    fuse_gaussians,
    fuse_logits,
    gaussian_entropy,
    gramian,
    guide_gradient,
    per_sample_gradients,
    per_sample_norms,
)

EVERY_RULE = {**RULES, "first_only": lambda gramian: gramian[0] / gramian[0, 0]}


def label_loss(logits, target):
    labels = target[:, None].expand_as(logits).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels)


def gaussian_loss(outputs, target):
    mean, log_variance = outputs[:, :2].unbind(dim=1)
    return (log_variance + (target - mean).square() * log_variance.neg().exp()).mean() / 2


OPTIONS = {
    "plain": {},
    "clipped": {"max_norm": 0.5},
    "by_modality": {"fraction": {"a": 0.5, "b": 0.2, "c": 1.0}},
    "margin_score": {"uncertainty": lambda logits: -logits.topk(2, dim=1).values.diff(dim=1)[:, 0].abs()},
    "hurt_measured": {"measure_hurt": True},
    "smoothed": {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "labels": {"loss_fn": label_loss, "uncertainty": binary_entropy},
    "number": {"loss_fn": gaussian_loss, "uncertainty": lambda outputs: gaussian_entropy(outputs[:, :2])},
}
HEADS = {
    "linear": lambda: nn.Linear(reference.HIDDEN, 3),
    "mlp": lambda: nn.Sequential(nn.Linear(reference.HIDDEN, 6), nn.ReLU(), nn.Linear(6, 3)),
    "bfloat16": lambda: nn.Linear(reference.HIDDEN, 3, dtype=torch.bfloat16),
    "norm_and_dropout": lambda: nn.Sequential(nn.BatchNorm1d(reference.HIDDEN), nn.Dropout(), nn.Linear(4, 3)),
    "used_twice": lambda: nn.Sequential(*[nn.Linear(reference.HIDDEN, reference.HIDDEN)] * 2, nn.Linear(4, 3)),
}
HARD_KINDS = ["quantisation-aware", "gru", "transformer", "checkpoint inside", "batch statistics", "old-form function"]
MODALITIES = ("a", "b", "c")


def test_a_read_raises_here():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones((), device="meta") > 0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta").tolist()


def take_round(head, *, inner=torch.optim.SGD, guides="others", recipe="fresh", **settings):
    """A round of three modalities; returns the statistics of its turns."""
    model = reference.make_model(*MODALITIES, head=head).to("meta")
    dtype = next(model.head.parameters()).dtype
    optimizer = GradientAlignedAlternator(inner(model.parameters(), lr=0.1), model.head, guides=guides, **settings)
    inputs = {name: torch.randn(8, reference.WIDTH, device="meta") for name in MODALITIES}
    target = torch.zeros(8, dtype=torch.long, device="meta")
    seen = []
    for _ in range(2):
        for turn in optimizer.turns(*MODALITIES):
            features = model.encoders[turn.modality](inputs[turn.modality])
            F.cross_entropy(model.head(features.to(dtype)), target).backward()
            if recipe == "fresh":
                for guide in turn.guides:
                    optimizer.guide(guide, model.encoders[guide](inputs[guide]), target)
            optimizer.step()
            if recipe == "cached":
                optimizer.guide(turn.modality, features, target)
            optimizer.zero_grad()
            seen.append(optimizer.stats)
    return seen


@ALIGN
@pytest.mark.parametrize("guides", ["previous", "others"])
@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE)
def test_with_every_rule(rule, guides, align):
    *_, stats = take_round(HEADS["linear"], rule=rule, guides=guides, align=align)
    assert stats.guides == (("b",) if guides == "previous" else ("a", "b"))
    assert stats.weights.is_meta


@ALIGN
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_every_option(options, head, align):
    *_, stats = take_round(head, align=align, **options)
    assert stats.gramian.shape == (3, 3)


@ALIGN
def test_with_cached_guides(align):
    first, *_, last = take_round(HEADS["mlp"], recipe="cached", align=align)
    assert first.guides == ()
    assert last.guides == ("a", "b")


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("name", HARD_KINDS)
def test_with_heads_that_vmap_cannot_follow(name, max_norm):
    kind = KINDS[name]
    head = kind.build().to("meta")
    features = torch.randn(8, *kind.shape, device="meta")
    target = torch.zeros(8, dtype=torch.long, device="meta")
    gradient = guide_gradient(head, features, target, F.cross_entropy, max_norm=max_norm)
    assert {key: x.shape for key, x in gradient.items()} == {key: x.shape for key, x in head.named_parameters()}


def test_the_functional_core():
    head = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)).to("meta")
    features, target = torch.randn(8, 5, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    each = per_sample_gradients(head, features, target, F.cross_entropy)
    assert each["1.weight"].shape == (8, 3, 5)
    assert per_sample_norms(head, features, target, F.cross_entropy).shape == (8,)
    assert entropy(features).shape == binary_entropy(features).shape == gaussian_entropy(features[:, :2]).shape == (8,)
    assert fuse_logits([features] * 2, log_odds=torch.zeros(5, device="meta")).shape == (8, 5)
    assert fuse_gaussians([features[:, :2]] * 2).shape == (8, 2)
    gradients = [torch.randn(4, 3, device="meta", dtype=torch.bfloat16) for _ in range(4)]
    assert gramian(gradients).dtype is torch.float64
    assert combine(gradients, torch.ones(4, device="meta")).dtype is torch.bfloat16
    assert align(gradients[0], gradients[1:], HalfSpace(0.1)).shape == (4, 3)
