"""The library against the plain re-implementation of Algorithm 1 in ``reference.py``, over many batches."""

import pytest
import reference
import torch
from torch import nn

from gaal_surgery import DualFloor, GradientAlignedAlternator, HalfSpace

RULES = {"half_space": (HalfSpace(), reference.nearest_feasible), "dual_floor": (DualFloor(), reference.floored_dual)}
INNER = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def mlp():
    return nn.Sequential(nn.Linear(reference.HIDDEN, 6), nn.Tanh(), nn.Linear(6, reference.CLASSES))


def assert_agrees(modalities, *, recipe, rule, align, inner, guides="previous", fraction=0.5, head=None):
    library_rule, project = RULES[rule]
    batches = reference.make_batches(40, *modalities, size=6, dtype=torch.float64)
    ours = reference.make_model(*modalities, dtype=torch.float64, head=head)
    theirs = reference.make_model(*modalities, dtype=torch.float64, head=head)
    optimizer = GradientAlignedAlternator(
        INNER[inner](ours.parameters()), ours.head, fraction=fraction, rule=library_rule, align=align, guides=guides
    )
    objected = reference.train(optimizer, ours, batches, recipe=recipe)
    changed, turns = reference.algorithm_1(
        theirs,
        INNER[inner](theirs.parameters()),
        batches,
        recipe=recipe,
        project=project,
        align=align,
        fraction=fraction,
        guides=guides,
    )
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
    assert changed == sum(objected)
    assert 5 < changed < turns - 5, "the run must meet both conflict and agreement"


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("align", ["gradient", "update"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("recipe", ["fresh", "cached"])
def test_two_modalities_train_as_algorithm_1(recipe, rule, align, inner):
    assert_agrees(("image", "table"), recipe=recipe, rule=rule, align=align, inner=inner)


@pytest.mark.parametrize("guides", ["previous", "others"])
@pytest.mark.parametrize("align", ["gradient", "update"])
@pytest.mark.parametrize("recipe", ["fresh", "cached"])
def test_three_modalities_train_as_algorithm_1(recipe, align, guides):
    modalities = ("image", "table", "audio")
    assert_agrees(modalities, recipe=recipe, rule="half_space", align=align, inner="sgd", guides=guides)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_every_fraction_selects_the_samples_of_algorithm_1(fraction):
    assert_agrees(
        ("image", "table"), recipe="fresh", rule="half_space", align="gradient", inner="sgd", fraction=fraction
    )


def test_a_deep_head_trains_as_algorithm_1():
    assert_agrees(("image", "table"), recipe="cached", rule="half_space", align="gradient", inner="adamw", head=mlp)
