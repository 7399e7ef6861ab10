"""Classes, labels and numbers: what the methods that are not for classes alone make of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tabular_image.data.targets import Target
from tabular_image.errors import InputError
from tabular_image.methods import METHODS
from tabular_image.options import Options
from tabular_image.run import refuse_other_task
from tabular_image.tasks import TASKS, build_task
from toy import batches, build, fit, samples_of, toy_data

from gaal_surgery.surgery import RULES

ABLE = [name for name, method in METHODS.items() if len(method.tasks) == len(TASKS)]
OUTPUTS = {"classification": 3, "multilabel": 3, "regression": 2}
SETTINGS = [
    {"rule": "halfspace", "margin": 0.5, "relative": True},
    *({"rule": rule} for rule in [*RULES, "none"]),
    {"align": "update"},
    {"guidance": "cached"},
    {"max_norm": 1.0},
]


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.mark.parametrize(
    ("name", "fusion"),
    [*((name, "calibrated") for name in ABLE), *(("gaal", fusion) for fusion in ("mean", "product", "auto"))],
)
def test_every_able_method_learns_every_task(name, fusion, task):
    data = toy_data(task=task)
    untrained = build(name, data=data, fusion=fusion, epochs=15)
    before = main_loss(untrained, data)
    trained = fit(untrained, data=data)
    assert main_loss(trained, data) < before
    predictions = trained.eval().predictions(trained(batches(data)[0]))
    for outputs in predictions.values():
        assert outputs.shape == (16, OUTPUTS[task])
        assert outputs.isfinite().all()
        assert trained.task.measure(outputs, batches(data)[0]["target"])[trained.task.figure] is not None


@torch.no_grad()
def main_loss(method, data):
    method.eval()  # whose running statistics are those of the training
    losses = [
        method.task.loss(next(iter(method.predictions(method(batch)).values())), batch["target"])
        for batch in batches(data)
    ]
    method.train()
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_gaal_is_the_same_with_every_rule_and_alignment(kind, settings):
    data = toy_data(task=kind)
    method = fit(build("gaal", data=data, settings=settings, epochs=2), data=data)
    table, image = method.monitor.summary()
    assert table["steps"] + image["steps"] == 12 - (settings.get("guidance") == "cached")  # the first turn has no guide
    assert -1 <= table["cosine_before"] <= 1


def test_methods_that_are_for_classes_are_refused_by_name(task):
    for name, method in METHODS.items():
        options, samples = Options(method=name), samples_of(task)
        if task in method.tasks:
            refuse_other_task(options, samples)
        else:
            with pytest.raises(InputError, match=f"--method {name} is for classification, and the task is {task}; use"):
                refuse_other_task(options, samples)
    assert "gaal" in ABLE
    assert "ogm_ge" not in ABLE


def test_an_epoch_is_selected_by_what_the_task_has():
    with pytest.raises(
        InputError, match="--select accuracy is for classes, and the task is regression; leave out --select"
    ):
        refuse_other_task(Options(select="accuracy"), samples_of("regression"))
    with pytest.raises(InputError, match="--class_weights balanced is for classes, and the task is multilabel"):
        build("gaal", data=toy_data(task="multilabel"), class_weights="balanced")


def unequal(task=None):
    return build_task(Target("classification", ("a", "b", "c"), (80, 15, 5), 100), task or "balanced")


def test_balanced_weights_let_every_class_weigh_alike():
    balanced, target = unequal(), torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    logits = torch.randn(100, 3)
    each = F.cross_entropy(logits, target, reduction="none")
    by_class = torch.stack([each[target == place].mean() for place in range(3)])
    torch.testing.assert_close(balanced.loss(logits, target), by_class.mean())
    assert torch.equal(unequal("none").loss(logits, target), F.cross_entropy(logits, target))
    # Experts of a balanced training have no prior to divide by.
    torch.testing.assert_close(balanced.product([logits]), logits.log_softmax(1))
    assert torch.equal(balanced.log_prior, torch.full((3,), 1 / 3).log())


def test_balanced_weights_reach_the_guides_and_the_calibrated_fusion():
    method = build("gaal", data=toy_data(), class_weights="balanced", fusion="calibrated")
    optimizer = method.build_optimizer(method.trainable())
    assert optimizer.loss_fn == method.task.loss
    balanced, plain = unequal(), unequal("none")
    target = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    voices = {"image": torch.zeros(100, 3)}  # an expert that knows nothing: what is left are the biases
    fitted = [task.calibrated(["image"]) for task in (balanced, plain)]
    for task, fusion in zip((balanced, plain), fitted, strict=True):
        task.fit(fusion, voices, target)
    even, uneven = (fusion(voices)[0].softmax(dim=0).detach() for fusion in fitted)
    torch.testing.assert_close(even, torch.full((3,), 1 / 3), atol=1e-3, rtol=0)
    assert uneven[0] > 0.7


@pytest.mark.parametrize("select", ["accuracy", "balanced_accuracy", "loss"])
def test_the_tested_epoch_is_best_in_what_is_selected_by(select):
    method = build("gaal", data=toy_data(), select=select)
    better = {"accuracy": 0.9, "balanced_accuracy": 0.6, "loss": torch.tensor(0.7)}
    worse = copy.deepcopy(better)
    worse[select] = torch.tensor(0.8) if select == "loss" else better[select] - 0.1
    for name in {"accuracy", "balanced_accuracy"} - {select}:
        worse[name] += 0.05  # and yet
    if select != "loss":
        worse["loss"] -= 0.5
    scores = [method._selection(figures, figures["loss"], 10) for figures in (better, worse)]
    assert scores[0] > scores[1]
    if select != "loss":  # between equals the lower loss
        assert method._selection(better, torch.tensor(0.1), 10) > scores[0]


def test_a_log_variance_stays_within_bounds_and_keeps_its_gradient():
    task = build_task(Target("regression", ("price",), (10,), 10))
    head = task.head(1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [1.0]]))
        head.bias.zero_()
    inputs = torch.tensor([[-1e3], [-20.0], [0.0], [1.5], [20.0], [1e3]])
    mean, log_variance = head(inputs).unbind(dim=1)
    assert torch.equal(mean, inputs[:, 0])
    assert ((log_variance >= -10.001) & (log_variance <= 2.001)).all()
    assert abs(log_variance[2]) < 0.2
    log_variance[[1, 4]].sum().backward()
    assert head.weight.grad[1].abs() > 0


def test_an_interval_holds_the_number_as_often_as_it_says():
    task = build_task(Target("regression", ("price",), (10,), 10, mean=100.0, deviation=20.0))
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(20_000, generator=generator), torch.randn(20_000, generator=generator).clamp(-2, 2)
    target = mean + (log_variance / 2).exp() * torch.randn(20_000, generator=generator)
    outputs = torch.stack([mean, log_variance], dim=1)
    assert task.measure(outputs, target)["coverage"] == pytest.approx(0.9, abs=0.01)
    ends, truth = task.details(outputs), task.truth(target)
    assert ((truth >= ends["low"]) & (truth <= ends["high"])).mean() == pytest.approx(0.9, abs=0.01)
    residuals = truth - task.answers(outputs)
    assert task.measure(outputs, target)["rmse"] == pytest.approx(np.sqrt((residuals**2).mean()), rel=1e-4)


def test_a_logarithm_is_undone_in_answers_and_intervals():
    task = build_task(Target("regression", ("price",), (10,), 10, mean=12.0, deviation=0.5, log=True))
    outputs = torch.tensor([[0.0, 0.0]])
    assert task.answers(outputs)[0] == pytest.approx(np.exp(12), rel=1e-6)
    ends = task.details(outputs).loc[0]
    assert np.log(ends["high"] / ends["low"]) == pytest.approx(2 * 1.6449 * 0.5, rel=1e-3)
