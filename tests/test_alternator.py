"""What the alternator does: who steps when, how long guides live, and what a step leaves untouched."""

import copy
from functools import partial

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_identical, frozen_copy
from torch import nn

import gaal_surgery
from gaal_surgery import GradientAlignedAlternator, HalfSpace

NEVER_OBJECTS = HalfSpace(margin=-1e9)
ALIGN = pytest.mark.parametrize("align", ["gradient", "update"])

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
INNER = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd_momentum": SGD,
    "sgd_nesterov_foreach": partial(SGD, nesterov=True, foreach=True),
    "sgd_fused": partial(torch.optim.SGD, lr=0.1, weight_decay=1e-2, fused=True),
    "adam_amsgrad": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": partial(ADAMW, foreach=False),
    "adamw_foreach": partial(ADAMW, foreach=True),
    "adamw_fused": partial(ADAMW, fused=True),
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "adamax": partial(torch.optim.Adamax, lr=0.01),
    "asgd": partial(torch.optim.ASGD, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "radam": partial(torch.optim.RAdam, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
}
MODES = ["sgd_momentum", "adamw", "adamw_foreach", "adamw_fused"]


def build(*modalities, inner=SGD, head=None, dtype=torch.float32, **settings):
    model = reference.make_model(*modalities, head=head, dtype=dtype)
    return model, GradientAlignedAlternator(inner(model.parameters()), model.head, **settings)


def twin_of(model, optimizer):
    """A copy of the model with a copy of the bare inner optimizer."""
    return copy.deepcopy((model, optimizer.base))


def backward(model, batch, modality="image"):
    """One turn's backward pass; returns what a guide of the same batch is recorded with."""
    inputs, target = batch
    features = model.encoders[modality](inputs[modality])
    F.cross_entropy(model.head(features), target).backward()
    return features.detach(), target


def negative_cross_entropy(logits, target):
    return -F.cross_entropy(logits, target)


# A guide of the batch in training itself, under the negated loss: its gradient is exactly the opposite of the current.
OPPOSED = {"loss_fn": negative_cross_entropy, "fraction": 1.0}


@pytest.fixture
def batch():
    return reference.make_batches(1)[0]


# What a step leaves to the wrapped optimizer, bit for bit.


@ALIGN
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_without_a_guide_step_is_the_inner_step(inner, align):
    model, optimizer = build(inner=inner, align=align)
    twin, bare = twin_of(model, optimizer)
    for batch in reference.make_batches(3):
        for turn in optimizer.turns("image", "table"):
            backward(model, batch, turn.modality)
            optimizer.step()
            optimizer.zero_grad()
            backward(twin, batch, turn.modality)
            bare.step()
            bare.zero_grad()
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


@ALIGN
@pytest.mark.parametrize("inner", [INNER[name] for name in MODES], ids=MODES)
def test_a_step_to_which_no_guide_objects_is_the_inner_step(inner, align):
    model, optimizer = build(inner=inner, align=align, rule=NEVER_OBJECTS)
    twin, bare = twin_of(model, optimizer)
    for batch in reference.make_batches(3):
        for modality, stats in reference.take_turns(optimizer, model, batch):
            assert stats.guides
            backward(twin, batch, modality)
            bare.step()
            bare.zero_grad()
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


@ALIGN
def test_zeros_in_an_unobjected_gradient_keep_their_sign(align, batch):
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1), align=align, rule=NEVER_OBJECTS)
    with torch.no_grad():
        model.head.weight.fill_(-0.0)
    optimizer.guide("table", *backward(model, batch))
    model.head.weight.grad.fill_(-0.0)
    twin, bare = twin_of(model, optimizer)
    for parameter, copied in zip(model.parameters(), twin.parameters(), strict=True):
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    optimizer.step()
    bare.step()
    assert_identical(model.state_dict(), twin.state_dict())
    assert_identical(model.head.weight.grad, twin.head.weight.grad)


