"""Fresh guidance whose passes are shared: to the bit what running every encoder anew gives, at fewer passes."""

import copy
from collections import Counter

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import HIDDEN, WIDTH, assert_identical, frozen_copy
from torch import nn
from torch.utils.checkpoint import checkpoint
from wrapped import ADAMW, ALIGN, DEMANDING

from gaal_surgery import FreshFeatures, GradientAlignedAlternator

MODALITIES = ("table", "sound", "image")


class Checkpointed(nn.Sequential):
    """An encoder that recomputes its activations in the backward pass."""

    def forward(self, inputs):
        return checkpoint(super().forward, inputs, use_reentrant=False)


def normalised(kind=nn.Sequential):
    return kind(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, HIDDEN))


def build(count=2, encoder=normalised, **settings):
    model = reference.make_model(*MODALITIES[-count:], dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name in MODALITIES[-count:]:
            model.encoders[name] = encoder().double()
    inner = ADAMW(model.parameters())
    return model, GradientAlignedAlternator(inner, model.head, rule=DEMANDING, **settings)


def sharing(optimizer, model, batch):
    inputs, _ = batch
    features = FreshFeatures(optimizer, model.encoders, inputs)
    for turn in optimizer.turns(*inputs):
        yield turn, features[turn.modality], lambda guide: features[guide]


def running_anew(optimizer, model, batch):
    """What the recipe did before: the guide's encoder runs again in every turn, on copies of its buffers."""
    inputs, _ = batch

    @torch.no_grad()
    def idle(guide):
        return copy.deepcopy(model.encoders[guide])(inputs[guide])

    for turn in optimizer.turns(*inputs):
        yield turn, model.encoders[turn.modality](inputs[turn.modality]), idle


def train(optimizer, model, batches, way):
    objected = []
    for batch in batches:
        for turn, features, guide_features in way(optimizer, model, batch):
            F.cross_entropy(model.head(features), batch[1]).backward()
            for guide in turn.guides:
                optimizer.guide(guide, guide_features(guide), batch[1])
            optimizer.step()
            optimizer.zero_grad()
            objected += [bool(flag) for flag in optimizer.stats.intervened.values()]
    return objected


ENCODERS = {
    "batch_norm": normalised,
    "checkpointed": lambda: normalised(Checkpointed),
    "compiled": lambda: torch.compile(normalised(), backend="eager"),
}


@ALIGN
@pytest.mark.parametrize("guides", ["previous", "others"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_training_is_that_of_running_every_encoder_anew(encoder, count, guides, align):
    batches = reference.make_batches(20, *MODALITIES[-count:], dtype=torch.float64)
    ends = []
    for way in (sharing, running_anew):
        model, optimizer = build(count, encoder, guides=guides, align=align)
        objected = train(optimizer, model, batches, way)
        assert any(objected)
        ends.append((objected, frozen_copy(model, optimizer)))
    assert_identical(*ends)


@pytest.mark.parametrize("guides", ["previous", "others"])
def test_the_encoder_of_the_last_turn_runs_once_a_round(guides):
    model, optimizer = build(3, guides=guides)
    calls = Counter()
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: calls.update([name]))
    train(optimizer, model, reference.make_batches(5, *MODALITIES, dtype=torch.float64), sharing)
    assert calls == {"table": 10, "sound": 10, "image": 5}


def test_batch_normalisation_counts_a_batch_once():
    model, optimizer = build(3, guides="others")
    train(optimizer, model, reference.make_batches(5, *MODALITIES, dtype=torch.float64), sharing)
    assert [int(encoder[1].num_batches_tracked) for encoder in model.encoders.values()] == [5, 5, 5]


def test_a_pass_has_a_graph_until_its_turn_is_over():
    model, optimizer = build()
    inputs, target = reference.make_batches(1, "sound", "image", dtype=torch.float64)[0]
    features = FreshFeatures(optimizer, model.encoders, inputs)
    first = features["sound"]  # before the round
    for turn in optimizer.turns("sound", "image"):
        assert features[turn.modality].requires_grad
        assert (features["sound"] is first) == (turn.modality == "sound")
        F.cross_entropy(model.head(features[turn.modality]), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert features["sound"].requires_grad == (turn.modality == "sound")
    assert not features["image"].requires_grad
    assert_identical(features["image"], model.encoders["image"](inputs["image"]).detach())
    assert features["image"] is features["image"]  # nothing has moved since
    again = FreshFeatures(optimizer, model.encoders, inputs)
    assert again["image"].requires_grad


def test_dropout_draws_one_mask_for_the_guide_and_the_turn():
    model, optimizer = build(encoder=lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.5)))
    inputs, _ = reference.make_batches(1, "sound", "image", dtype=torch.float64)[0]
    features = FreshFeatures(optimizer, model.encoders, inputs)
    seen = [features["image"] for _ in optimizer.turns("sound", "image")]
    assert seen[0] is seen[1]


def test_any_callables_give_features():
    model, optimizer = build()
    inputs, target = reference.make_batches(1, "sound", "image", dtype=torch.float64)[0]
    encoders = {name: lambda x, its=encoder: its(x) for name, encoder in model.encoders.items()}
    features = FreshFeatures(optimizer, encoders, inputs)
    for turn in optimizer.turns("sound", "image"):
        F.cross_entropy(model.head(features[turn.modality]), target).backward()
        optimizer.step()
    assert not features["sound"].requires_grad
    with pytest.raises(KeyError, match="smell"):
        features["smell"]


def test_under_autocast_and_scaling_a_skipped_step_loses_nothing():
    """An overflow skips a step: the encoder has not moved, and the guide of the next turn is right all the same."""
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for inputs, target in reference.make_batches(30, "sound", "image", dtype=torch.float32):
        features = FreshFeatures(optimizer, model.float().encoders, inputs)
        for turn in optimizer.turns("sound", "image"):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model.head(features[turn.modality]), target)
                for guide in turn.guides:
                    optimizer.guide(guide, features[guide], target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        expected = model.encoders["sound"](inputs["sound"])
        torch.testing.assert_close(features["sound"].float(), expected, rtol=0.01, atol=0.01)
    assert scaler.get_scale() < 2.0**40
