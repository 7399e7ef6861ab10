"""Training tools that touch gradients, weights, groups or learning rates work with the wrapper as usual."""

import copy
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_identical, frozen_copy
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from wrapped import ADAMW, ALIGN, DEMANDING, INNER, SGD, backward, build, cosine, flat, guide_of, train_by_hand

from gaal_surgery import GradientAlignedAlternator

# Schedulers. A warning (wrong order of calls, step overridden) would be an error.

SCHEDULERS = {
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "one_cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=10),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)],
        milestones=[2],
    ),
    "swa": partial(SWALR, swa_lr=0.001, anneal_epochs=3),
}


@INNER
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_drives_the_inner_optimizer(schedule, inner):
    model, optimizer = build(inner=inner)
    twin, bare = copy.deepcopy((model, optimizer.base))
    schedulers = schedule(optimizer), schedule(bare)
    seen = set()
    for batch in reference.make_batches(8):
        for one, its_optimizer, scheduler in zip((model, twin), (optimizer, bare), schedulers, strict=True):
            backward(one, batch)
            its_optimizer.step()
            its_optimizer.zero_grad()
            scheduler.step(*[1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
        seen.add(bare.param_groups[0]["lr"])
    assert len(seen) > 2
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


def test_a_scheduler_of_the_inner_optimizer_keeps_working():
    model = reference.make_model()
    inner = SGD(model.parameters())
    scheduler = lr_scheduler.StepLR(inner, step_size=1, gamma=0.5)
    optimizer = GradientAlignedAlternator(inner, model.head)
    backward(model, reference.make_batches(1)[0])
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


# Clipping, accumulation.

CLIPPING = {
    "norm": partial(nn.utils.clip_grad_norm_, max_norm=0.1),
    "norm_foreach": partial(nn.utils.clip_grad_norm_, max_norm=0.1, foreach=True),
    "value": partial(nn.utils.clip_grad_value_, clip_value=0.02),
}


@pytest.mark.parametrize("clip", CLIPPING.values(), ids=CLIPPING)
def test_surgery_sees_gradients_that_were_clipped(clip):
    model, optimizer = build(inner=SGD)
    twin, bare = copy.deepcopy((model, optimizer.base))
    batches = reference.make_batches(4)
    for inputs, target in batches:
        for turn in optimizer.turns(*inputs):
            backward(model, (inputs, target), turn.modality)
            clip(model.parameters())
            optimizer.guide(turn.guides[0], model.encoders[turn.guides[0]](inputs[turn.guides[0]]), target)
            optimizer.step()
            optimizer.zero_grad()
    unclipped = copy.deepcopy((twin, bare))
    assert any(train_by_hand(bare, twin, batches, edit=lambda model: clip(model.parameters())))
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))
    train_by_hand(*reversed(unclipped), batches)
    assert not torch.equal(unclipped[0].head.weight, model.head.weight), "clipping must matter"


@ALIGN
def test_accumulated_gradients_are_aligned_at_the_boundary(align):
    """Micro-batches of 2 and 6: each loss weighs as its share of the batch, the guide's features come together."""
    model, optimizer = build(inner=SGD, align=align)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    objected = []
    for inputs, target in reference.make_batches(4):
        for turn in optimizer.turns(*inputs):
            features = []
            for rows in (slice(2), slice(2, 8)):
                logits = model.head(model.encoders[turn.modality](inputs[turn.modality][rows]))
                (F.cross_entropy(logits, target[rows], reduction="sum") / 8).backward()
                features.append(model.encoders[turn.guides[0]](inputs[turn.guides[0]][rows]))
            optimizer.guide(turn.guides[0], torch.cat(features), target)
            optimizer.step()
            optimizer.zero_grad()
            objected.append(bool(optimizer.stats.intervened[turn.guides[0]]))
        assert reference.train(its_optimizer, twin, [(inputs, target)]) == objected[-2:]
    assert any(objected)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


# Averaging.


def test_weights_can_be_averaged_while_training():
    model, optimizer = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for batch in reference.make_batches(3):
        reference.train(optimizer, model, [batch])
        average.update_parameters(model)
        weight = model.head.weight.detach().clone()
        expected = weight if expected is None else 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(average.module.head.weight.detach(), expected)


@ALIGN
def test_stochastic_weight_averaging_leaves_training_alone(align):
    """The mean of the weights after each round, its batch normalisation measured anew; training goes on as without."""

    def start():
        model = reference.make_model(head=lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
        optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head, align=align)
        return model, optimizer, SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)

    (model, optimizer, scheduler), (twin, its_optimizer, its_scheduler) = start(), start()
    average, snapshots, batches = AveragedModel(model.head), [], reference.make_batches(4)
    for batch in batches:
        assert reference.train(optimizer, model, [batch]) == reference.train(its_optimizer, twin, [batch])
        scheduler.step()
        its_scheduler.step()
        average.update_parameters(model.head)
        snapshots.append(model.head[1].weight.detach().clone())
        with torch.no_grad():
            features = [model.encoders["image"](inputs["image"]) for inputs, _ in batches]
        update_bn(features, average)
    assert optimizer.param_groups[0]["lr"] == 0.01
    torch.testing.assert_close(average.module[1].weight.detach(), torch.stack(snapshots).mean(0))
    torch.testing.assert_close(average.module[0].running_mean, torch.cat(features).mean(0))
    assert_identical(frozen_copy(model, optimizer), frozen_copy(twin, its_optimizer))


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


# Groups, freezing and unfreezing.