@ALIGN
@pytest.mark.parametrize("recipe", ["fresh", "cached"])
@pytest.mark.parametrize("inner", [INNER[name] for name in MODES], ids=MODES)
def test_the_idle_encoder_and_its_state_do_not_move(inner, recipe, align):
    model, optimizer = build(inner=inner, align=align)

    def encoder(modality):
        parameters = list(model.encoders[modality].parameters())
        return copy.deepcopy([parameters, [optimizer.state[p] for p in parameters if p in optimizer.state]])

    for batch in reference.make_batches(3):
        before = {modality: encoder(modality) for modality in batch[0]}
        for modality, _ in reference.take_turns(optimizer, model, batch, recipe=recipe):
            idle = "table" if modality == "image" else "image"
            assert_identical(encoder(idle), before[idle])
            assert not torch.equal(encoder(modality)[0][0], before[modality][0][0])
            before[modality] = encoder(modality)


class CallCounter(nn.Module):
    """Keeps a buffer that changes in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features):
        self.calls.add_(1)
        return features


@ALIGN
def test_guiding_leaves_modes_buffers_random_state_and_other_gradients_alone(align, batch):
    def head():
        return nn.Sequential(
            nn.BatchNorm1d(reference.HIDDEN), nn.Dropout(), CallCounter(), nn.Linear(reference.HIDDEN, 3)
        )

    model, optimizer = build(head=head, align=align)
    backward(model, batch)
    attached = model.encoders["table"](batch[0]["table"])
    buffers, random_state = copy.deepcopy(dict(model.head.named_buffers())), torch.get_rng_state()
    model.head[1].eval()
    optimizer.guide("table", attached, batch[1])
    optimizer.step()
    assert_identical(dict(model.head.named_buffers()), buffers)
    assert_identical(torch.get_rng_state(), random_state)
    assert [module.training for module in model.head] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.encoders["table"].parameters())
    assert optimizer.stats.guides == ("table",)


# Alignment.


@pytest.mark.parametrize("rule", [HalfSpace(), HalfSpace(margin=0.2, relative=True)], ids=["margin_0", "relative"])
@pytest.mark.parametrize("inner", [SGD, ADAMW, INNER["adamw_fused"]], ids=["sgd_momentum", "adamw", "adamw_fused"])
def test_update_alignment_holds_for_the_step_really_taken(inner, rule):
    model, optimizer = build(inner=inner, align="update", rule=rule, fraction=0.5, dtype=torch.float64)
    objected = 0
    for batch in reference.make_batches(20, dtype=torch.float64):
        for turn in optimizer.turns("image", "table"):
            (guide,) = turn.guides
            features = model.encoders[guide](batch[0][guide]).detach()
            chosen = reference.most_uncertain(model.head, features, 0.5)
            p = reference.mean_gradient(model.head, features[chosen], batch[1][chosen])
            before = reference.flat(model.head.parameters())
            twin, bare = twin_of(model, optimizer)
            backward(twin, batch, turn.modality)
            bare.step()
            backward(model, batch, turn.modality)
            optimizer.guide(guide, features, batch[1])
            optimizer.step()
            optimizer.zero_grad()
            update = before - reference.flat(twin.head.parameters())
            taken = before - reference.flat(model.head.parameters())
            required = rule.margin * np.linalg.norm(update) * np.linalg.norm(p)
            assert p @ taken >= required - 1e-12
            if p @ update < required:
                objected += 1
                assert p @ taken == pytest.approx(required, abs=1e-12)
            assert_identical(optimizer.base.state_dict(), bare.state_dict())
            assert_identical(model.encoders.state_dict(), twin.encoders.state_dict())
    assert objected > 5


@pytest.mark.parametrize("align", ["gradient", "update"])
def test_an_opposed_guide_stops_the_shared_module_across_its_parameter_groups(align, batch):
    model = reference.make_model(dtype=torch.float64)
    batch = reference.make_batches(1, dtype=torch.float64)[0]
    groups = [
        {"params": model.head.weight, "lr": 0.1},
        {"params": [*model.encoders.parameters()], "lr": 0.2},
        {"params": model.head.bias, "lr": 0.1},
    ]
    optimizer = GradientAlignedAlternator(torch.optim.SGD(groups), model.head, align=align, **OPPOSED)
    before = copy.deepcopy(model)
    optimizer.guide("table", *backward(model, batch))
    optimizer.step()
    torch.testing.assert_close(model.head.state_dict(), before.head.state_dict(), rtol=0, atol=1e-15)
    assert not torch.equal(model.encoders["image"][0].weight, before.encoders["image"][0].weight)


@ALIGN
def test_a_rule_may_weigh_the_current_gradient_too(align):
    model, optimizer = build(dtype=torch.float64, align=align, fraction=1.0, rule=lambda _: torch.tensor([0.5, 0.25]))
    batch = reference.make_batches(1, dtype=torch.float64)[0]
    twin, bare = twin_of(model, optimizer)
    features, target = backward(twin, batch)
    before, gradient = reference.flat(twin.head.parameters()), reference.flat(p.grad for p in twin.head.parameters())
    p = reference.mean_gradient(model.head, -features, target)
    if align == "gradient":
        reference.write([parameter.grad for parameter in twin.head.parameters()], 0.5 * gradient + 0.25 * p)
    bare.step()
    if align == "update":
        update = before - reference.flat(twin.head.parameters())
        reference.write(twin.head.parameters(), before - 0.5 * update - 0.25 * p)
    backward(model, batch)
    optimizer.guide("table", -features, target)
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-14)


def test_one_inner_product_spans_all_parameters_of_the_shared_module():
    """A guide that objects to the bias alone, but not to the whole, changes nothing."""
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1), fraction=1.0)
    features, target = torch.eye(reference.HIDDEN), torch.zeros(reference.HIDDEN, dtype=torch.long)
    optimizer.guide("table", features, target)
    F.cross_entropy(model.head(features), target).backward()
    model.head.bias.grad.mul_(-1e-3)
    gradient = model.head.bias.grad.clone()
    optimizer.step()
    assert_identical(model.head.bias.grad, gradient)


def test_the_gradient_is_written_in_place(batch):
    """Trainers keep gradients as views into their buckets."""
    model, optimizer = build(**OPPOSED)
    guide = backward(model, batch)
    bucket = torch.cat([parameter.grad.flatten() for parameter in model.head.parameters()])
    views = dict(zip(("weight", "bias"), bucket.split([model.head.weight.numel(), reference.CLASSES]), strict=True))
    model.head.weight.grad, model.head.bias.grad = views["weight"].view_as(model.head.weight), views["bias"]
    optimizer.guide("table", *guide)
    optimizer.step()
    assert model.head.weight.grad.untyped_storage().data_ptr() == bucket.untyped_storage().data_ptr()
    torch.testing.assert_close(bucket, torch.zeros_like(bucket), rtol=0, atol=1e-7)


@ALIGN
def test_a_parameter_without_gradient_is_left_out_of_both_gradients(align, batch):
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1), align=align, **OPPOSED)
    optimizer.guide("table", *backward(model, batch))
    norm = model.head.weight.grad.norm()
    model.head.bias.grad = None
    before = copy.deepcopy(model.head.state_dict())
    optimizer.step()
    assert model.head.bias.grad is None
    torch.testing.assert_close(model.head.state_dict(), before, rtol=0, atol=1e-6)
    scale = 1.0 if align == "gradient" else 0.1
    torch.testing.assert_close(optimizer.stats.guide_norm["table"].float(), norm)
    torch.testing.assert_close(optimizer.stats.gradient_norm.float(), scale * norm, rtol=1e-5, atol=0)


@ALIGN
@pytest.mark.parametrize("frozen", [["0.weight", "0.bias"], ["2.weight"], ["0.bias", "2.bias"]])
def test_a_partially_frozen_head_is_aligned_in_what_trains(frozen, align, batch):
    def head():
        return nn.Sequential(nn.Linear(reference.HIDDEN, 6), nn.Tanh(), nn.Linear(6, reference.CLASSES))

    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1), head=head, align=align, **OPPOSED)
    for name in frozen:
        model.head.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(model.head.state_dict())
    optimizer.guide("table", *backward(model, batch))
    optimizer.step()
    torch.testing.assert_close(model.head.state_dict(), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(optimizer.stats.cosine_before["table"].float(), torch.tensor(-1.0))


@ALIGN
def test_a_frozen_head_needs_no_guide(align, batch):
    model, optimizer = build(align=align)
    model.head.requires_grad_(False)
    twin, bare = twin_of(model, optimizer)
    for turn in optimizer.turns("image", "table"):
        optimizer.guide(turn.guides[0], *backward(model, batch, turn.modality))
        optimizer.step()
        optimizer.zero_grad()
        backward(twin, batch, turn.modality)
        bare.step()
        bare.zero_grad()
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


@pytest.mark.parametrize("max_norm", [0.05, 0.3, 100.0])
def test_max_norm_clips_every_selected_sample(max_norm, batch):
    model, optimizer = build(max_norm=max_norm)
    features, target = backward(model, batch)
    chosen = reference.most_uncertain(model.head, features, 0.5)
    gradients = [reference.mean_gradient(model.head, features[i : i + 1], target[i : i + 1]) for i in chosen]
    clipped = [gradient * min(1, max_norm / np.linalg.norm(gradient)) for gradient in gradients]
    optimizer.guide("table", features, target)
    optimizer.step()
    assert float(optimizer.stats.guide_norm["table"]) == pytest.approx(np.linalg.norm(sum(clipped) / 4), rel=1e-5)


def test_the_fraction_may_differ_by_modality(batch):
    fractions = {"image": 0.25, "table": 1.0}
    model, optimizer = build(fraction=fractions, dtype=torch.float64)
    batch = reference.make_batches(1, dtype=torch.float64)[0]
    features, target = backward(model, batch)
    for modality, fraction in fractions.items():
        chosen = reference.most_uncertain(model.head, features, fraction)
        expected = np.linalg.norm(reference.mean_gradient(model.head, features[chosen], target[chosen]))
        optimizer.guide(modality, features, target)
        with torch.no_grad():
            before = copy.deepcopy(model.state_dict())
            optimizer.step()
            model.load_state_dict(before)
        assert float(optimizer.stats.guide_norm[modality]) == pytest.approx(expected, rel=1e-9)


@ALIGN
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_head_may_have_a_precision_of_its_own(dtype, align, batch):
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.5), align=align, **OPPOSED)
    model.head.to(dtype)
    features = model.encoders["image"](batch[0]["image"])
    F.cross_entropy(model.head(features.to(dtype)), batch[1]).backward()
    before = copy.deepcopy(model.head.state_dict())
    optimizer.guide("table", features, batch[1])
    optimizer.step()
    assert {parameter.dtype for parameter in model.head.parameters()} == {dtype}
    assert {parameter.grad.dtype for parameter in model.head.parameters()} == {dtype}
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(model.head.state_dict(), before, rtol=tolerance, atol=tolerance)


@ALIGN
def test_features_made_under_autocast_guide_a_float32_head(align, batch):
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1), align=align)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encoders["image"](batch[0]["image"])
        F.cross_entropy(model.head(features), batch[1]).backward()
        assert features.dtype is torch.bfloat16
        optimizer.guide("table", -features, batch[1])
        optimizer.step()
    stats = optimizer.stats
    chosen = reference.most_uncertain(build()[0].head, -features.float(), 0.5)
    p = reference.mean_gradient(build()[0].head, -features.detach()[chosen].float(), batch[1][chosen])
    assert float(stats.guide_norm["table"]) == pytest.approx(np.linalg.norm(p), rel=1e-5)
    assert float(stats.cosine_after["table"]) > -1e-6


# The life of a guide.


def guides_used(optimizer, model, rounds, modalities, recipe):
    batches = reference.make_batches(rounds, *modalities)
    turns = [turn for batch in batches for turn in reference.take_turns(optimizer, model, batch, recipe=recipe)]
    return [(modality, stats.guides) for modality, stats in turns]


@pytest.mark.parametrize(
    ("guides", "recipe", "expected"),
    [
        ("previous", "fresh", [("a", ())] * 2),
        ("others", "cached", [("a", ())] * 2),
        ("previous", "fresh", [("a", ("b",)), ("b", ("a",))] * 2),
        ("others", "fresh", [("a", ("b",)), ("b", ("a",))] * 2),
        ("previous", "cached", [("a", ()), ("b", ("a",)), ("a", ("b",)), ("b", ("a",))]),
        ("previous", "fresh", [("a", ("c",)), ("b", ("a",)), ("c", ("b",))] * 2),
        ("others", "fresh", [("a", ("b", "c")), ("b", ("c", "a")), ("c", ("a", "b"))] * 2),
        ("previous", "cached", [("a", ()), ("b", ("a",)), ("c", ("b",)), ("a", ("c",)), ("b", ("a",)), ("c", ("b",))]),
        (
            "others",
            "cached",
            [("a", ()), ("b", ("a",)), ("c", ("a", "b")), ("a", ("b", "c")), ("b", ("c", "a")), ("c", ("a", "b"))],
        ),
    ],
)
def test_turns_are_guided_by(guides, recipe, expected):
    modalities = sorted({modality for modality, _ in expected})
    model, optimizer = build(*modalities, guides=guides)
    assert guides_used(optimizer, model, 2, modalities, recipe) == expected


@pytest.mark.parametrize("guides", ["previous", "others"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_guide_lives_one_round_and_no_longer(count, guides):
    """Recorded once, in the first turn of the first round, for every modality."""
    modalities = "abc"[:count]
    model, optimizer = build(*modalities, guides=guides)
    batches = reference.make_batches(3, *modalities)
    position = 0
    for batch in batches:
        for turn in optimizer.turns(*modalities):
            evidence = backward(model, batch, turn.modality)
            if position == 0:
                for modality in modalities:
                    optimizer.guide(modality, *evidence)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.stats.guides == (turn.guides if position < count else ())
            position += 1


def test_a_newer_guide_replaces_the_older_and_lives_a_round_of_its_own(batch):
    model, optimizer = build(fraction=1.0)
    older, newer = (reference.make_batches(1, seed=seed)[0] for seed in (1, 2))
    for turn in optimizer.turns("image", "table"):
        if turn.modality == "image":
            optimizer.guide("image", model.encoders["image"](older[0]["image"]), older[1])
        else:
            optimizer.guide("image", *backward(model, newer))
            expected = reference.flat(parameter.grad for parameter in model.head.parameters())
            optimizer.step()
            assert float(optimizer.stats.guide_norm["image"]) == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    # Replaced in the last turn: alive in the next, had it been the older one it would not be.
    for _ in optimizer.turns("table", "image"):
        optimizer.step()
        assert optimizer.stats.guides == ("image",)
        break


def test_features_are_detached_and_the_head_is_run_again_with_its_current_weights(batch):
    model, optimizer = build(fraction=1.0)
    features = model.encoders["image"](batch[0]["image"])
    optimizer.guide("table", features, batch[1])
    with torch.no_grad():
        model.head.weight.mul_(-2)
    backward(model, batch)
    current = reference.flat(parameter.grad for parameter in model.head.parameters())
    optimizer.step()
    assert float(optimizer.stats.guide_norm["table"]) == pytest.approx(np.linalg.norm(current), rel=1e-5)
    assert not optimizer.state_dict()["gaal_surgery"]["guides"]
    features.sum().backward()


def test_neither_step_nor_zero_grad_ends_a_guide_within_a_turn(batch):
    model, optimizer = build()
    for turn in optimizer.turns("image", "table"):
        optimizer.guide(turn.guides[0], *backward(model, batch, turn.modality))
        for _ in range(2):
            optimizer.step()
            assert optimizer.stats.guides == turn.guides
            optimizer.zero_grad()
            backward(model, batch, turn.modality)


def test_outside_turns_every_guide_serves_one_step(batch):
    model, optimizer = build()
    evidence = backward(model, batch)
    optimizer.guide("image", *evidence)
    optimizer.zero_grad()
    optimizer.guide("table", *evidence)
    backward(model, batch)
    optimizer.step()
    assert optimizer.stats.guides == ("image", "table")
    assert optimizer.stats.modality is None
    optimizer.step()
    assert optimizer.stats.guides == ()


def test_an_empty_batch_is_no_guide_and_takes_the_place_of_an_older_one(batch):
    model, optimizer = build()
    features, target = backward(model, batch)
    optimizer.guide("table", features, target)
    optimizer.guide("table", features[:0], target[:0])
    optimizer.step()
    assert optimizer.stats.guides == ()


def test_a_turn_names_the_modality_and_its_guides():
    _, optimizer = build(guides="others")
    turns = list(optimizer.turns("image", "table", "audio"))
    assert turns[1] == gaal_surgery.Turn("table", ("audio", "image"))


# Numbers that are not finite.


@ALIGN
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_guide_that_is_not_finite_is_ignored_and_counted(value, align, batch):
    model, optimizer = build(align=align, guides="others")
    twin, bare = twin_of(model, optimizer)
    features, target = backward(model, batch)
    poisoned = features.clone()
    poisoned[3, 1] = value
    optimizer.guide("table", poisoned, target)
    optimizer.step()
    backward(twin, batch)
    bare.step()
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))
    assert bool(optimizer.stats.ignored["table"])
    assert not bool(optimizer.stats.intervened["table"])


@ALIGN
def test_a_guide_that_is_not_finite_does_not_silence_the_others(align, batch):
    model, optimizer = build(align=align, guides="others", inner=partial(torch.optim.SGD, lr=0.1), **OPPOSED)
    before = copy.deepcopy(model.head.state_dict())
    features, target = backward(model, batch)
    optimizer.guide("audio", torch.full_like(features, torch.nan), target)
    optimizer.guide("table", features, target)
    optimizer.step()
    torch.testing.assert_close(model.head.state_dict(), before, rtol=0, atol=1e-6)
    assert {name: bool(ignored) for name, ignored in optimizer.stats.ignored.items()} == {"audio": True, "table": False}


@ALIGN
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_passes_as_in_the_inner_optimizer(value, align, batch):
    model, optimizer = build(align=align, rule=HalfSpace(margin=1.0))
    twin, bare = twin_of(model, optimizer)
    optimizer.guide("table", *backward(model, batch))
    backward(twin, batch)
    for one in (model, twin):
        one.head.weight.grad[0, 0] = value
    optimizer.step()
    bare.step()
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


# Statistics.


def test_statistics_are_empty_before_the_first_step_and_after_a_step_without_guides(batch):
    model, optimizer = build()

    def assert_empty():
        stats = optimizer.stats
        mappings = ("cosine_before", "cosine_after", "coefficient", "guide_norm", "intervened", "ignored")
        assert all(getattr(stats, name) == {} for name in mappings)
        assert stats.gradient_norm is None
        assert stats.modality is None

    assert_empty()
    optimizer.guide("table", *backward(model, batch))
    optimizer.step()
    assert optimizer.stats.guides == ("table",)
    optimizer.step()
    assert_empty()


def test_statistics_describe_the_step(batch):
    model, optimizer = build(**OPPOSED)
    norm = None
    for turn in optimizer.turns("image", "table"):
        optimizer.guide(turn.guides[0], *backward(model, batch, turn.modality))
        norm = np.linalg.norm(reference.flat(parameter.grad for parameter in model.head.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    stats = optimizer.stats
    assert (stats.modality, stats.guides) == ("table", ("image",))
    measured = {
        name: float(getattr(stats, name)["image"])
        for name in ("cosine_before", "cosine_after", "coefficient", "guide_norm", "intervened", "ignored")
    }
    assert measured == pytest.approx(
        {
            "cosine_before": -1,
            "cosine_after": measured["cosine_after"],
            "coefficient": 1,
            "guide_norm": norm,
            "intervened": 1,
            "ignored": 0,
        },
        rel=1e-5,
    )
    assert float(stats.gradient_norm) == pytest.approx(norm, rel=1e-5)
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in stats.coefficient.values())


# The samples that a step hurts.


def used_twice():
    return nn.Sequential(*[nn.Linear(reference.HIDDEN, reference.HIDDEN)] * 2, nn.Tanh(), nn.Linear(4, 3))


def with_frozen_layer():
    head = nn.Sequential(nn.Linear(reference.HIDDEN, 6), nn.Tanh(), nn.Linear(6, 3))
    head[0].requires_grad_(False)
    return head


def normalised_with_dropout():
    return nn.Sequential(nn.BatchNorm1d(reference.HIDDEN), nn.Dropout(0.5), nn.Linear(reference.HIDDEN, 3))


HURT_HEADS = pytest.mark.parametrize("head", [None, used_twice, with_frozen_layer, normalised_with_dropout])


def products_by_hand(head, features, target, direction):
    """Inner products of the selected samples' gradients with a vector of the parameters that have a gradient."""
    chosen = reference.most_uncertain(head.eval(), features, 0.5)
    each = gaal_surgery.per_sample_gradients(head, features[chosen], target[chosen], F.cross_entropy)
    named = dict(head.named_parameters())
    moving = [gradient.flatten(1) for name, gradient in each.items() if named[name].grad is not None]
    return (torch.cat(moving, dim=1) @ direction).numpy()


