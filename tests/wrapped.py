"""What the tests of integration share: a wrapped optimizer over the toy problem, and the same training by hand."""

import io
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F

import gaal_surgery
from gaal_surgery import GradientAlignedAlternator, HalfSpace

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
INNER = pytest.mark.parametrize(
    "inner", [SGD, ADAMW, partial(ADAMW, fused=True)], ids=["sgd_momentum", "adamw", "adamw_fused"]
)
ALIGN = pytest.mark.parametrize("align", ["gradient", "update"])
PAPERS = HalfSpace()
DEMANDING = HalfSpace(margin=0.3, relative=True)  # most guides object
RECIPE = pytest.mark.parametrize("recipe", ["fresh", "cached"])


def build(*modalities, inner=ADAMW, **settings):
    model = reference.make_model(*modalities)
    return model, GradientAlignedAlternator(inner(model.parameters()), model.head, **settings)


def backward(model, batch, modality="image"):
    """One turn's backward pass; returns what a guide of the same batch is recorded with."""
    inputs, target = batch
    features = model.encoders[modality](inputs[modality])
    F.cross_entropy(model.head(features), target).backward()
    return features.detach(), target


def saved_and_loaded(checkpoint, **how):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **how)


def guide_of(model, batch, modality, fraction=0.5):
    """The guide gradient of a modality at the model's current weights (Eqs. 6-8)."""
    inputs, target = batch
    with torch.no_grad():
        features = model.encoders[modality](inputs[modality])
        logits = model.head.eval()(features)
    model.head.train()
    chosen = gaal_surgery.select_uncertain(gaal_surgery.entropy(logits), fraction)
    return gaal_surgery.guide_gradient(model.head, features[chosen], target[chosen], F.cross_entropy)


def flat(tensors, names):
    """The named tensors as one vector in float64, a copy."""
    return torch.cat([tensors[name].detach().double().flatten() for name in names])


def cosine(one, other):
    return float(F.cosine_similarity(one, other, dim=0, eps=1e-300))


def train_by_hand(bare, model, batches, *, rule=PAPERS, edit=lambda model: None, tolerance=1e-6):
    """What the wrapper does for two modalities with fresh guides, in the user's own loop around ``align``.

    ``edit`` touches gradients between the backward pass and surgery. Returns, turn by turn, whether surgery changed
    the gradient, after checking that what it left has no conflict.
    """
    changed = []
    for batch in batches:
        for modality, guide in (("image", "table"), ("table", "image")):
            backward(model, batch, modality)
            edit(model)
            guide_gradient = guide_of(model, batch, guide)
            gradient = {name: model.head.get_parameter(name).grad for name in guide_gradient}
            aligned = gaal_surgery.align(gradient, [guide_gradient], rule)
            assert cosine(flat(aligned, gradient), flat(guide_gradient, gradient)) > -tolerance
            changed.append(any(not torch.equal(aligned[name], gradient[name]) for name in gradient))
            for name in gradient:
                gradient[name].copy_(aligned[name])
            bare.step()
            bare.zero_grad()
    return changed
