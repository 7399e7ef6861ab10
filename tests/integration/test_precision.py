"""Mixed and low precision: autocast, gradient scaling with its lost steps, bfloat16 models, float64 heads."""

import copy
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_identical, frozen_copy
from torch import nn
from torch.utils._pytree import tree_map_only
from wrapped import ADAMW, ALIGN, DEMANDING, INNER, RECIPE, SGD, build, cosine, flat, guide_of, train_by_hand

from gaal_surgery import GradientAlignedAlternator, Turn

AUTOCAST = pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


def scaler_of(scale=1024.0):
    """A power of two: not even rounding differs under it."""
    return torch.amp.GradScaler("cpu", init_scale=scale)


def train(optimizer, model, batches, *, autocast=None, scaler=None, recipe="fresh", lost=(), in_turns=True):
    """The user's loop in mixed precision; returns the guides used and whether one objected, step by step.

    In ``lost`` steps, by their number, a scaled gradient overflows; without a scaler they are left out.
    """
    history, number = [], 0
    for inputs, target in batches:
        turns = [Turn(modality, tuple(other for other in inputs if other != modality)) for modality in inputs]
        for turn in optimizer.turns(*inputs) if in_turns else turns:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                features = model.encoders[turn.modality](inputs[turn.modality])
                loss = F.cross_entropy(model.head(features), target)
                if recipe == "fresh":
                    for guide in turn.guides:
                        optimizer.guide(guide, model.encoders[guide](inputs[guide]), target)
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                if number in lost:
                    model.head.weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
            elif number not in lost:
                optimizer.step()
            if number not in lost:
                history.append((optimizer.stats.guides, [bool(flag) for flag in optimizer.stats.intervened.values()]))
            if recipe == "cached":
                optimizer.guide(turn.modality, features, target)
            optimizer.zero_grad()
            number += 1
    return history


def objected(history):
    return any(any(flags) for _, flags in history)


def comparable(*objects):
    """Without bfloat16, which numpy does not know; the conversion is exact."""
    return tree_map_only(torch.Tensor, torch.Tensor.double, frozen_copy(*objects))


# Autocast and scaling.


@ALIGN
@INNER
def test_under_a_gradient_scaler_training_is_the_same(inner, align):
    """A fused inner optimizer, which can unscale, must not do it again."""
    model, optimizer = build(inner=inner, align=align)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    scaler, batches = scaler_of(), reference.make_batches(4)
    history = train(optimizer, model, batches, scaler=scaler)
    assert objected(history)
    assert train(its_optimizer, twin, batches) == history
    assert scaler.get_scale() == 1024.0
    assert_identical(comparable(model, optimizer), comparable(twin, its_optimizer))


@ALIGN
@RECIPE
@FUSED
@AUTOCAST
def test_under_autocast_a_gradient_scaler_changes_nothing_either(autocast, fused, recipe, align):
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1, fused=fused), align=align, rule=DEMANDING)
    (twin, its_optimizer), (wide, wide_optimizer) = copy.deepcopy([(model, optimizer), (model, optimizer)])
    batches = reference.make_batches(4)
    history = train(optimizer, model, batches, autocast=autocast, recipe=recipe, scaler=scaler_of())
    assert objected(history)
    assert train(its_optimizer, twin, batches, autocast=autocast, recipe=recipe) == history
    assert_identical(comparable(model, optimizer), comparable(twin, its_optimizer))
    train(wide_optimizer, wide, batches, recipe=recipe)
    assert not torch.equal(model.head.weight, wide.head.weight), "autocast must matter"


# Overflows.


LOST = pytest.mark.parametrize("lost", [{0}, {2}, {2, 3}, {1, 2, 3, 4}, {3, 5}], ids=str)


@pytest.mark.parametrize("in_turns", [True, False], ids=["in_turns", "outside"])
@LOST
@RECIPE
@FUSED
@ALIGN
def test_an_overflow_loses_the_step_and_nothing_else(align, fused, recipe, lost, in_turns):
    """Guides, the inner state and the statistics are as where the step was never called."""
    model, optimizer = build(inner=partial(ADAMW, fused=fused), align=align, rule=DEMANDING)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    scaler = scaler_of()
    loop = partial(train, batches=reference.make_batches(5), recipe=recipe, lost=lost, in_turns=in_turns)
    history = loop(optimizer, model, scaler=scaler)
    assert scaler.get_scale() == 1024.0 / 2 ** len(lost)
    assert objected(history)
    assert loop(its_optimizer, twin) == history
    assert_identical(comparable(model, optimizer), comparable(twin, its_optimizer))


@pytest.mark.parametrize(
    ("in_turns", "expected"),
    [(True, [(), ("image",), ("table",)]), (False, [(), ("image",), ("image", "table")])],
    ids=["in_turns", "outside"],
)
def test_a_cached_guide_outlives_an_overflow_as_long_as_its_round(in_turns, expected):
    """The third and fourth steps are lost; what they recorded guides the fifth."""
    model, optimizer = build()
    batches = reference.make_batches(3)
    history = train(optimizer, model, batches, scaler=scaler_of(), recipe="cached", lost={2, 3}, in_turns=in_turns)
    assert [guides for guides, _ in history[:3]] == expected


