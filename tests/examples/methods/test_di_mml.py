"""DI-MML: dimensions lent between modalities, and a head on frozen encoders."""

from __future__ import annotations

import copy
import dataclasses
import math

import pandas as pd
import pytest
import torch
from tabular_image.data.module import TabularImageData
from tabular_image.methods.di_mml import DIMML, accuracies_alone, confidence_weights, contrast
from toy import assert_resumes, batches, build, equal_states, fit, samples


def nearest_mean_accuracies(features, target):
    """By all distances."""
    means = torch.stack([features[target == kind].mean(0) for kind in target.unique()])
    nearest = (features[:, None] - means).abs().argmin(1)
    return (target.unique()[nearest] == target[:, None]).double().mean(0)


def test_each_dimension_classifies_by_its_nearest_class_mean():
    torch.manual_seed(0)
    target = torch.tensor([0, 1, 4, 4, 5, 0, 1, 5] * 10)  # classes 2 and 3 have no rows
    features = torch.randn(80, 150) + target[:, None] * torch.linspace(0, 1, 150)
    features[:, 7] = 0  # a dead dimension
    accuracies = accuracies_alone(features, target)
    assert torch.equal(accuracies, nearest_mean_accuracies(features, target))
    assert accuracies[-1] > accuracies[0]
    assert accuracies[7] == 0.25
    assert accuracies_alone(features[:3], torch.ones(3, dtype=torch.long)).tolist() == [1] * 150


def test_the_contrast_moves_each_modality_in_the_dimensions_of_the_other_alone():
    torch.manual_seed(0)
    method = build("di_mml")
    method.image_only[:40] = True
    method.table_only[100:130] = True
    image, table = torch.randn(8, 256, requires_grad=True), torch.randn(8, 256, requires_grad=True)
    method.contrast(image, table).backward()
    assert torch.equal(image.grad.abs().sum(0) > 0, method.table_only)
    assert torch.equal(table.grad.abs().sum(0) > 0, method.image_only)


def test_the_contrast_is_its_formula_and_does_not_overflow():
    torch.manual_seed(0)
    first, second, dimensions = torch.randn(6, 10), torch.randn(6, 10), torch.arange(10) % 3 == 0
    scores = (first[:, dimensions] @ second[:, dimensions].T / 2).exp()
    torch.testing.assert_close(
        contrast(first, second, dimensions, 2.0), -(scores.diagonal() / scores.sum(1)).log().mean()
    )
    first, second = 2 * torch.randn(2, 8, 2048)
    assert contrast(first, second, torch.ones(2048, dtype=torch.bool), 1.0).isfinite()


def test_without_dimensions_the_contrast_is_a_constant():
    image, table = torch.randn(8, 256, requires_grad=True), torch.randn(8, 256, requires_grad=True)
    loss = build("di_mml").contrast(image, table)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(8))
    assert not image.grad.any()
    assert not table.grad.any()


class Watched(DIMML):
    """Keeps what it was when it looked for the dimensions."""

    found = 0

    def find_dimensions(self):
        before = copy.deepcopy(self.encoders.state_dict())
        super().find_dimensions()
        assert equal_states(before, self.encoders.state_dict())
        assert all(module.training for module in self.encoders.modules())
        self.epoch, self.then, self.found = self.trainer.current_epoch, before, self.found + 1


def test_dimensions_are_found_once_and_are_good_in_one_modality_alone():
    method = fit(build(Watched, settings={"encoder_epochs": 4, "contrast_start": 0.5}))
    assert (method.found, method.epoch) == (1, 2)
    assert not (method.image_only & method.table_only).any()
    assert method.image_only.any()
    assert method.table_only.any()
    method.encoders.load_state_dict(method.then)
    method.eval()
    with torch.no_grad():
        features = {name: torch.cat([method.features(batch)[name] for batch in batches()]) for name in method.encoders}
    target = torch.cat([batch["target"] for batch in batches()])
    accuracies = {name: nearest_mean_accuracies(values, target) for name, values in features.items()}
    image, table = (accuracies[name] > accuracies[name].mean() for name in ("image", "table"))
    assert torch.equal(method.image_only, image & ~table)
    assert torch.equal(method.table_only, table & ~image)


def test_the_contrast_acts_from_its_epoch_on():
    def encoders(start, epochs):
        settings = {"encoder_epochs": 4, "contrast_start": start}
        return fit(build("di_mml", settings=settings), epochs=epochs).encoders.state_dict()

    assert equal_states(encoders(0.5, 2), encoders(1.0, 2))
    assert not equal_states(encoders(0.5, 3), encoders(1.0, 3))
    never = fit(build("di_mml", settings={"contrast_start": 1.0}))
    assert not never.image_only.any()
    assert not never.table_only.any()


def test_fusion_moves_its_head_alone():
    before = fit(build("di_mml", epochs=2, weight_decay=0.1), epochs=2).state_dict()
    after = fit(build("di_mml", epochs=2, weight_decay=0.1)).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved - {name for name in moved if name.startswith("calibrated.")} == {
        "joint_head.weight",
        "joint_head.bias",
    }


def test_weights_of_the_predictions_add_up_to_one_and_favour_the_sure():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 4)
    weights = confidence_weights(logits, 1.0)
    torch.testing.assert_close(weights.sum(0), torch.ones(5))
    assert torch.equal(weights.argmax(0), logits.softmax(-1).amax(-1).argmax(0))
    assert (confidence_weights(logits, 0.1).amax(0) > weights.amax(0)).all()


def test_fused_logits_are_the_weighted_sum():
    method = fit(build("di_mml", settings={"confidence_temperature": 0.5})).eval()
    batch = batches()[0]
    features = method.features(batch)
    logits = [method.heads[name](features[name]) for name in ("image", "table")]
    logits.append(method.joint_head(torch.cat([features["image"], features["table"]], dim=1)))
    powers = [(2 * values.softmax(1).amax(1, keepdim=True)).exp() for values in logits]
    expected = sum(power * values for power, values in zip(powers, logits, strict=True)) / sum(powers)
    torch.testing.assert_close(method(batch)["fused"], expected)


def test_two_classes_are_enough():
    two = dataclasses.replace(samples(), target=pd.Series(["ant", "bee"] * 36))
    data = TabularImageData(two, batch_size=16, workers=0)
    method = fit(build("di_mml", data), data).eval()
    assert method(batches(data)[0])["fused"].shape == (16, 2)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_training_is_an_uninterrupted_one(stop, tmp_path):
    assert_resumes(
        lambda: build("di_mml", settings={"encoder_epochs": 3, "contrast_start": 0.34}, epochs=2), stop, tmp_path
    )
