"""KD: a table teacher, and an image student that is alone at test time."""

from __future__ import annotations

import copy
import dataclasses

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tabular_image.data.module import TabularImageData
from tabular_image.methods.kd import KD, distillation
from toy import assert_resumes, batches, build, equal_states, fit, samples, toy_data


def student(method):
    return method.encoders["image"].state_dict() | method.head.state_dict()


def teacher(method):
    return method.encoders["table"].state_dict() | method.teacher_head.state_dict()


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "weight_decay": 0.1}, {"schedule": "step"}])
def test_without_distillation_it_is_the_image_method_step_for_step(options):
    method, image = build("kd", settings={"weight": 0.0}, **options), build("image", **options)
    assert equal_states(student(method), student(image))
    before = copy.deepcopy(student(method))
    fit(method, epochs=2), fit(image, epochs=2)
    assert equal_states(student(method), student(image))
    assert not equal_states(student(method), before)


def test_the_teacher_learns_first_and_the_student_after_it():
    settings = {"teacher_epochs": 2}
    untrained = build("kd", settings=settings)
    taught = fit(build("kd", settings=settings), epochs=2)
    done = fit(build("kd", settings=settings))
    assert equal_states(student(taught), student(untrained))
    assert not equal_states(teacher(taught), teacher(untrained))
    assert equal_states(teacher(done), teacher(taught))
    assert not equal_states(student(done), student(taught))


def test_the_teacher_teaches_without_dropout_and_learns_with_it():
    class Watched(KD):
        def teach(self, batch):
            logits = super().teach(batch)
            training = {module.training for module in (self.encoders["table"], *self.teacher_head)}
            self.notes = [*getattr(self, "notes", []), (self.stage.name, training, logits.requires_grad)]
            return logits

    method = fit(build(Watched, settings={"teacher_epochs": 1}))
    assert set(map(str, method.notes)) == {str(("teacher", {True}, True)), str(("student", {False}, False))}
    table = torch.randn(4, 8)
    assert torch.equal(method.eval().teach({"table": table}), method.teach({"table": table}))


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_step_follows_the_weighted_loss(weight):
    settings = {"weight": weight, "temperature": 3.0, "teacher_epochs": 1}
    start = fit(build("kd", settings=settings, optimizer="sgd", momentum=0.0), epochs=1)
    method = fit(build("kd", settings=settings, optimizer="sgd", momentum=0.0))

    trained = [*start.encoders["image"].parameters(), *start.head.parameters()]
    optimizer = torch.optim.SGD([parameter.requires_grad_() for parameter in trained], lr=3e-3, weight_decay=1e-2)
    start.train()
    start.encoders["table"].eval(), start.teacher_head.eval()
    loader = toy_data().train_dataloader()
    loader.sampler.set_epoch(1)
    for batch in loader:
        logits = start.head(start.encoders["image"](batch["image"]))
        with torch.no_grad():
            wanted = (start.teacher_head(start.encoders["table"](batch["table"])) / 3).softmax(1)
        divergence = (wanted * (wanted.log() - (logits / 3).log_softmax(1))).sum(1).mean()
        loss = (1 - weight) * F.cross_entropy(logits, batch["target"]) + weight * 9 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in student(start).items():
        torch.testing.assert_close(student(method)[name], value, rtol=1e-4, atol=1e-6)


def test_distillation_teaches_the_student_alone_and_ends_where_logits_agree():
    torch.manual_seed(0)
    first, second = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    loss = distillation(first, second, 4.0)
    loss.backward()
    assert loss > 0
    assert first.grad.abs().sum() > 0
    assert second.grad is None
    same = first.detach().clone().requires_grad_()
    agreed = distillation(same, same.detach() + 1, 4.0)  # a constant does not change probabilities
    agreed.backward()
    torch.testing.assert_close(agreed, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(same.grad, torch.zeros(4, 2), atol=1e-6, rtol=0)
    certain = distillation(torch.tensor([[0.0, 0.0]]), torch.tensor([[200.0, -200.0]]))
    torch.testing.assert_close(certain, torch.tensor(2.0).log())


def test_the_teacher_sees_the_row_as_it_is_whatever_happens_to_the_image():
    plain, moved = (TabularImageData(samples(), batch_size=16, workers=0, augment=flag) for flag in (False, True))
    method = build("kd").eval()
    for before, after in zip(batches(plain), batches(moved), strict=True):
        assert not torch.equal(before["image"], after["image"])
        assert torch.equal(method.teach(before), method.teach({"table": after["table"]}))


def test_two_classes_are_enough():
    two = dataclasses.replace(samples(), target=pd.Series(["ant", "bee"] * 36))
    data = TabularImageData(two, batch_size=16, workers=0)
    method = fit(build("kd", data, settings={"teacher_epochs": 1}), data).eval()
    assert method(batches(data)[0])["image"].shape == (16, 2)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_is_an_uninterrupted_one(stop, tmp_path):
    assert_resumes(
        lambda: build("kd", settings={"teacher_epochs": 2, "teacher_dropout": 0.0}, epochs=2), stop, tmp_path
    )