def test_a_scale_too_large_is_found_and_lowered():
    """Half precision overflows of itself, in steps that are lost one after the other."""
    model, optimizer = build()
    scaler, steps = scaler_of(2.0**30), []
    optimizer.register_step_post_hook(lambda which, *_: steps.append(which.stats.guides))
    batches = reference.make_batches(8)
    before = frozen_copy(model)
    train(optimizer, model, batches[:2], autocast=torch.float16, scaler=scaler)
    assert not steps
    assert_identical(frozen_copy(model), before)
    train(optimizer, model, batches[2:] * 2, autocast=torch.float16, scaler=scaler)
    assert 4 < len(steps) < 28
    assert set(steps) == {("table",), ("image",)}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Clipping.


@ALIGN
@pytest.mark.parametrize("when", ["before", "after"])
def test_clipping_before_or_after_alignment_respects_the_limit(when, align):
    """Before: as usual, after unscaling. After: in a hook of the inner optimizer."""
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=1.0), align=align)
    scaler = scaler_of()

    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    if when == "after":
        optimizer.base.register_step_pre_hook(clip)
    intervened = 0
    for inputs, target in reference.make_batches(10):
        for turn in optimizer.turns(*inputs):
            features = model.encoders[turn.modality](inputs[turn.modality])
            scaler.scale(F.cross_entropy(model.head(features), target)).backward()
            optimizer.guide(turn.guides[0], model.encoders[turn.guides[0]](inputs[turn.guides[0]]), target)
            scaler.unscale_(optimizer)
            if when == "before":
                clip()
            before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert (nn.utils.parameters_to_vector(model.parameters()) - before).norm() <= 0.01 * (1 + 1e-4)
            intervened += bool(optimizer.stats.intervened[turn.guides[0]])
    assert intervened


# Models in a precision of their own.


def in_precision(batches, dtype):
    return [({name: rows.to(dtype) for name, rows in inputs.items()}, target) for inputs, target in batches]


LOW_PRECISION = {
    "bfloat16_sgd": (torch.bfloat16, SGD),
    "bfloat16_adamw": (torch.bfloat16, ADAMW),
    "float16_sgd": (torch.float16, SGD),  # the epsilon of Adam is 0 in float16
}


@pytest.mark.parametrize(("dtype", "inner"), LOW_PRECISION.values(), ids=LOW_PRECISION)
def test_a_low_precision_model_is_aligned_as_by_hand(dtype, inner):
    model = reference.make_model(dtype=dtype)
    optimizer = GradientAlignedAlternator(inner(model.parameters()), model.head)
    twin, bare = copy.deepcopy((model, optimizer.base))
    batches = in_precision(reference.make_batches(6), dtype)
    objections = reference.train(optimizer, model, batches)
    assert any(objections)
    assert train_by_hand(bare, twin, batches, tolerance=torch.finfo(dtype).eps) == objections
    assert_identical(comparable(model, optimizer.base), comparable(twin, bare))


def test_the_step_of_a_bfloat16_model_is_aligned_to_its_rounding():
    model = reference.make_model(dtype=torch.bfloat16)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = GradientAlignedAlternator(inner, model.head, align="update")
    intervened = 0
    for batch in in_precision(reference.make_batches(10), torch.bfloat16):
        turns = reference.take_turns(optimizer, model, batch)
        for guide in ("table", "image"):
            guide_gradient, before = guide_of(model, batch, guide), copy.deepcopy(model.head.state_dict())
            _, stats = next(turns)
            step = flat(before, guide_gradient) - flat(model.head.state_dict(), guide_gradient)
            assert cosine(step, flat(guide_gradient, guide_gradient)) > -0.05
            intervened += bool(stats.intervened[guide])
    assert intervened


class Float64Linear(nn.Linear):
    def forward(self, features):
        return super().forward(features.double())


@ALIGN
@AUTOCAST
def test_a_float64_head_keeps_its_precision_under_autocast_and_scaling(autocast, align):
    def start():
        model = reference.make_model(head=partial(Float64Linear, 4, 3))
        model.head.double()
        return model, GradientAlignedAlternator(ADAMW(model.parameters()), model.head, align=align, rule=DEMANDING)

    (model, optimizer), (twin, its_optimizer) = start(), start()
    batches = reference.make_batches(4)
    history = train(optimizer, model, batches, autocast=autocast, scaler=scaler_of())
    assert objected(history)
    assert train(its_optimizer, twin, batches, autocast=autocast) == history
    assert model.head.weight.dtype is torch.float64
    assert_identical(comparable(model, optimizer), comparable(twin, its_optimizer))
