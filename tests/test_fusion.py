import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import bits

from gaal_surgery import (
    CalibratedFusion,
    fuse_gaussians,
    fuse_logits,
)

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

    @given(SEEDS, st.integers(1, 4), st.integers(1, 3))
    def test_with_the_log_odds_is_bayes_rule_for_every_label(self, seed, modalities, labels):
        """Modalities are independent given a label; the posterior of each label comes by enumeration."""
        random = np.random.default_rng(seed)
        frequency = random.uniform(0.05, 0.95, labels)
        likelihoods = random.dirichlet(np.ones(5), size=(modalities, labels, 2))  # p(x_m | y_l)
        observed = random.integers(5, size=(modalities, 10))
        logits, posterior = np.empty((modalities, 10, labels)), np.empty((10, labels))
        for i in range(10):
            for label, prior in enumerate(frequency):
                joint = np.array([1 - prior, prior])
                for m in range(modalities):
                    evidence = likelihoods[m, label, :, observed[m, i]]
                    joint = joint * evidence
                    own = np.array([1 - prior, prior]) * evidence
                    logits[m, i, label] = scipy.special.logit(own[1] / own.sum())
                posterior[i, label] = joint[1] / joint.sum()
        log_odds = torch.tensor(scipy.special.logit(frequency))
        fused = fuse_logits(list(torch.tensor(logits)), log_odds=log_odds)
        np.testing.assert_allclose(fused.sigmoid().numpy(), posterior, atol=1e-10)

    @given(SEEDS, st.sampled_from([None, "log_prior", "log_odds"]))
    def test_names_and_order_do_not_matter(self, seed, prior):
        logits = random_logits(seed)
        settings = {} if prior is None else {prior: torch.tensor([0.1, 0.2, 0.3, 0.4]).log()}
        by_name = dict(zip(["image", "table", "audio"], reversed(logits), strict=True))
        torch.testing.assert_close(fuse_logits(by_name, **settings), fuse_logits(logits, **settings))

    def test_one_modality_keeps_its_prediction(self):
        (logits,) = random_logits(0, modalities=1)
        assert torch.equal(fuse_logits([logits]), logits)
        fused = fuse_logits([logits], log_prior=torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        torch.testing.assert_close(fused, logits.log_softmax(dim=1))
        assert torch.equal(fuse_logits([logits], log_odds=torch.tensor([0.1, 0.2, 0.3, 0.4])), logits)

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
        with pytest.raises(ValueError, match=r"log_prior must be \(3,\), one for each class"):
            fuse_logits([ONES, ONES], log_prior=torch.zeros(shape))
        with pytest.raises(ValueError, match=r"log_odds must be \(3,\), one for each label"):
            fuse_logits([ONES, ONES], log_odds=torch.zeros(shape))

    def test_refuses_two_priors(self):
        with pytest.raises(ValueError, match="give one of them"):
            fuse_logits([ONES, ONES], log_prior=torch.zeros(3), log_odds=torch.zeros(3))


GAUSSIANS = st.lists(st.tuples(st.floats(-3, 3), st.floats(-2, 2)), min_size=1, max_size=4)


class TestFuseGaussians:
    @given(GAUSSIANS)
    def test_is_the_normalised_product_of_the_densities(self, gaussians):
        grid = np.linspace(-30, 30, 6001)
        density = np.prod(
            [scipy.stats.norm(mean, np.exp(log_var / 2)).pdf(grid) for mean, log_var in gaussians], axis=0
        )
        density /= density.sum()
        mean = (grid * density).sum()
        variance = ((grid - mean) ** 2 * density).sum()
        fused = fuse_gaussians([torch.tensor([its], dtype=torch.float64) for its in gaussians])
        np.testing.assert_allclose(fused.numpy(), [[mean, np.log(variance)]], atol=1e-7)

    @given(SEEDS)
    def test_names_and_order_do_not_matter(self, seed):
        outputs = random_logits(seed, classes=2)
        by_name = dict(zip(["image", "table", "audio"], reversed(outputs), strict=True))
        torch.testing.assert_close(fuse_gaussians(by_name), fuse_gaussians(outputs))

    def test_one_modality_keeps_its_prediction(self):
        (outputs,) = random_logits(0, modalities=1, classes=2)
        torch.testing.assert_close(fuse_gaussians([outputs]), outputs, rtol=0, atol=0)

    @given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=4))
    def test_precisions_that_no_number_holds_neither_overflow_nor_underflow(self, gaussians):
        fused = fuse_gaussians([torch.tensor([its], dtype=torch.float32) for its in gaussians])
        ((mean, log_variance),) = fused.tolist()
        means, log_variances = np.float32(gaussians).T
        tolerance = 1e-6 * max(1, np.abs(means).max())
        assert means.min() - tolerance <= mean <= means.max() + tolerance
        least = log_variances.min()
        assert least - np.log(len(gaussians)) - 2e-3 <= log_variance <= least

    def test_an_expert_that_knows_nothing_leaves_the_other_as_it_is(self):
        sure, ignorant = torch.tensor([[1.0, -3.0]]), torch.tensor([[7.0, float("inf")]])
        assert torch.equal(fuse_gaussians([sure, ignorant]), sure)

    @pytest.mark.parametrize("outputs", [[], {}, [ONES], [torch.ones(4, 1)], [torch.ones(2)], [torch.ones(4, 2), ONES]])
    def test_refuses_what_is_not_a_mean_and_a_log_variance(self, outputs):
        with pytest.raises(ValueError, match=r"outputs must be one or more \(B, 2\) tensors"):
            fuse_gaussians(outputs)


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

    @settings(max_examples=10)
    @given(SEEDS, st.sampled_from([torch.float32, torch.float64]))
    def test_fit_without_class_weights_is_the_plain_program_to_the_bit(self, seed, dtype):
        logits, target = self._labelled(seed)
        logits = [tensor.to(dtype) for tensor in logits]
        stacked = torch.stack(logits).double()
        weight = torch.full((3,), 1 / 3).double().requires_grad_()
        bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            deviation = (weight - 1 / 3).square().sum() + bias.square().sum()
            fused = torch.einsum("m,mbc->bc", weight, stacked) + bias
            loss = F.cross_entropy(fused, target) + deviation / 2 / len(target)
            loss.backward()
            return loss

        optimizer.step(closure)
        fusion = CalibratedFusion(self.MODALITIES, 4).fit(logits, target)
        assert bits(fusion.weight) == bits(weight.float())
        assert bits(fusion.bias) == bits(bias.float())

    @settings(max_examples=10)
    @given(SEEDS)
    def test_equal_class_weights_are_none(self, seed):
        logits, target = self._labelled(seed)
        plain = CalibratedFusion(self.MODALITIES, 4).fit(logits, target)
        weighted = CalibratedFusion(self.MODALITIES, 4).fit(logits, target, weight=torch.ones(4))
        torch.testing.assert_close(weighted.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)

    @settings(max_examples=10)
    @given(SEEDS, st.lists(st.integers(0, 4), min_size=4, max_size=4))
    def test_a_class_weight_counts_samples_several_times(self, seed, weight):
        logits, target = self._labelled(seed)
        weight = torch.tensor(weight)
        weight[target[0]] += 1  # a sample must be left
        rows = torch.arange(len(target)).repeat_interleave(weight[target])
        copies = CalibratedFusion(self.MODALITIES, 4).fit([tensor[rows] for tensor in logits], target[rows])
        weighted = CalibratedFusion(self.MODALITIES, 4).fit(logits, target, weight=weight)
        torch.testing.assert_close(weighted.state_dict(), copies.state_dict(), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("shape", [(2,), (4,), (1, 3), ()])
    def test_refuses_class_weights_of_another_number(self, shape):
        with pytest.raises(ValueError, match=r"weight must be \(3,\), one for each class"):
            CalibratedFusion(("image",), 3).fit([ONES], torch.zeros(4).long(), weight=torch.ones(shape))

    @pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
    def test_refuses_class_weights_that_are_negative_or_not_finite(self, value):
        fusion = CalibratedFusion(("image",), 3)
        with pytest.raises(ValueError, match="weight must be finite and not negative"):
            fusion.fit([ONES], torch.zeros(4).long(), weight=torch.tensor([1.0, value, 1.0]))
        assert fusion.weight.tolist() == [1.0]

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
