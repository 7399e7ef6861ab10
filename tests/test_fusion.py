import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import bits

from gaal_surgery import CalibratedFusion, fuse_logits

SEEDS = st.integers(0, 2**32)
ONES = torch.ones(4, 3)


def random_logits(seed, modalities=3, samples=7, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(modalities, samples, classes, generator=generator, dtype=torch.float64) * 3)


class TestFuseLogits:
    @given(SEEDS)
    def test_without_a_prior_is_the_mean(self, seed):
        logits = random_logits(seed)
        torch.testing.assert_close(fuse_logits(logits), sum(logits) / 3)

    @given(SEEDS, st.integers(1, 4))
    def test_with_the_prior_is_bayes_rule_where_modalities_are_independent_given_the_class(self, seed, modalities):
        random = np.random.default_rng(seed)
        prior = random.dirichlet(np.ones(3))
        likelihoods = random.dirichlet(np.ones(5), size=(modalities, 3))  # p(x_m | y)
        observed = random.integers(5, size=(modalities, 10))
        evidence = np.stack([likelihood[:, x].T for likelihood, x in zip(likelihoods, observed, strict=True)])
        posterior = prior * evidence.prod(axis=0)
        posterior /= posterior.sum(axis=1, keepdims=True)
        # Each expert knows its own posterior, up to a constant a sample.
        logits = np.log(prior * evidence) + random.standard_normal((modalities, 10, 1))
        fused = fuse_logits(list(torch.tensor(logits)), log_prior=torch.tensor(prior).log())
        np.testing.assert_allclose(fused.softmax(dim=1).numpy(), posterior, atol=1e-12)

    @given(SEEDS, st.booleans())
    def test_names_and_order_do_not_matter(self, seed, with_prior):
        logits = random_logits(seed)
        log_prior = torch.tensor([0.1, 0.2, 0.3, 0.4]).log() if with_prior else None
        by_name = dict(zip(["image", "table", "audio"], reversed(logits), strict=True))
        expected = fuse_logits(logits, log_prior=log_prior)
        torch.testing.assert_close(fuse_logits(by_name, log_prior=log_prior), expected)

    def test_one_modality_keeps_its_prediction(self):
        (logits,) = random_logits(0, modalities=1)
        assert torch.equal(fuse_logits([logits]), logits)
        fused = fuse_logits([logits], log_prior=torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        torch.testing.assert_close(fused, logits.log_softmax(dim=1))

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            ([], "one or more"),
            ({}, "one or more"),
            ([ONES, torch.ones(4, 2)], "same shape"),
            ([ONES, torch.ones(3, 3)], "same shape"),
            ([torch.ones(3)], r"\(B, C\)"),
            ([torch.ones(4, 3, 1)] * 2, r"\(B, C\)"),
        ],
    )
    def test_refuses_logits_that_do_not_fit_together(self, logits, message):
        with pytest.raises(ValueError, match=f"logits must be .*{message}"):
            fuse_logits(logits)

    @pytest.mark.parametrize("shape", [(4,), (1, 3), ()])
    def test_refuses_a_prior_of_another_number_of_classes(self, shape):
        with pytest.raises(ValueError, match=r"log_prior must be \(3,\), one a class"):
            fuse_logits([ONES, ONES], log_prior=torch.zeros(shape))


