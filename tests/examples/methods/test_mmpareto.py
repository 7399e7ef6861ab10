"""MMPareto: Pareto weights, lengths, and which loss reaches which module."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tabular_image.methods.mmpareto import MMPareto, pareto_weights
from toy import batches, build, fit

from gaal_surgery import combine, gramian


@st.composite
def pairs(draw):
    """Gradients a and b of three tensors each, of norms far apart or alike, in conflict or not; zeros abound."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    joint = [torch.randn(size, generator=generator) for size in (1, 4, 3)]
    own = [torch.randn(size, generator=generator) for size in (1, 4, 3)]
    lean = draw(st.sampled_from([0.0, -1.0, -3.0, 1.0]))
    size = draw(st.sampled_from([1.0, 1e-3, 1e3, 0.0]))
    return joint, [size * (b + lean * a) for a, b in zip(joint, own, strict=True)]


def flat(gradient):
    return torch.cat([tensor.double().flatten() for tensor in gradient])


@given(pairs())
def test_weights_are_the_closed_form_of_two_gradients(gradients):
    a, b = map(flat, gradients)
    weights = pareto_weights(gramian(gradients))
    if a @ b >= 0:
        assert torch.equal(weights, torch.ones_like(weights))
    else:
        alpha = ((b @ b - a @ b) / ((a - b) @ (a - b))).clamp(0, 1)
        torch.testing.assert_close(weights, 2 * torch.stack([alpha, 1 - alpha]), rtol=1e-5, atol=1e-9)


@given(pairs())
def test_in_conflict_the_direction_helps_both_losses_alike(gradients):
    a, b = map(flat, gradients)
    assume(a @ b < 0)
    wide = [[tensor.double() for tensor in gradient] for gradient in gradients]
    half = flat(combine(wide, pareto_weights(gramian(wide)))) / 2
    assert half @ half >= 0
    for gradient in (a, b):
        rounding = 1e-6 * gradient.norm() * half.norm()
        assert abs(half @ gradient - half @ half) <= rounding + 1e-4 * (half @ half)


@given(pairs(), st.sampled_from(["tensor", "encoder"]), st.sampled_from([1.5, 0.7]))
@example(([torch.zeros(2), torch.ones(1)], [torch.zeros(2), -torch.ones(1)]), "tensor", 1.5)  # d is 0
@example(([torch.ones(2)], [-torch.ones(2)]), "encoder", 1.5)
@example(([torch.zeros(2)], [torch.ones(2)]), "tensor", 1.5)  # one gradient has vanished: no conflict
def test_every_tensor_keeps_its_direction_and_is_at_least_gamma_times_the_plain_sum(gradients, rescale, gamma):
    joint, own = gradients
    method = BUILT[rescale, gamma]
    result = method.integrate(joint, own)
    direction = combine(gradients, pareto_weights(gramian(gradients)))
    total = flat(joint) + flat(own)
    for tensor, before, a, b in zip(result, direction, joint, own, strict=True):
        assert tensor.isfinite().all()
        length, norm = tensor.norm().item(), before.norm().item()
        assert (tensor @ before).item() == pytest.approx(length * norm, rel=1e-4, abs=1e-30)
        assert (length == 0) == (norm == 0)
        if rescale == "tensor" and norm > 0:
            assert length == pytest.approx(gamma * max((a + b).norm().item(), norm), rel=1e-4)
    if rescale == "encoder" and flat(direction).norm() > 0:
        expected = gamma * max(total.norm(), flat(direction).norm())
        assert flat(result).norm().item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(F.normalize(flat(result), dim=0), F.normalize(flat(direction), dim=0))


BUILT = {
    (rescale, gamma): build("mmpareto", settings={"rescale": rescale, "gamma": gamma})
    for rescale in ("tensor", "encoder")
    for gamma in (1.5, 0.7)
}


def test_without_conflict_an_encoder_has_gamma_times_the_plain_gradient():
    joint, own = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]
    (result,) = BUILT["tensor", 1.5].integrate(joint, own)
    torch.testing.assert_close(result, 1.5 * (joint[0] + own[0]))


class Watched(MMPareto):
    """Notes all gradients of its first step, and those that it integrated."""

    def build_optimizer(self, modules):
        self.start = copy.deepcopy(self.state_dict())
        self.integrated = []
        optimizer = super().build_optimizer(modules)
        optimizer.register_step_pre_hook(lambda *_: self.note())
        return optimizer

    def note(self):
        if not hasattr(self, "gradients"):
            self.gradients = {
                name: parameter.grad.clone() for name, parameter in self.named_parameters() if parameter.requires_grad
            }

    def integrate(self, joint, own):
        self.integrated.append((joint, own))
        return super().integrate(joint, own)


def test_heads_follow_the_plain_sum_and_encoders_the_integrated_gradients():
    method = fit(build(Watched))
    assert len(method.integrated) == 2 * len(batches())
    plain = build("mmpareto")
    plain.load_state_dict(method.start)
    plain.train()
    batch = batches()[0]
    losses = {name: F.cross_entropy(logits, batch["target"]) for name, logits in plain(batch).items()}
    for position, (modality, encoder) in enumerate(plain.encoders.items()):
        parameters = list(encoder.parameters())
        for loss, noted in zip((losses["fused"], losses[modality]), method.integrated[position], strict=True):
            torch.testing.assert_close(list(torch.autograd.grad(loss, parameters, retain_graph=True)), noted)
        names = [name for name in method.gradients if name.startswith(f"encoders.{modality}")]
        expected = plain.integrate(*method.integrated[position])
        torch.testing.assert_close([method.gradients[name] for name in names], expected)
    sum(losses.values()).backward()
    for name, parameter in plain.named_parameters():
        if name.startswith("head"):
            torch.testing.assert_close(method.gradients[name], parameter.grad)
