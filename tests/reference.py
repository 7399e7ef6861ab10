"""A toy multimodal problem, the user's loop over it, and a plain, slow re-implementation of Algorithm 1.

Nothing here imports the library: per-sample gradients come one by one from autograd, entropy is summed by hand, samples
are selected by ``sorted``, and the projection is numpy in float64.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import nn
from torch.utils._pytree import tree_flatten

WIDTH, HIDDEN, CLASSES = 5, 4, 3


# The toy problem: as many modalities as wanted, one small encoder each, one shared head.


class Multimodal(nn.Module):
    def __init__(self, *modalities, head=None):
        super().__init__()
        encoders = {name: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh()) for name in modalities}
        self.encoders = nn.ModuleDict(encoders)
        self.head = nn.Linear(HIDDEN, CLASSES) if head is None else head


def make_model(*modalities, seed=0, dtype=torch.float32, head=None):
    """The model (image and table unless named) with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Multimodal(*modalities or ("image", "table"), head=head() if head else None).to(dtype)


def make_batches(count, *modalities, size=8, seed=0, dtype=torch.float32):
    """Batches of noise with random targets: about half the turns are in conflict."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {
                name: torch.randn(size, WIDTH, generator=generator, dtype=dtype)
                for name in modalities or ("image", "table")
            },
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


# The user's loop, as the README shows it, for anything with turns, guide, step and zero_grad.


def take_turns(optimizer, model, batch, *, recipe="fresh"):
    """One round on one batch; yields the modality and the statistics after every step."""
    inputs, target = batch
    for turn in optimizer.turns(*inputs):
        features = model.encoders[turn.modality](inputs[turn.modality])
        F.cross_entropy(model.head(features), target).backward()
        if recipe == "fresh":
            for guide in turn.guides:
                with torch.no_grad():
                    optimizer.guide(guide, model.encoders[guide](inputs[guide]), target)
        optimizer.step()
        if recipe == "cached":
            optimizer.guide(turn.modality, features.detach(), target)
        optimizer.zero_grad()
        yield turn.modality, optimizer.stats


def train(optimizer, model, batches, *, recipe="fresh"):
    """All rounds; returns, turn by turn, whether a guide objected."""
    objected = []
    for batch in batches:
        for _, stats in take_turns(optimizer, model, batch, recipe=recipe):
            objected.append(any(bool(intervened) for intervened in stats.intervened.values()))
    return objected


# Bits.


def frozen_copy(*objects):
    """Deep copies of the state dictionaries of modules and optimizers, to compare with later."""
    return [copy.deepcopy(item.state_dict()) for item in objects]


def assert_identical(actual, expected):
    """Equal to the bit: the sign of zeros and the payload of NaNs too, through any nesting of containers."""
    actual_leaves, actual_structure = tree_flatten(actual)
    expected_leaves, expected_structure = tree_flatten(expected)
    assert actual_structure == expected_structure
    for one, other in zip(actual_leaves, expected_leaves, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert one.detach().numpy().tobytes() == other.detach().numpy().tobytes(), f"{one} is not {other}"
        else:
            assert one == other


# Algorithm 1.


def nearest_feasible(g, guides):
    """The nearest point to g with a non-negative inner product with every guide (Eqs. 3-5 at margin 0)."""
    if len(guides) == 1:
        p = guides[0]
        return g + max(0.0, -(p @ g) / (p @ p)) * p
    # The dual of the program is a non-negative least squares problem.
    matrix = np.stack(guides, axis=1)
    return g + matrix @ nnls(matrix, -g)[0]


def floored_dual(g, guides, floor=0.75, ridge=1e-3):
    """What the authors' released code does, each guide by itself."""
    return g + sum(max(floor, -(p @ g) / (p @ p + ridge)) * p for p in guides if p @ g < 0)


def hand_entropy(logits):
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return -sum(power / sum(powers) * math.log(power / sum(powers)) for power in powers)


def most_uncertain(head, features, fraction):
    with torch.no_grad():
        scores = [hand_entropy(row) for row in head(features).tolist()]
    count = max(1, math.floor(fraction * len(scores)))
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def flat(tensors):
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


def write(tensors, vector):
    position = 0
    for tensor in tensors:
        values = torch.from_numpy(vector[position : position + tensor.numel()])
        tensor.data.copy_(values.reshape(tensor.shape))
        position += tensor.numel()


def mean_gradient(head, features, target):
    """Eq. 8, one sample at a time."""
    gradients = [
        flat(torch.autograd.grad(F.cross_entropy(head(features[i : i + 1]), target[i : i + 1]), [*head.parameters()]))
        for i in range(len(features))
    ]
    return sum(gradients) / len(gradients)


def algorithm_1(model, inner, batches, *, recipe, project, align, fraction=0.5, guides="previous"):
    """Train ``model`` with ``inner``; returns how many steps the projection changed."""
    head = [*model.head.parameters()]
    memory, changed, turns_done = {}, 0, 0
    for inputs, target in batches:
        modalities = list(inputs)
        for position, modality in enumerate(modalities):
            own = [*model.encoders[modality].parameters()]
            features = model.encoders[modality](inputs[modality])
            loss = F.cross_entropy(model.head(features), target)
            for parameter, gradient in zip(own + head, torch.autograd.grad(loss, own + head), strict=True):
                parameter.grad = gradient
            others = modalities[position + 1 :] + modalities[:position]
            wanted = others if guides == "others" else others[-1:]
            if recipe == "fresh":
                evidence = [(model.encoders[name](inputs[name]).detach(), target) for name in wanted]
            else:
                evidence = [memory[name] for name in wanted if name in memory]
            guide_gradients = []
            for guide_features, guide_target in evidence:
                chosen = most_uncertain(model.head, guide_features, fraction)
                guide_gradients.append(mean_gradient(model.head, guide_features[chosen], guide_target[chosen]))
            before = flat(head)
            if align == "gradient":
                gradient = flat(parameter.grad for parameter in head)
                aligned = project(gradient, guide_gradients) if guide_gradients else gradient
                changed += not np.array_equal(aligned, gradient)
                write([parameter.grad for parameter in head], aligned)
                inner.step()
            else:
                inner.step()
                descent = before - flat(head)
                aligned = project(descent, guide_gradients) if guide_gradients else descent
                if not np.array_equal(aligned, descent):
                    changed += 1
                    write(head, before - aligned)
            for parameter in own + head:
                parameter.grad = None
            memory[modality] = (features.detach(), target)
            turns_done += 1
    return changed, turns_done
