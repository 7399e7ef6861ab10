"""What all registered methods have in common."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import get_args

import pytest
import torch
from tabular_image.data import DATASETS
from tabular_image.data.module import TabularImageData
from tabular_image.methods import METHODS, SETTINGS
from tabular_image.methods.settings import RuleName
from toy import CLASSES, batches, build, equal_states, fit, samples, toy_data

from gaal_surgery import fuse_logits
from gaal_surgery.surgery import RULES

IMAGE_ALONE_AT_TEST_TIME = [name for name, entry in METHODS.entries.items() if entry.predictions == ("image",)]


def earlier_stages(name, epochs):
    """Settings that give each earlier stage of a method so many epochs."""
    own = {field.name for field in fields(SETTINGS[name])}
    return dict.fromkeys(own & {*SETTINGS[name].stages, "encoder_epochs"}, epochs)


@pytest.fixture(scope="module", params=METHODS)
def trained(request):
    """A method after all its stages; tests only look at it."""
    return fit(build(request.param, epochs=2, method=request.param)).eval()


def test_all_stages_train_and_all_predictions_are_finite(trained):
    predictions = trained.predictions(trained(batches()[0]))
    assert tuple(predictions) == METHODS.entries[trained.options.method].predictions
    for logits in predictions.values():
        assert logits.shape == (16, CLASSES)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_fixed_features_of_the_pictures(name):
    data = TabularImageData(samples(), batch_size=16, workers=0, features=True, image_size=16)
    method = fit(build(name, data=data, settings=earlier_stages(name, 1), image_encoder="features"), data=data).eval()
    batch = batches(data)[0]
    assert batch["image"].shape == (16, data.channels, 1, 1)
    assert all(logits.isfinite().all() for logits in method.predictions(method(batch)).values())


@pytest.mark.parametrize("trained", IMAGE_ALONE_AT_TEST_TIME, indirect=True)
def test_methods_that_miss_the_table_never_look_at_it(trained):
    batch = batches()[0]
    logits = trained(batch)
    assert list(trained.predictions(logits)) == ["image"]
    shuffled = batch | {"table": batch["table"].flip(0)}
    zeroed = batch | {"table": torch.zeros_like(batch["table"])}
    absent = {"image": batch["image"]}
    for other in (shuffled, zeroed, absent):
        assert torch.equal(trained(other)["image"], logits["image"])


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_starts_all_encoders_alike(name):
    method, reference = build(name), build("gaal")
    for modality, encoder in method.encoders.items():
        assert equal_states(encoder.state_dict(), reference.encoders[modality].state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_registered_with_its_own_options(name):
    assert METHODS[name].Settings is SETTINGS[name]


@pytest.mark.parametrize(
    ("registry", "name"),
    [pytest.param(registry, name, id=name) for registry in (METHODS, DATASETS) for name in registry],
)
def test_a_module_begins_with_its_title_and_a_summary(registry, name):
    title, summary = registry.title(name), registry.summary(name)
    assert sys.modules[registry[name].__module__].__doc__.splitlines()[0] == f"{title}: {summary}."
    assert title
    assert summary


def test_titles_are_unique():
    titles = [registry.title(name) for registry in (METHODS, DATASETS) for name in registry]
    assert len(set(titles)) == len(titles)


def test_every_rule_of_the_library_can_be_asked_for():
    assert set(get_args(RuleName)) == RULES.keys(), "settings.RuleName names the keys of gaal_surgery.surgery.RULES"
    for name, rule in RULES.items():
        assert type(build("gaal", settings={"rule": name}).rule()) is rule


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("schedule", "rate"), [("none", 1.0), ("step", 0.01), ("cosine", 0.5)])
def test_schedules_step_once_an_epoch(name, schedule, rate):
    method = build(name, settings=earlier_stages(name, 3), schedule=schedule, step_size=1, epochs=4, learning_rate=1e-3)
    stages = method.stages()
    before = sum(stage.epochs for stage in stages[:-1])
    assert before == 3 * (len(stages) - 1)
    fit(method, epochs=before + 2)
    assert stages[-1].epochs == 4
    assert method.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * rate)


def test_predictions_put_the_selecting_one_first():
    logits = {name: torch.randn(4, CLASSES) for name in ("table", "image")}
    mean = build("gaal").predictions(logits)
    assert list(mean) == ["fused", "image", "table"]
    assert torch.equal(mean["fused"], fuse_logits(logits))
    counts = toy_data().class_counts
    prior = (counts / counts.sum()).log()
    product = build("gaal", fusion="product").predictions(logits)["fused"]
    torch.testing.assert_close(product, fuse_logits(logits, log_prior=prior))
    own = {"fused": torch.randn(4, CLASSES), **logits}
    assert build("concatenation", fusion="product").predictions(own)["fused"] is own["fused"]
    assert set(build("concatenation").fusions(own)) == {"mean", "product", "calibrated"}
    assert list(build("image").predictions({"image": logits["image"]})) == ["image"]
    assert build("image").fusions({"image": logits["image"]}) == {}


def test_validation_fits_the_calibrated_fusion():
    method = fit(build("gaal"))
    assert method.calibrated.bias.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in method.calibrated.parameters())