class TestCalibratedFusion:
    MODALITIES = ("image", "table", "audio")

    @staticmethod
    def _labelled(seed, samples=60, classes=4):
        """Logits of three modalities that know the class differently well, and the class."""
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(classes, (samples,), generator=generator).clamp(min=1)  # class 0 never occurs
        logits = torch.randn(3, samples, classes, generator=generator, dtype=torch.float64)
        logits += torch.tensor([3.0, 1.0, 0.0])[:, None, None] * torch.eye(classes)[target]
        return list(logits), target

    def test_starts_as_the_mean(self):
        logits = [tensor.float() for tensor in random_logits(0)]
        torch.testing.assert_close(CalibratedFusion(self.MODALITIES, 4)(logits), fuse_logits(logits))

    @settings(max_examples=10)
    @given(SEEDS)
    def test_fit_finds_the_maximum_of_the_posterior(self, seed):
        logits, target = self._labelled(seed)
        fusion = CalibratedFusion(self.MODALITIES, 4).fit(logits, target)
        stacked, labels = torch.stack(logits).numpy(), target.numpy()

        def negative_log_posterior(parameters):
            fused = np.tensordot(parameters[:3], stacked, axes=1) + parameters[3:]
            likelihood = fused[np.arange(len(labels)), labels] - scipy.special.logsumexp(fused, axis=1)
            return -likelihood.sum() + (((parameters[:3] - 1 / 3) ** 2).sum() + (parameters[3:] ** 2).sum()) / 2

        start = np.append(np.full(3, 1 / 3), np.zeros(4))
        best = scipy.optimize.minimize(negative_log_posterior, start, method="BFGS")
        found = torch.cat([fusion.weight, fusion.bias]).detach().numpy()
        assert negative_log_posterior(found) <= best.fun + 1e-5
        np.testing.assert_allclose(found, best.x, atol=1e-3)

    def test_fit_weighs_modalities_by_what_they_know_and_bounds_the_bias_of_an_unseen_class(self):
        fusion = CalibratedFusion(self.MODALITIES, 4)
        assert fusion.fit(*self._labelled(0, samples=2000)) is fusion
        image, table, audio = fusion.weight.tolist()
        assert image > table > abs(audio)
        unseen, *seen = fusion.bias.tolist()
        assert -10 < unseen < min(seen)

    def test_a_second_fit_forgets_the_first(self):
        fresh, used = (CalibratedFusion(self.MODALITIES, 4) for _ in range(2))
        used.fit(*self._labelled(1))
        for fusion in (fresh, used):
            fusion.fit(*self._labelled(2))
        assert bits(used.weight) == bits(fresh.weight)
        assert bits(used.bias) == bits(fresh.bias)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
    def test_fit_takes_mappings_in_any_order_and_logits_with_a_graph(self, context):
        logits, target = self._labelled(0)
        by_name = dict(zip(reversed(self.MODALITIES), reversed(logits), strict=True))
        for tensor in by_name.values():
            tensor.requires_grad_()
        with context():
            fusion = CalibratedFusion(self.MODALITIES, 4).fit(by_name, target)
        expected = CalibratedFusion(self.MODALITIES, 4).fit(logits, target)
        assert torch.equal(fusion(by_name), expected(logits))
        assert all(tensor.grad is None for tensor in by_name.values())
        assert fusion.weight.grad is None

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_takes_logits_of_every_float_dtype(self, dtype):
        logits, target = self._labelled(0)
        logits = [tensor.to(dtype) for tensor in logits]
        fusion = CalibratedFusion(self.MODALITIES, 4).fit(logits, target)
        fused = fusion(logits)
        assert fused.dtype == torch.promote_types(dtype, torch.float32)
        expected = sum(w * tensor.double() for w, tensor in zip(fusion.weight, logits, strict=True)) + fusion.bias
        torch.testing.assert_close(fused, expected, check_dtype=False, rtol=1e-5, atol=1e-5)

    def test_a_state_dict_round_trip_keeps_the_fit(self, tmp_path):
        logits, target = self._labelled(0)
        fusion = CalibratedFusion(self.MODALITIES, 4).fit(logits, target)
        torch.save(fusion.state_dict(), tmp_path / "fusion.pt")
        other = CalibratedFusion(self.MODALITIES, 4)
        other.load_state_dict(torch.load(tmp_path / "fusion.pt", weights_only=True))
        assert torch.equal(other(logits), fusion(logits))

    @pytest.mark.parametrize("modalities", [(), ("image", "image")])
    def test_modalities_must_be_different_names(self, modalities):
        with pytest.raises(ValueError, match="modalities must be one or more different names"):
            CalibratedFusion(modalities, 3)

    @pytest.mark.parametrize("classes", [1, 0, -2])
    def test_needs_two_classes(self, classes):
        with pytest.raises(ValueError, match="classes must be at least 2"):
            CalibratedFusion(("image",), classes)

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            ({"image": ONES}, r"logits must be given for \('image', 'table'\), not \('image',\)"),
            ({"image": ONES, "table": ONES, "audio": ONES}, "logits must be given for"),
            ([ONES], r"logits must be 2 tensors \(B, 3\)"),
            ([torch.ones(4, 2)] * 2, r"logits must be 2 tensors \(B, 3\)"),
            ([ONES, torch.ones(5, 3)], "same shape"),
        ],
    )
    def test_refuses_other_modalities_or_classes(self, logits, message):
        fusion = CalibratedFusion(("image", "table"), 3)
        for use in (fusion, lambda logits: fusion.fit(logits, torch.zeros(4, dtype=torch.int64))):
            with pytest.raises(ValueError, match=message):
                use(logits)

    @pytest.mark.parametrize(("samples", "targets"), [(4, 3), (0, 0), (4, (4, 1))])
    def test_fit_needs_one_target_a_sample(self, samples, targets):
        logits, target = [torch.ones(samples, 3)] * 2, torch.zeros(targets, dtype=torch.int64)
        with pytest.raises(ValueError, match=rf"target must be \({samples},\) with at least one sample"):
            CalibratedFusion(("image", "table"), 3).fit(logits, target)

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_fit_refuses_logits_that_are_not_finite_and_keeps_its_weights(self, value):
        fusion = CalibratedFusion(("image", "table"), 3)
        with pytest.raises(ValueError, match="logits must be finite"):
            fusion.fit([ONES, ONES * value], torch.zeros(4, dtype=torch.int64))
        assert fusion.weight.tolist() == [0.5, 0.5]
