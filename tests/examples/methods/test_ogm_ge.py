"""OGM-GE: who is restrained and how much, which tensors that reaches, and the noise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from tabular_image.methods.ogm_ge import OGMGE, leads, modulation
from toy import batches, build, equal_states, fit

PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "none"}


@st.composite
def slices(draw):
    """Two slice logits of the same rows, confident ones and ties included, and the target."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, classes = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    image, table = (
        draw(st.sampled_from([0.0, 1.0, 10.0, 300.0]))
        * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return image, table, torch.randint(classes, (rows,), generator=generator)


@given(slices(), st.sampled_from([0.1, 0.8, 3.0]))
@example((torch.tensor([[-1e4, 0.0]]), torch.tensor([[-1e4, 0.0]]), torch.tensor([0])), 0.8)  # 0 / 0
@example((torch.tensor([[-1e4, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0])), 0.8)  # and 1 / 0
def test_the_leader_alone_is_restrained_by_more_than_a_fixed_amount(logits, alpha):
    image, table, target = logits
    sums = [values.softmax(1)[range(len(target)), target].sum().item() for values in (image, table)]
    lead = leads(image, table, target)
    factors = modulation(lead, alpha).tolist()
    if min(sums) > 0:
        torch.testing.assert_close(lead[0], image.new_tensor(sums[0] / sums[1]))
        torch.testing.assert_close(lead.prod(), torch.ones_like(lead[0]))
    assert sum(factor < 1 for factor in factors) == (max(lead.tolist()) > 1)
    for factor, mine, other in zip(factors, sums, sums[::-1], strict=True):
        assert 0 <= factor <= 1
        if factor < 1:
            assert mine > other * (1 - 1e-9)
            assert factor < 1 - math.tanh(alpha)
            assert factor == pytest.approx(1 - math.tanh(alpha * mine / other) if other else 0, abs=1e-6)


def test_slices_add_up_to_the_fused_logits():
    method = fit(build("ogm_ge")).eval()
    logits = method(batches()[0])
    assert torch.equal(logits["image"] + logits["table"], logits["fused"])


class Watched(OGMGE):
    """Notes every gradient before and after modulation, and the factors, in its first step."""

    def modulate(self, logits, target):
        if not hasattr(self, "before"):
            self.before = self.gradients()
            self.factors = modulation(leads(logits["image"], logits["table"], target), self.settings.alpha).tolist()
            super().modulate(logits, target)
            self.after = self.gradients()

    def gradients(self):
        return {
            name: parameter.grad.clone() for name, parameter in self.named_parameters() if parameter.grad is not None
        }


def one_step(**settings):
    method = build(Watched, settings=settings, **PLAIN)
    # The table leads clearly, so that its encoder is restrained.
    with torch.no_grad():
        method.head.weight[:, : method.width] = 0
    return fit(method)


@pytest.mark.parametrize("tensors", ["matrices", "convolutions"])
def test_without_noise_exactly_the_chosen_tensors_of_an_encoder_are_scaled(tensors):
    method = one_step(enhance=False, tensors=tensors, alpha=0.3)
    assert method.factors[0] == 1
    assert method.factors[1] < 1
    assert any(gradient.dim() == 2 for name, gradient in method.before.items() if name.startswith("encoders.table"))
    for name, gradient in method.before.items():
        chosen = gradient.dim() == 4 if tensors == "convolutions" else gradient.dim() > 1
        factor = method.factors[1] if name.startswith("encoders.table") and chosen else 1
        assert torch.equal(method.after[name], factor * gradient)


def test_noise_has_the_deviation_of_the_unscaled_gradient_in_both_encoders():
    method = one_step(alpha=3.0)
    assert method.factors[1] < 0.01
    for name, gradient in method.before.items():
        factor = method.factors[1] if name.startswith("encoders.table") else 1
        noise = method.after[name] - factor * gradient
        if name.startswith("head") or gradient.dim() == 1:
            assert torch.equal(method.after[name], gradient)
        elif gradient.numel() > 2000 and gradient.std() > 1e-7:
            deviation = gradient.std().item()
            assert noise.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * gradient.numel()))
            assert abs(noise.mean().item()) < 5 * deviation / math.sqrt(gradient.numel())
    assert sum(gradient.numel() > 2000 and gradient.dim() > 1 for gradient in method.before.values()) >= 4


def test_the_deviation_of_the_noise_is_unbiased(monkeypatch):
    method = build("ogm_ge", settings={"alpha": 0.3}).double()
    for parameter in method.encoders.parameters():
        parameter.grad = torch.randn_like(parameter)
    method.encoders["table"].single = torch.nn.Parameter(torch.ones(1, 1))
    method.encoders["table"].single.grad = torch.full((1, 1), 2.0)
    before = [parameter.grad.clone() for parameter in method.encoders["table"].parameters()]
    even = torch.zeros(4, 3, dtype=torch.double)  # nobody leads
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    method.modulate({"image": even, "table": even}, torch.zeros(4, dtype=torch.long))
    for parameter, gradient in zip(method.encoders["table"].parameters(), before, strict=True):
        noise = parameter.grad - gradient
        if gradient.numel() == 1:
            assert noise.item() == pytest.approx(1e-8, abs=1e-6)
        elif gradient.dim() > 1:
            assert noise.mean().item() == pytest.approx(gradient.std().item(), rel=1e-6)


class Silent(OGMGE):
    """Counts its modulations, and leaves the gradients alone."""

    calls = 0

    def modulate(self, logits, target):
        self.calls += 1


@pytest.mark.parametrize(("share", "modulated"), [(0.5, 2), (0.4, 1)])
def test_gradients_are_modulated_in_a_share_of_the_epochs(share, modulated):
    # Epochs 0 to share * epochs, as 0 to 50 of 100 in the released code.
    assert fit(build(Silent, settings={"share": share}, epochs=2)).calls == modulated * len(batches())


def test_without_modulation_it_is_concatenation():
    assert equal_states(fit(build(Silent)).state_dict(), fit(build("concatenation")).state_dict())


def test_the_loss_is_that_of_the_joint_logits_alone():
    method = one_step(enhance=False)
    again = build(Watched, settings={"enhance": False}, **PLAIN)
    with torch.no_grad():
        again.head.weight[:, : again.width] = 0
    again.train()
    batch = batches()[0]
    F.cross_entropy(again(batch)["fused"], batch["target"]).backward()
    for name, gradient in again.gradients().items():
        torch.testing.assert_close(method.before[name], gradient)
