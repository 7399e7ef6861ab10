"""ReconBoost: turns that boost one modality, and joint phases between them."""

from __future__ import annotations

import copy
import dataclasses

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tabular_image.data.module import TabularImageData
from tabular_image.methods.reconboost import ReconBoost
from toy import CLASSES, assert_resumes, batches, build, equal_states, fit, samples

PARTS = ("image", "table", "head", "rate")


class Watched(ReconBoost):
    """Notes whose turn each epoch is, and all parts with their optimizer state before it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.notes = []

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.notes.append((self.stage.name, self.turn, self.note()))

    def on_train_end(self):
        self.notes.append((None, None, self.note()))

    def note(self):
        modules = {**self.encoders, "head": self.head, "rate": self.rate}
        notes = {}
        for part, module in modules.items():
            notes[part] = dict(module.state_dict())
            for name, parameter in module.named_parameters():
                state = self.optimizer.state.get(parameter, {})
                notes[part] |= {f"{name}.{key}": value for key, value in state.items() if torch.is_tensor(value)}
        return copy.deepcopy(notes)


def moved(before, after):
    """The parts of which anything changed."""
    return {
        part
        for part in PARTS
        if before[part].keys() != after[part].keys() or not equal_states(before[part], after[part])
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_turn_leaves_the_other_modality_and_its_optimizer_state_bit_identical(optimizer):
    settings = {"pretraining_epochs": 1, "turn_epochs": 1, "joint_epochs": 1}
    # A constant rate: the cosine ends in steps that are too small for a weight near 1 to notice.
    method = fit(build(Watched, settings=settings, epochs=6, optimizer=optimizer, weight_decay=0.1, schedule="none"))
    phases = [
        (turn, moved(before, after))
        for (_, turn, before), (*_, after) in zip(method.notes[1:], method.notes[2:], strict=False)
    ]
    image, table, everything = {"image", "head"}, {"table", "head"}, set(PARTS)
    joint = (None, everything)
    assert phases == [("image", image), joint, ("table", table), joint, ("image", image), joint]
    assert [stage for stage, *_ in method.notes] == ["pretraining", *["boosting"] * 6, None]


@pytest.mark.parametrize(
    ("turn_epochs", "joint_epochs", "epochs", "phases"),
    [
        (2, 1, 6, "IIJTTJ"),
        (1, 2, 7, "IJJTJJJ"),
        (1, 1, 5, "IJTJJ"),  # fashion in the benchmarks
        (2, 3, 4, "JJJJ"),  # no whole round
    ],
)
def test_a_stage_holds_whole_rounds_and_ends_with_all_parts(turn_epochs, joint_epochs, epochs, phases):
    settings = {"pretraining_epochs": 1, "turn_epochs": turn_epochs, "joint_epochs": joint_epochs}
    method = fit(build(Watched, settings=settings, epochs=epochs))
    turns = [turn for _, turn, _ in method.notes[1:-1]]
    assert "".join({"image": "I", "table": "T", None: "J"}[turn] for turn in turns) == phases
    assert method.stages()[-1].epochs == epochs  # the schedule's length too


def test_an_optimizer_keeps_its_memory_in_a_joint_phase_that_is_longer():
    settings = {"pretraining_epochs": 1, "turn_epochs": 1, "joint_epochs": 1, "fresh_optimizer": True}
    method = fit(build("reconboost", settings=settings, epochs=5))
    weight = next(method.encoders["image"].parameters())
    assert method.optimizer.state[weight]["step"] == 2 * len(batches())


def test_pretraining_is_plain_training_of_both_modalities():
    method = build("reconboost", settings={"pretraining_epochs": 1}, optimizer="sgd")
    plain = copy.deepcopy(method)
    fit(method, epochs=1)
    parameters = [*plain.encoders.parameters(), *plain.head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=3e-3, momentum=0.9, weight_decay=1e-2)
    for batch in batches():
        logits = [plain.head(plain.encoders[name](batch[name])) for name in ("image", "table")]
        optimizer.zero_grad()
        sum(F.cross_entropy(values, batch["target"]) for values in logits).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        if not name.startswith("calibrated."):
            torch.testing.assert_close(method.state_dict()[name], value)
    assert method.rate.eta == 1


def drawn():
    torch.manual_seed(0)
    return torch.randn(5, CLASSES, requires_grad=True), torch.randn(5, CLASSES, requires_grad=True)


def test_the_turn_loss_is_weighted_by_what_the_other_modality_misses():
    method = build("reconboost", settings={"label_weight": 5.0, "residual_weight": 2.0})
    method.rate.eta.data.fill_(1.5)
    (logits, other), target = drawn(), torch.tensor([0, 1, 2, 0, 1])
    loss = method.turn_loss(logits, other, target)
    known = (1.5 * other).softmax(1)[range(5), target]
    losses = -logits.log_softmax(1)[range(5), target]
    torch.testing.assert_close(loss, ((5 - 2 * known) * losses).mean())
    loss.backward()
    assert logits.grad.any()
    assert other.grad is None
    assert method.rate.eta.grad is None
    divided = build("reconboost", settings={"divide_by_classes": True})
    whole = build("reconboost").turn_loss(logits, other, target)
    torch.testing.assert_close(CLASSES * divided.turn_loss(logits, other, target), whole)


def test_the_pure_residual_leaves_alone_what_the_other_modality_knows():
    method = build("reconboost", settings={"label_weight": 3.0, "residual_weight": 3.0})
    (logits, _), target = drawn(), torch.tensor([0, 1, 2, 0, 1])
    sure = 200 * F.one_hot(target, CLASSES).float()
    method.turn_loss(logits, sure, target).backward()
    assert not logits.grad.any()
    method.turn_loss(logits, -sure, target).backward()  # wrong on every row
    expected = torch.autograd.grad(3 * F.cross_entropy(logits, target), logits)[0]
    torch.testing.assert_close(logits.grad, expected)


def test_the_memory_term_pulls_the_modality_in_turn_towards_the_other():
    (logits, other), target = drawn(), torch.tensor([0, 1, 2, 0, 1])
    plain, remembering = build("reconboost"), build("reconboost", settings={"memory": 0.5})
    term = remembering.turn_loss(logits, other, target) - plain.turn_loss(logits, other, target)
    distance = (logits.softmax(1) - other.softmax(1)).square().mean()
    torch.testing.assert_close(term, 0.5 * distance)
    own, its = torch.autograd.grad(term, [logits, other], allow_unused=True)
    torch.testing.assert_close(own, torch.autograd.grad(0.5 * distance, logits)[0])
    assert its is None


def test_the_prediction_is_the_scaled_sum():
    method = build("reconboost").eval()
    method.rate.eta.data.fill_(0.7)
    logits = method(batches()[0])
    assert torch.equal(logits["fused"], 0.7 * (logits["image"] + logits["table"]))


@pytest.mark.parametrize("fresh", [False, True])
def test_an_optimizer_forgets_between_phases_when_asked_to(fresh):
    settings = {"pretraining_epochs": 1, "turn_epochs": 2, "joint_epochs": 1, "fresh_optimizer": fresh}
    method = fit(build("reconboost", settings=settings, epochs=6))
    weights = {name: next(encoder.parameters()) for name, encoder in method.encoders.items()}
    steps = {name: method.optimizer.state[weight]["step"] for name, weight in weights.items()}
    epochs = {"image": 1, "table": 1} if fresh else {"image": 4, "table": 4}
    assert steps == {name: count * len(batches()) for name, count in epochs.items()}


def test_two_classes_are_enough():
    two = dataclasses.replace(samples(), target=pd.Series(["ant", "bee"] * 36))
    data = TabularImageData(two, batch_size=16, workers=0)
    method = fit(build("reconboost", data, settings={"pretraining_epochs": 1}, epochs=2), data).eval()
    assert method(batches(data)[0])["fused"].shape == (16, 2)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_training_is_an_uninterrupted_one(stop, tmp_path):
    assert_resumes(lambda: build("reconboost", settings={"pretraining_epochs": 1}, epochs=4), stop, tmp_path)