def vector(tensors):
    return torch.cat([tensor.detach().clone().flatten() for tensor in tensors])


@pytest.mark.parametrize("without_gradient", [False, True])
@pytest.mark.parametrize("guides", ["previous", "others"])
@HURT_HEADS
@ALIGN
def test_hurt_samples_are_those_of_the_samples_gradients(head, align, guides, without_gradient):
    """The cached features guide turns of this round and the next; gradients add up over two micro-batches."""
    names = ("a", "b", "c")
    model, optimizer = build(*names, head=head, dtype=torch.float64, align=align, guides=guides, measure_hurt=True)
    seen = set()
    features = {}
    for batch in reference.make_batches(3, *names, size=12, dtype=torch.float64):
        for turn in optimizer.turns(*names):
            for rows in torch.arange(12).chunk(2):
                half = {name: inputs[rows] for name, inputs in batch[0].items()}, batch[1][rows]
                backward(model, half, turn.modality)
            first = next(p for p in model.head.parameters() if p.requires_grad)
            first.grad = None if without_gradient else first.grad
            moving = [p for p in model.head.parameters() if p.grad is not None]
            before, weights = copy.deepcopy(model.head), vector(moving)
            for own, copied in zip(model.head.parameters(), before.parameters(), strict=True):
                copied.grad = None if own.grad is None else own.grad.clone()
            twin, bare = twin_of(model, optimizer)
            for own, copied in zip(model.parameters(), twin.parameters(), strict=True):
                copied.grad = None if own.grad is None else own.grad.clone()
            gradient = vector(p.grad for p in moving)
            optimizer.step()
            bare.step()
            directions = gradient, vector(p.grad for p in moving)
            if align == "update":
                plain = vector(p for p in twin.head.parameters() if p.grad is not None)
                directions = weights - plain, weights - vector(moving)
            stats = optimizer.stats
            assert tuple(stats.hurt_before) == tuple(stats.hurt_after) == stats.guides
            for guide in stats.guides:
                for shares, direction in zip((stats.hurt_before, stats.hurt_after), directions, strict=True):
                    products = products_by_hand(before, *features[guide], direction)
                    # Two guides may leave nothing of a gradient but rounding.
                    assert shares[guide].item() == pytest.approx((products < -1e-12).mean())
                    seen.add(shares[guide].item())
            inputs = batch[0][turn.modality]
            features[turn.modality] = model.encoders[turn.modality](inputs).detach(), batch[1]
            optimizer.guide(turn.modality, *features[turn.modality])
            optimizer.zero_grad()
    assert len(seen) > 2