def split_over_groups(model, cls=SGD):
    """The head's weight and bias in groups of their own: another learning rate, another weight decay."""
    return cls(
        [
            {"params": model.encoders.parameters(), "lr": 0.05},
            {"params": [model.head.weight], "lr": 0.2, "weight_decay": 0.1},
            {"params": [model.head.bias], "lr": 0.01, "weight_decay": 0.0},
        ]
    )


@pytest.mark.parametrize("cls", [SGD, ADAMW], ids=["sgd_momentum", "adamw"])
def test_a_head_split_over_groups_is_aligned_as_one_vector(cls):
    model, twin = reference.make_model(), reference.make_model()
    optimizer = GradientAlignedAlternator(split_over_groups(model, cls), model.head)
    bare, batches = split_over_groups(twin, cls), reference.make_batches(5)
    objected = reference.train(optimizer, model, batches)
    assert any(objected)
    assert train_by_hand(bare, twin, batches) == objected
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


def test_the_step_of_a_head_split_over_groups_is_aligned_as_one_vector():
    model = reference.make_model(dtype=torch.float64)
    optimizer = GradientAlignedAlternator(split_over_groups(model), model.head, align="update")
    objected = 0
    for batch in reference.make_batches(6, dtype=torch.float64):
        turns = reference.take_turns(optimizer, model, batch)
        for guide in ("table", "image"):
            guide_gradient, before = guide_of(model, batch, guide), copy.deepcopy(model.head.state_dict())
            _, stats = next(turns)
            step = flat(before, guide_gradient) - flat(model.head.state_dict(), guide_gradient)
            assert cosine(step, flat(guide_gradient, guide_gradient)) > -1e-9
            objected += bool(stats.intervened[guide])
    assert objected


@ALIGN
def test_a_frozen_encoder_rests_until_it_is_unfrozen(align):
    """Its head trains on, and goes on taking its turns and guiding."""
    model, optimizer = build(align=align)
    frozen = model.encoders["table"]
    batches = reference.make_batches(6)
    reference.train(optimizer, model, batches[:2])
    frozen.requires_grad_(False)
    before = frozen_copy(frozen), copy.deepcopy([optimizer.state[parameter] for parameter in frozen.parameters()])
    head = model.head.weight.detach().clone()
    for batch in batches[2:4]:
        assert [stats.guides for _, stats in reference.take_turns(optimizer, model, batch)] == [("table",), ("image",)]
    assert_identical((frozen_copy(frozen), [optimizer.state[parameter] for parameter in frozen.parameters()]), before)
    assert not torch.equal(model.head.weight, head)
    frozen.requires_grad_(True)
    reference.train(optimizer, model, batches[4:])
    assert not torch.equal(frozen[0].weight, before[0][0]["0.weight"])


@pytest.mark.parametrize("held", [True, False], ids=["held_from_the_start", "added_as_a_group"])
def test_a_part_of_the_head_may_be_frozen_and_unfrozen_as_it_trains(held):
    model = reference.make_model(head=two_layers)
    model.head[0].requires_grad_(False)
    inner = SGD([parameter for parameter in model.parameters() if held or parameter.requires_grad])
    optimizer = GradientAlignedAlternator(inner, model.head, rule=DEMANDING)
    twin, bare = copy.deepcopy((model, inner))
    batches, objected, expected = reference.make_batches(9), [], []

    def proceed(batches):
        objected.extend(reference.train(optimizer, model, batches))
        expected.extend(train_by_hand(bare, twin, batches, rule=DEMANDING))
        assert_identical(frozen_copy(model, inner), frozen_copy(twin, bare))

    first = frozen_copy(model.head[0])
    proceed(batches[:3])
    assert_identical(frozen_copy(model.head[0]), first)
    for one, which in ((model, optimizer), (twin, bare)):
        one.head[0].requires_grad_(True)
        if not held:
            which.add_param_group({"params": one.head[0].parameters(), "lr": 0.05})
    proceed(batches[3:6])
    assert not torch.equal(model.head[0].weight, first[0]["weight"])
    for one in (model, twin):
        one.head[2].requires_grad_(False)
    last = frozen_copy(model.head[2])
    proceed(batches[6:])
    assert_identical(frozen_copy(model.head[2]), last)
    assert objected == expected
    assert all(any(objected[phase : phase + 6]) for phase in (0, 6, 12))


# What rewrites a head.


HEADS = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)),
}


@ALIGN
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_that_a_tool_rewrote_is_aligned_in_the_parameters_it_trains(head, align):
    model = reference.make_model(head=head)
    optimizer = GradientAlignedAlternator(torch.optim.SGD(model.parameters(), lr=0.1), model.head, align=align)
    batches = reference.make_batches(5)
    twin, bare = copy.deepcopy((model, optimizer.base))
    objected = reference.train(optimizer, model, batches)
    assert any(objected)
    # A plain SGD step is a multiple of the gradient, so both alignments do what the loop does.
    assert train_by_hand(bare, twin, batches) == objected
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@ALIGN
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activations_may_be_checkpointed_around_the_head(use_reentrant, align):
    """Inside the head they may be too: ``tests/heads.py`` has both kinds."""
    model, optimizer = build(inner=SGD, align=align)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    for inputs, target in reference.make_batches(4):
        for turn in optimizer.turns(*inputs):
            features = checkpoint(model.encoders[turn.modality], inputs[turn.modality], use_reentrant=False)
            F.cross_entropy(checkpoint(model.head, features, use_reentrant=use_reentrant), target).backward()
            optimizer.guide(turn.guides[0], model.encoders[turn.guides[0]](inputs[turn.guides[0]]), target)
            optimizer.step()
            optimizer.zero_grad()
        reference.train(its_optimizer, twin, [(inputs, target)])
    assert optimizer.stats.guides
    assert_identical(frozen_copy(model, optimizer), frozen_copy(twin, its_optimizer))
