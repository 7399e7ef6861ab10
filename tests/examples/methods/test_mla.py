"""MLA: what P absorbs, what the head's step then avoids, whose turn it is, and the gate."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular_image.methods.mla import MLA
from toy import CLASSES, Noting, batches, build, equal_states, fit

from gaal_surgery import entropy

PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "none"}
METHOD = build("mla").double()


def fresh():
    """A method in float64, with P as at the start."""
    METHOD.P = torch.eye(METHOD.width, dtype=torch.float64)
    return METHOD


def features(seed, rows, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, METHOD.width, generator=generator, dtype=torch.float64)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1e-3, 1.0, 30.0])), max_size=6), st.floats(0.01, 0.1)
)
def test_p_stays_symmetric_with_eigenvalues_from_0_to_1(turns, beta):
    method = fresh()
    for seed, scale in turns:
        method.absorb(features(seed, 4, scale), beta)
    torch.testing.assert_close(method.P, method.P.T, rtol=0, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(method.P)
    assert eigenvalues.min() > -1e-12
    assert eigenvalues.max() < 1 + 1e-12


@given(st.integers(0, 100), st.sampled_from([1e-3, 1.0, 30.0]), st.floats(0.01, 0.1))
def test_one_turn_shrinks_p_along_the_mean_of_its_features(seed, scale, beta):
    method, rows = fresh(), features(seed, 4, scale)
    method.absorb(rows, beta)
    mean = rows.mean(0)
    torch.testing.assert_close(method.P @ mean, mean * beta / (beta + mean @ mean))
    across = features(seed + 1, 1)[0]
    across -= mean * (across @ mean) / (mean @ mean)
    torch.testing.assert_close(method.P @ across, across)


def test_absorbing_is_recursive_least_squares():
    method, rows, beta = fresh(), [features(seed, 4) for seed in range(5)], 0.05
    for turn in rows:
        method.absorb(turn, beta)
    means = torch.stack([turn.mean(0) for turn in rows])
    inverse = torch.eye(method.width, dtype=torch.float64) + means.T @ means / beta
    torch.testing.assert_close(method.P, inverse.inverse())


def test_with_small_beta_a_step_leaves_the_answers_to_absorbed_features():
    method, rows = fresh(), [features(seed, 4) for seed in range(3)]
    for turn in rows:
        method.absorb(turn, 1e-12)
    gradient = method.head.weight.grad = features(9, CLASSES)
    before = gradient.clone()
    method.project()
    for turn in rows:
        assert (method.head.weight.grad @ turn.mean(0)).norm() < 1e-9 * (before @ turn.mean(0)).norm()
    assert method.head.weight.grad.norm() > 0.5 * before.norm()


def test_unit_norm_keeps_the_directions_alone():
    method = build("mla", settings={"unit_norm": True}).double()
    plain = fresh()
    for module in (method, plain):
        module.absorb(features(0, 4), 0.1)
    torch.testing.assert_close(method.P, plain.P / plain.P.norm())
    assert method.P.norm().item() == pytest.approx(1)


class Counting(MLA):
    """Counts what it absorbs in each turn."""

    def build_optimizer(self, modules):
        self.counts, self.absorbed = [], 0
        optimizer = super().build_optimizer(modules)
        optimizer.register_step_post_hook(lambda *_: self.counts.append(self.absorbed))
        return optimizer

    def absorb(self, features, beta):
        self.absorbed += 1
        super().absorb(features, beta)


def test_absorbing_first_begins_with_the_second_turn_of_all():
    method = fit(build(Counting, settings={"projection": "code"}, epochs=2))
    assert method.counts == list(range(2 * 2 * len(batches())))


@pytest.mark.parametrize("projection", ["paper", "code", "none"])
def test_training_is_a_plain_loop_of_turns(projection):
    method = build("mla", settings={"projection": projection}, **PLAIN, learning_rate=0.05)
    plain = copy.deepcopy(method)
    fit(method)

    parameters = [*plain.encoders.parameters(), *plain.head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    absorbed, all_batches = torch.eye(plain.width), batches()
    plain.train()
    for position, batch in enumerate(all_batches):
        beta = 0.1 ** (1 + position / len(all_batches))
        for modality in ("image", "table"):
            values = plain.encoders[modality](batch[modality])
            F.cross_entropy(plain.head(values), batch["target"]).backward()
            mean = values.detach().mean(0)
            k = absorbed @ mean
            after = absorbed - torch.outer(k, k) / (beta + mean @ k)
            if projection == "code" and (position, modality) == (0, "image"):
                after = absorbed  # the first turn of all
            if projection != "none":
                plain.head.weight.grad @= absorbed if projection == "paper" else after
                absorbed = after
            optimizer.step()
            optimizer.zero_grad()
    for name in ("encoders", "head"):
        torch.testing.assert_close(
            getattr(method, name).state_dict(), getattr(plain, name).state_dict(), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(method.P, absorbed, rtol=1e-4, atol=1e-5)
    assert (projection == "none") == torch.equal(method.P, torch.eye(method.width))


class Watched(Noting, MLA):
    """The method, and what its steps moved."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_turn_leaves_the_other_encoder_bit_identical(optimizer):
    method = fit(build(Watched, optimizer=optimizer, weight_decay=0.1))
    assert len(method.notes) == 1 + 2 * len(batches())
    for position, (before, after) in enumerate(zip(method.notes, method.notes[1:], strict=False)):
        active, idle = ("image", "table") if position % 2 == 0 else ("table", "image")
        assert equal_states(before[idle], after[idle])
        assert not all(torch.equal(before[active][name], after[active][name]) for name in before[active])


def test_p_outlives_epochs_and_is_in_the_checkpoint():
    one, two = fit(build("mla")), fit(build("mla", epochs=2))
    # Nothing is ever given back: every epoch takes its share of the trace.
    assert two.P.trace() < one.P.trace() < one.width - 1
    assert torch.equal(one.state_dict()["P"], one.P)


def test_the_gate_trusts_the_prediction_of_lower_entropy():
    logits = torch.randn(2, 5, CLASSES) * torch.tensor([3.0, 0.5])[:, None, None]
    fused = METHOD.fuse(logits)
    for row in range(5):
        trust = [math.exp(-entropy(logits[modality])[row].item()) for modality in (0, 1)]
        expected = sum(t * logits[modality, row] for modality, t in enumerate(trust)) / sum(trust)
        torch.testing.assert_close(fused[row], expected)
        # Its rows do not see each other.
        torch.testing.assert_close(METHOD.fuse(logits[:, row : row + 1])[0], fused[row])


def test_fixed_weights_are_the_same_for_all_samples():
    method = build("mla", settings={"gate": "fixed", "image_weight": 0.7}).eval()
    logits = method(batches()[0])
    torch.testing.assert_close(logits["fused"], 0.7 * logits["image"] + 0.3 * logits["table"])


def test_all_fusions_of_image_and_table_are_offered_beside_its_own():
    method = build("mla").eval()
    logits = method(batches()[0])
    assert torch.equal(method.predictions(logits)["fused"], logits["fused"])
    assert set(method.fusions(logits)) == {"mean", "product", "calibrated"}
