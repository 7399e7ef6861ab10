"""The joint turn: what it moves, who guides it, and what is predicted where a modality is missing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tabular_image.errors import InputError
from toy import CLASSES, batches, build, equal_states, fit

from gaal_surgery import fuse_logits

VOICES = ("image", "table", "joint")
SURGERY = [{"head": "shared", **settings} for settings in ({"rule": "none"}, {}, {"guided": True})]


def joint(**settings):
    return build("gaal_joint", settings={"rule": "none", **settings})


@pytest.mark.parametrize("rule", ["none", "halfspace"])
def test_a_joint_turn_with_its_own_head_leaves_image_and_table_as_they_are_without_it(rule):
    method, plain = fit(joint(rule=rule, gradient="joint")), fit(build("alternating" if rule == "none" else "gaal"))
    assert equal_states(method.encoders.state_dict(), plain.encoders.state_dict())
    assert equal_states(method.head.state_dict(), plain.head.state_dict())
    assert not equal_states(method.joint_head.state_dict(), joint().joint_head.state_dict())


@pytest.mark.parametrize("changed", [{"head": "shared", "gradient": "joint"}, {}])
def test_a_joint_turn_steps_what_it_is_asked_to(changed):
    method, plain = fit(joint(**changed)), fit(build("alternating"))
    moved = "head" if "head" in changed else "encoders"
    assert not equal_states(getattr(method, moved).state_dict(), getattr(plain, moved).state_dict())


def test_surgery_and_guides_change_the_joint_turn():
    free, aligned, guided = (fit(build("gaal_joint", settings=settings)) for settings in SURGERY)
    assert not equal_states(free.head.state_dict(), aligned.head.state_dict())
    assert not equal_states(aligned.head.state_dict(), guided.head.state_dict())
    turns = {(turn["modality"], turn["guide"]) for turn in guided.monitor.summary()}
    assert turns == {(turn, guide) for turn in VOICES for guide in VOICES if turn != guide}
    assert {turn["modality"] for turn in aligned.monitor.summary()} == {"image", "table"}


def test_guides_need_the_shared_head():
    with pytest.raises(InputError, match=r"give --gaal_joint\.head shared or --gaal_joint\.guided false"):
        joint(guided=True)


@pytest.mark.parametrize("missing", ["image", "table"])
def test_the_prediction_of_one_modality_is_its_own(missing):
    method = fit(joint()).eval()
    batch = {name: values for name, values in batches()[0].items() if name != missing}
    logits = method(batch)
    left = "table" if missing == "image" else "image"
    assert torch.equal(logits[left], method(batches()[0])[left])
    assert list(method.predictions(logits)) == ["fused", left]
    assert torch.equal(method.predictions(logits)["fused"], logits[left])


def test_a_row_without_its_table_is_tested_by_its_image():
    method = fit(joint()).eval()
    batch = {name: values for name, values in batches()[0].items() if name != "table"}
    assert method.predict_step(batch)["logits"].keys() == {"image"}
    assert build("gaal").eval().predict_step(batch)["logits"].keys() == {"image", "table"}


def test_without_the_joint_voice_the_two_others_have_their_own_fit():
    method = build("gaal_joint", fusion="calibrated")
    torch.manual_seed(1)
    target = torch.arange(40) % CLASSES
    logits = {name: torch.randn(40, CLASSES) for name in VOICES}
    logits["joint"] += 5 * F.one_hot(target, CLASSES)
    logits["table"] += 2 * F.one_hot(target, CLASSES)
    method.fit_fusions(logits, target)
    two = {name: logits[name] for name in ("image", "table")}
    three = method.predictions(logits)
    assert list(three) == ["fused", "image", "table", "joint"]
    assert torch.equal(three["fused"], method.calibrated(logits))
    assert torch.equal(method.predictions(two)["fused"], method.pair(two))
    assert method.pair.weight[1] > method.calibrated.weight[1] > 0
    assert torch.equal(method.fusions(logits)["mean"], fuse_logits(logits))


@pytest.mark.parametrize(("rows", "strength", "chosen"), [(9, 4, "product"), (600, 1, "calibrated")])
def test_auto_takes_the_fusion_that_is_best_on_rows_it_was_not_fitted_to(rows, strength, chosen):
    method = build("gaal", fusion="auto")
    torch.manual_seed(0)
    target = torch.arange(rows) % CLASSES
    truth = strength * F.one_hot(target, CLASSES)
    # Logits of this strength add up to the posterior, which no fit on a few rows can better; noise needs a weight of 0.
    image = truth if chosen == "product" else 20 * torch.randn(rows, CLASSES)
    logits = {"image": image + torch.randn(rows, CLASSES), "table": truth + torch.randn(rows, CLASSES)}
    method.fit_fusions(logits, target)
    assert method.fusion == chosen
    assert torch.equal(method.predictions(logits)["fused"], method.fusions(logits)[chosen])
