"""Tasks beyond one class: independent labels, one logit, and a number with its variance guide and train."""

import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from wrapped import ALIGN, DEMANDING

from gaal_surgery import FreshFeatures, GradientAlignedAlternator, binary_entropy, gaussian_entropy


def gaussian_loss(outputs, target):
    mean, log_variance = outputs.unbind(dim=1)
    return (log_variance + (target - mean).square() * log_variance.neg().exp()).mean() / 2


def entropy_of_labels(logits):
    likelihoods = [1 / (1 + math.exp(-logit)) for logit in logits]
    return -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in likelihoods)


def variance(outputs):
    return math.exp(outputs[1])


# The loss, the score, the score by hand (in any unit), the columns of the head, and a target from numbers (B, columns).
TASKS = {
    "labels": (F.binary_cross_entropy_with_logits, binary_entropy, entropy_of_labels, 5, lambda x: (x > 0).to(x)),
    "one_logit": (F.binary_cross_entropy_with_logits, binary_entropy, entropy_of_labels, 1, lambda x: (x > 0).to(x)),
    "soft_labels": (F.binary_cross_entropy_with_logits, binary_entropy, entropy_of_labels, 3, torch.sigmoid),
    "number": (gaussian_loss, gaussian_entropy, variance, 2, lambda x: x[:, 0]),
}
EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def build(columns, seed=0):
    def head():
        return nn.Sequential(nn.Linear(reference.HIDDEN, 6), nn.Tanh(), nn.Linear(6, columns))

    return reference.make_model(head=head, dtype=torch.float64, seed=seed)


def make_batch(columns, as_target, size=16, seed=0):
    """Inputs of two modalities, and a target that both know with noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(size, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2, size, reference.WIDTH, generator=generator, dtype=torch.float64)
    inputs[:, :, :columns] = truth + 0.3 * inputs[:, :, :columns]
    return dict(zip(("image", "table"), inputs, strict=True)), as_target(truth)


@EVERY_TASK
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_the_guide_is_the_gradient_of_autograd_on_the_most_uncertain(task, fraction):
    loss_fn, uncertainty, by_hand, columns, as_target = task
    for seed in range(5):
        model, (inputs, target) = build(columns, seed), make_batch(columns, as_target, seed=seed)
        settings = {"loss_fn": loss_fn, "uncertainty": uncertainty, "fraction": fraction}
        optimizer = GradientAlignedAlternator(torch.optim.SGD(model.parameters(), lr=0.0), model.head, **settings)
        optimizer.rule = lambda _: torch.tensor([0.0, 1.0])  # the guide takes the place of the gradient
        features = model.encoders["table"](inputs["table"]).detach()
        scores = [by_hand(row) for row in model.head(features).tolist()]
        chosen = sorted(range(len(scores)), key=lambda i: -scores[i])[: int(fraction * len(scores))]
        each = [
            torch.autograd.grad(loss_fn(model.head(features[[i]]), target[[i]]), [*model.head.parameters()])
            for i in chosen
        ]
        expected = [torch.stack(gradients).mean(dim=0) for gradients in zip(*each, strict=True)]
        loss_fn(model.head(model.encoders["image"](inputs["image"])), target).backward()
        optimizer.guide("table", features, target)
        optimizer.step()
        torch.testing.assert_close([parameter.grad for parameter in model.head.parameters()], expected)


@ALIGN
@EVERY_TASK
def test_training_improves_every_modality_and_no_step_opposes_its_guide(task, align):
    loss_fn, uncertainty, _, columns, as_target = task
    model, (inputs, target) = build(columns), make_batch(columns, as_target, size=64)
    settings = {"loss_fn": loss_fn, "uncertainty": uncertainty, "align": align, "rule": DEMANDING}
    optimizer = GradientAlignedAlternator(torch.optim.Adam(model.parameters(), lr=0.02), model.head, **settings)

    def losses():
        with torch.no_grad():
            return np.array([loss_fn(model.head(model.encoders[name](x)), target) for name, x in inputs.items()])

    before, objected = losses(), 0
    for _ in range(40):
        features = FreshFeatures(optimizer, model.encoders, inputs)
        for turn in optimizer.turns("image", "table"):
            loss_fn(model.head(features[turn.modality]), target).backward()
            for guide in turn.guides:
                optimizer.guide(guide, features[guide], target)
            optimizer.step()
            optimizer.zero_grad()
            (guide,) = turn.guides
            objected += bool(optimizer.stats.intervened[guide])
            # A relative margin leaves a cosine of at least this much (docs/mathematics.md).
            assert optimizer.stats.cosine_after[guide] >= DEMANDING.margin / math.hypot(1, DEMANDING.margin) - 1e-6
    assert objected > 0
    assert (losses() < before - 0.05).all()
