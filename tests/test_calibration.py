"""What the calibrated fusions of classes, of labels and of Gaussians promise alike, each against numpy and scipy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, bits

from gaal_surgery import (
    CalibratedFusion,
    CalibratedGaussianFusion,
    CalibratedLabelFusion,
    fuse_gaussians,
    fuse_logits,
)

SEEDS = st.integers(0, 2**32)
MODALITIES = ("image", "table", "audio")
NOISES = np.array([0.5, 1.0, 3.0])[:, None, None]


def class_losses(stacked, target, weight, bias):
    log_q = scipy.special.log_softmax(np.einsum("m,mbc->bc", weight, stacked) + bias, axis=1)
    return -log_q[np.arange(len(target)), target]


def label_losses(stacked, target, weight, bias):
    fused = np.einsum("ml,mbl->bl", weight, stacked) + bias
    return (np.logaddexp(0, fused) - target * fused).sum(axis=1)


def gaussian_losses(stacked, target, log_weight, bias):
    precisions = np.exp(log_weight[:, None] - stacked[:, :, 1])
    mean = (precisions * stacked[:, :, 0]).sum(axis=0) / precisions.sum(axis=0) + bias
    return -scipy.stats.norm(mean, precisions.sum(axis=0) ** -0.5).logpdf(target)


def classes(random, samples, scale):
    """Three experts of different noise, whose logits are ``scale`` times as long as they should be."""
    target = random.integers(4, size=samples)
    observed = np.eye(4)[target] + NOISES * random.standard_normal((3, samples, 4))
    return scale * observed / NOISES**2, target


def labels(random, samples, scale):
    target = random.integers(2, size=(samples, 4)).astype(float)
    observed = 2 * target - 1 + 2 * NOISES * random.standard_normal((3, samples, 4))
    return scale * observed / (2 * NOISES**2), target


def gaussians(random, samples, scale):
    """Three experts whose stated precision is ``scale`` times the true one."""
    target = random.standard_normal(samples)
    means = target + NOISES[:, :, 0] * random.standard_normal((3, samples))
    return np.stack([means, np.broadcast_to(np.log(NOISES[:, :, 0] ** 2 / scale), means.shape)], axis=2), target


@dataclass(frozen=True)
class Kind:
    """A fusion with its data, its loss of every sample, where its parameters start, and its plain counterpart."""

    make: Any
    data: Any
    losses: Any
    starts: dict[str, np.ndarray]
    plain: Any

    def problem(self, seed: int, samples: int = 60, scale: float = 1.0) -> tuple[list[torch.Tensor], torch.Tensor]:
        stacked, target = self.data(np.random.default_rng(seed), samples, scale)
        return list(torch.tensor(stacked)), torch.tensor(target)

    def mean_loss(self, outputs: Any, target: Any, parameters: dict[str, Any]) -> float:
        return float(self.losses(torch.stack(outputs).numpy(), target.numpy(), *parameters.values()).mean())

    def objective(self, outputs: Any, target: Any, parameters: dict[str, Any]) -> float:
        prior = sum(((its - self.starts[name]) ** 2).sum() for name, its in parameters.items()) / 2
        return self.mean_loss(outputs, target, parameters) + float(prior) / len(target)


KINDS = {
    "classes": Kind(
        lambda names: CalibratedFusion(names, 4),
        classes,
        class_losses,
        {"weight": np.full(3, 1 / 3), "bias": np.zeros(4)},
        fuse_logits,
    ),
    "labels": Kind(
        lambda names: CalibratedLabelFusion(names, 4),
        labels,
        label_losses,
        {"weight": np.full((3, 4), 1 / 3), "bias": np.zeros(4)},
        fuse_logits,
    ),
    "gaussians": Kind(
        CalibratedGaussianFusion,
        gaussians,
        gaussian_losses,
        {"log_weight": np.zeros(3), "bias": np.zeros(())},
        fuse_gaussians,
    ),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def found(fusion):
    return {name: its.detach().double().numpy() for name, its in fusion.named_parameters()}


@EVERY_KIND
def test_starts_as_the_fusion_without_parameters(kind):
    outputs, _ = kind.problem(0)
    fusion = kind.make(MODALITIES)
    assert {name: its.shape for name, its in found(fusion).items()} == {k: x.shape for k, x in kind.starts.items()}
    torch.testing.assert_close(fusion(outputs), kind.plain(outputs), rtol=1e-6, atol=1e-6)


@settings(max_examples=10)
@EVERY_KIND
@given(seed=SEEDS, scale=st.sampled_from([0.2, 1.0, 5.0]))
def test_fit_finds_the_minimum_that_scipy_finds(kind, seed, scale):
    outputs, target = kind.problem(seed, scale=scale)
    ends = np.cumsum([its.size for its in kind.starts.values()])

    def unpacked(vector):
        parts = np.split(vector, ends[:-1])
        return {name: part.reshape(its.shape) for (name, its), part in zip(kind.starts.items(), parts, strict=True)}

    start = np.concatenate([its.ravel() for its in kind.starts.values()])
    best = scipy.optimize.minimize(lambda x: kind.objective(outputs, target, unpacked(x)), start, method="BFGS")
    fitted = found(kind.make(MODALITIES).fit(outputs, target))
    assert kind.objective(outputs, target, fitted) <= best.fun + 1e-7
    for name, its in unpacked(best.x).items():
        np.testing.assert_allclose(fitted[name], its, atol=2e-3)


@settings(max_examples=25)
@EVERY_KIND
@given(
    seed=SEEDS,
    scale=st.sampled_from([1e-6, 0.1, 1.0, 30.0, 1e6]),
    samples=st.integers(1, 30),
    max_iter=st.sampled_from([1, 2, 5, 200]),
)
def test_fit_never_ends_above_its_start(kind, seed, scale, samples, max_iter):
    outputs, target = kind.problem(seed, samples, scale)
    fitted = found(kind.make(MODALITIES).fit(outputs, target, max_iter=max_iter))
    assert all(np.isfinite(its).all() for its in fitted.values())
    first = kind.objective(outputs, target, kind.starts)
    last = kind.objective(outputs, target, fitted)
    assert last <= first + 1e-6 * max(1, abs(first))  # the parameters are kept in float32


@settings(max_examples=10)
@EVERY_KIND
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_permuted_modalities_have_permuted_parameters(kind, seed, order):
    outputs, target = kind.problem(seed)
    straight = found(kind.make(MODALITIES).fit(outputs, target))
    permuted = found(kind.make([MODALITIES[m] for m in order]).fit([outputs[m] for m in order], target))
    (weight, bias) = straight.items()
    np.testing.assert_allclose(permuted[weight[0]], weight[1][order], atol=1e-3)
    np.testing.assert_allclose(permuted[bias[0]], bias[1], atol=1e-3)


@settings(max_examples=10)
@EVERY_KIND
@given(seed=SEEDS)
def test_experts_too_sure_of_themselves_are_calibrated(kind, seed):
    """The loss on other samples comes near that of experts who state what they know."""
    stated, target = kind.problem(seed, 1000, scale=20.0)
    fitted = found(kind.make(MODALITIES).fit([its[:500] for its in stated], target[:500]))
    others = [its[500:] for its in stated], target[500:]
    honest, _ = kind.problem(seed, 1000, scale=1.0)
    sum_of_experts = {name: np.ones_like(its) if name == "weight" else its for name, its in kind.starts.items()}
    attainable = kind.mean_loss([its[500:] for its in honest], others[1], sum_of_experts)
    before, after = (kind.mean_loss(*others, parameters) for parameters in (kind.starts, fitted))
    assert after < before - 0.1
    assert after == pytest.approx(attainable, rel=0.1, abs=0.05)


@EVERY_KIND
def test_a_second_fit_forgets_the_first(kind):
    fresh, used = kind.make(MODALITIES), kind.make(MODALITIES)
    used.fit(*kind.problem(1, scale=7.0))
    for fusion in (fresh, used):
        assert fusion.fit(*kind.problem(2)) is fusion
    for one, other in zip(used.parameters(), fresh.parameters(), strict=True):
        assert bits(one) == bits(other)


@EVERY_KIND
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_fit_takes_mappings_in_any_order_and_outputs_with_a_graph(kind, context):
    outputs, target = kind.problem(0)
    by_name = dict(zip(reversed(MODALITIES), reversed(outputs), strict=True))
    frozen = kind.make(MODALITIES).requires_grad_(False)
    expected = kind.make(MODALITIES).fit(outputs, target)
    for its in by_name.values():
        its.requires_grad_()
    with context():
        frozen.fit(by_name, target)
    assert torch.equal(frozen(by_name), expected(outputs))
    assert all(its.grad is None for its in (*by_name.values(), *frozen.parameters(), *expected.parameters()))
    assert not any(its.requires_grad for its in frozen.parameters())


@EVERY_KIND
def test_gradients_flow_to_the_outputs_and_to_the_parameters(kind):
    outputs, _ = kind.problem(0, samples=3)
    fusion = kind.make(MODALITIES).double()
    torch.autograd.gradcheck(lambda *its: fusion(its[:3]), [its.requires_grad_() for its in outputs])
    fusion(outputs).square().sum().backward()
    assert all(its.grad.count_nonzero() for its in fusion.parameters())


@EVERY_KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_takes_outputs_of_every_float_dtype(kind, dtype):
    outputs, target = kind.problem(0)
    outputs = [its.to(dtype) for its in outputs]
    fusion = kind.make(MODALITIES).fit(outputs, target)
    fused = fusion(outputs)
    assert fused.dtype == torch.promote_types(dtype, torch.float32)
    wide = kind.make(MODALITIES).double()
    wide.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(fused, wide(outputs), check_dtype=False, rtol=1e-4, atol=1e-5)


@EVERY_KIND
def test_a_state_dict_round_trip_keeps_the_fit(kind, tmp_path):
    outputs, target = kind.problem(0)
    fusion = kind.make(MODALITIES).fit(outputs, target)
    torch.save(fusion.state_dict(), tmp_path / "fusion.pt")
    other = kind.make(MODALITIES)
    saved = torch.load(tmp_path / "fusion.pt", weights_only=True)
    other.load_state_dict(saved)
    assert saved.keys() == kind.starts.keys()
    assert torch.equal(other(outputs), fusion(outputs))


@EVERY_KIND
@pytest.mark.parametrize("modalities", [(), ("image", "image")])
def test_modalities_must_be_different_names(kind, modalities):
    with pytest.raises(ValueError, match="modalities must be one or more different names"):
        kind.make(modalities)


@EVERY_KIND
def test_refuses_other_modalities_or_shapes(kind):
    outputs, target = kind.problem(0, samples=5)
    fusion = kind.make(MODALITIES)
    refused = {
        r"must be given for \('image', 'table', 'audio'\), not \('image',\)": {"image": outputs[0]},
        r"must be 3 tensors \(B, [24]\), not \(2, 5, [24]\)": outputs[:2],
        r"must be 3 tensors \(B, [24]\), not \(3, 5, 1\)": [its[:, :1] for its in outputs],
        "tensors of the same shape": [*outputs[:2], outputs[2][:4]],
    }
    for message, wrong in refused.items():
        for use in (fusion, lambda outputs: fusion.fit(outputs, target)):
            with pytest.raises(ValueError, match=f"^(logits|outputs) must be.*{message[8:]}"):
                use(wrong)


@EVERY_KIND
@pytest.mark.parametrize("wrong", [lambda its: its[:3], lambda its: its[:, None], lambda its: its[0]])
def test_fit_needs_one_target_a_sample(kind, wrong):
    outputs, target = kind.problem(0, samples=5)
    with pytest.raises(ValueError, match=r"target must be \(5,.*\) with at least one sample"):
        kind.make(MODALITIES).fit(outputs, wrong(target))
    with pytest.raises(ValueError, match=r"target must be \(0,.*\) with at least one sample"):
        kind.make(MODALITIES).fit([its[:0] for its in outputs], target[:0])


@EVERY_KIND
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_fit_refuses_outputs_that_are_not_finite_and_keeps_its_parameters(kind, value):
    outputs, target = kind.problem(0)
    fusion = kind.make(MODALITIES)
    outputs[1][2, 1] = value
    with pytest.raises(ValueError, match=r"(logits|outputs) must be finite to be calibrated"):
        fusion.fit(outputs, target)
    for name, its in found(fusion).items():
        np.testing.assert_allclose(its, kind.starts[name], rtol=1e-6)


class TestLabels:
    @pytest.mark.parametrize("labels", [0, -1])
    def test_needs_a_label(self, labels):
        with pytest.raises(ValueError, match="labels must be at least 1"):
            CalibratedLabelFusion(MODALITIES, labels)

    def test_bool_and_whole_targets_are_those_of_numbers(self):
        outputs, target = KINDS["labels"].problem(0)
        expected, *others = (
            CalibratedLabelFusion(MODALITIES, 4).fit(outputs, its)(outputs)
            for its in (target, target.bool(), target.long(), target.half())
        )
        assert all(torch.equal(other, expected) for other in others)

    @pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
    def test_a_target_that_is_no_probability_is_refused(self, value):
        outputs, target = KINDS["labels"].problem(0)
        target[3, 1] = value
        with pytest.raises(ValueError, match=r"target must lie in \[0, 1\]"):
            CalibratedLabelFusion(MODALITIES, 4).fit(outputs, target)

    @settings(max_examples=10)
    @given(SEEDS)
    def test_each_label_is_fitted_by_itself(self, seed):
        outputs, target = KINDS["labels"].problem(seed)
        together = CalibratedLabelFusion(MODALITIES, 4).fit(outputs, target)(outputs)
        for label in range(4):
            own = [its[:, [label]] for its in outputs]
            alone = CalibratedLabelFusion(MODALITIES, 1).fit(own, target[:, [label]])(own)
            torch.testing.assert_close(alone, together[:, [label]], rtol=1e-2, atol=1e-2)


class TestGaussians:
    def test_a_log_weight_multiplies_the_precision(self):
        outputs, _ = KINDS["gaussians"].problem(0)
        fusion = CalibratedGaussianFusion(MODALITIES).double()
        with torch.no_grad():
            fusion.log_weight.copy_(torch.tensor([0.0, 1.0, 2.0]).mul(np.log(2)))  # as often as 1, 2 and 4 experts
            fusion.bias.fill_(0.25)
        several = [outputs[0], *[outputs[1]] * 2, *[outputs[2]] * 4]
        expected = fuse_gaussians(several) + torch.tensor([0.25, 0.0])
        torch.testing.assert_close(fusion(outputs), expected, check_dtype=False, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_a_target_that_is_not_finite_is_refused(self, value):
        outputs, target = KINDS["gaussians"].problem(0)
        target[3] = value
        with pytest.raises(ValueError, match="target must be finite"):
            CalibratedGaussianFusion(MODALITIES).fit(outputs, target)

    @staticmethod
    def _stated(log_variance):
        """One expert's outputs and the target; many samples, so that the prior counts for little."""
        generator = torch.Generator().manual_seed(0)
        target, noise = torch.randn(2, 5000, generator=generator, dtype=torch.float64)
        return torch.stack([target + noise, torch.full_like(noise, log_variance)], dim=1), target

    @pytest.mark.parametrize("log_variance", [-300.0, -30.0, 30.0])
    def test_log_variances_far_off_are_brought_near(self, log_variance):
        outputs, target = self._stated(log_variance)
        fused = CalibratedGaussianFusion(["image"]).fit([outputs], target, max_iter=2000)([outputs])
        assert fused.isfinite().all()
        assert abs(fused[0, 1].item()) < 0.1 + abs(log_variance) / 20

    @pytest.mark.parametrize("log_variance", [-800.0, 100.0])
    def test_a_loss_that_no_number_holds_is_refused_and_the_parameters_stay(self, log_variance):
        """At the start, and where the line search goes from there."""
        outputs, target = self._stated(log_variance)
        fusion = CalibratedGaussianFusion(["image"])
        with pytest.raises(ValueError, match="outputs are too far from the target for a finite loss"):
            fusion.fit([outputs], target)
        assert fusion.log_weight.tolist() == [0]