@ALIGN
def test_after_surgery_the_mean_sample_is_not_hurt_and_single_ones_may_be(align):
    model, optimizer = build(dtype=torch.float64, align=align, measure_hurt=True, inner=ADAMW)
    objected, shares = 0, []
    for inputs, target in reference.make_batches(10, size=16, dtype=torch.float64):
        features = model.encoders["table"](inputs["table"]).detach()
        before, weights = copy.deepcopy(model.head), vector(model.head.parameters())
        backward(model, (inputs, target))
        target = (target + 1) % 3  # the guide disagrees
        optimizer.guide("table", features, target)
        optimizer.step()
        for own, copied in zip(model.head.parameters(), before.parameters(), strict=True):
            copied.grad = own.grad
        applied = vector(p.grad for p in model.head.parameters())
        applied = applied if align == "gradient" else weights - vector(model.head.parameters())
        products = products_by_hand(before, features, target, applied)
        assert products.mean() >= -1e-12
        assert optimizer.stats.hurt_after["table"].item() == (products < 0).mean()
        objected += bool(optimizer.stats.intervened["table"])
        shares.append(optimizer.stats.hurt_after["table"].item())
        optimizer.zero_grad()
    assert objected > 2
    assert 0 < max(shares) < 1


@ALIGN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_selected_sample_is_hurt_before_surgery_alone(dtype, align):
    """Surgery brings its product to 0; to which side of 0 it is rounded does not count."""
    model, optimizer = build(dtype=dtype, align=align, measure_hurt=True, fraction=1e-9)
    monitor = gaal_surgery.ConflictMonitor()
    for batch in reference.make_batches(20, dtype=dtype):
        for _, stats in reference.take_turns(optimizer, model, batch):
            monitor.update(stats)
    history = monitor.history()
    assert history["hurt_before"] == history["intervened"]
    assert 0 < sum(history["hurt_before"]) < len(history["step"])
    assert not any(history["hurt_after"])


@pytest.mark.parametrize("inner", [SGD, ADAMW], ids=["sgd_momentum", "adamw"])
@HURT_HEADS
@ALIGN
def test_measuring_hurt_samples_changes_nothing(head, inner, align):
    runs = []
    for measure_hurt in (False, True):
        model, optimizer = build("a", "b", "c", head=head, inner=inner, align=align, measure_hurt=measure_hurt)
        torch.manual_seed(0)  # of dropout
        for batch in reference.make_batches(4, "a", "b", "c"):
            for _, stats in reference.take_turns(optimizer, model, batch):
                assert bool(stats.hurt_before) == bool(stats.hurt_after) == measure_hurt
        assert all(module.training for module in model.modules())
        runs.append((frozen_copy(model, optimizer), torch.get_rng_state(), stats.gramian, stats.weights))
    assert_identical(*runs)
