import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from strategies import DTYPES

from gaal_surgery import (
    GradientAlignedAlternator,
    binary_entropy,
    entropy,
    gaussian_entropy,
    guide_gradient,
    select_uncertain,
)

NAN, INF = float("nan"), float("inf")
LOGITS = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, min_side=2), elements=st.floats(-1e4, 1e4))
LABELS = arrays(np.float64, array_shapes(min_dims=2, max_dims=2), elements=st.floats(-1e4, 1e4))
EXTREME = torch.tensor([[INF], [-INF], [3e38], [-3e38], [120.0], [-95.0]])


class TestEntropy:
    @given(LOGITS)
    def test_is_the_entropy_of_the_softmax_in_nats(self, logits):
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected = scipy.stats.entropy(probabilities, axis=1)  # which normalises
        np.testing.assert_allclose(entropy(torch.tensor(logits)).numpy(), expected, atol=1e-12)

    @given(LOGITS, st.sampled_from(DTYPES))
    def test_lies_between_zero_and_log_of_the_classes(self, logits, dtype):
        scores = entropy(torch.tensor(logits).to(dtype))
        assert ((scores >= 0) & (scores <= math.log(logits.shape[1]) * (1 + 1e-6))).all()

    def test_attains_its_bounds(self):
        scores = entropy(torch.tensor([[7.0, 7.0, 7.0, 7.0], [500.0, 0.0, -500.0, 0.0]]))
        torch.testing.assert_close(scores, torch.tensor([math.log(4), 0.0]))

    def test_a_class_out_of_the_question_contributes_nothing(self):
        torch.testing.assert_close(entropy(torch.tensor([[-INF, 0.0, 0.0]])), torch.tensor([math.log(2)]))

    def test_does_not_depend_on_a_shift_of_the_logits(self):
        logits = torch.randn(5, 4, dtype=torch.float64)
        torch.testing.assert_close(entropy(logits + 1e3), entropy(logits))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_scored_in_float32_or_wider(self, dtype):
        logits = torch.randn(5, 300).to(dtype)
        scores = entropy(logits)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(scores, entropy(logits.double()), check_dtype=False)

    def test_refuses_a_single_column_and_says_what_to_use(self):
        with pytest.raises(ValueError, match=r"single column.*for a binary head pass uncertainty=binary_entropy"):
            entropy(torch.randn(4, 1))

    @pytest.mark.parametrize("shape", [(4,), (4, 2, 3)])
    def test_refuses_what_is_not_a_matrix(self, shape):
        with pytest.raises(ValueError, match=r"logits must be \(B, C\)"):
            entropy(torch.randn(shape))


class TestBinaryEntropy:
    @given(LABELS)
    def test_is_the_sum_of_the_entropies_of_bernoulli_variables(self, logits):
        # The distribution of the rarer outcome, whose probability does not round to 1; scipy rounds that of the other.
        expected = scipy.stats.bernoulli(scipy.special.expit(-np.abs(logits))).entropy().sum(axis=1)
        np.testing.assert_allclose(binary_entropy(torch.tensor(logits)).numpy(), expected, rtol=1e-12, atol=1e-15)

    @given(LABELS, st.sampled_from(DTYPES))
    def test_lies_between_zero_and_log_2_a_label(self, logits, dtype):
        scores = binary_entropy(torch.tensor(logits).to(dtype))
        assert ((scores >= 0) & (scores <= logits.shape[1] * math.log(2) * (1 + 1e-6))).all()

    @given(LABELS)
    def test_labels_are_symmetric_and_of_any_order(self, logits):
        logits = torch.tensor(logits)
        torch.testing.assert_close(binary_entropy(-logits.flip(1)), binary_entropy(logits), rtol=1e-12, atol=0)

    @given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=5))
    def test_of_one_label_is_the_entropy_of_two_classes(self, logits):
        logits = torch.tensor(logits, dtype=torch.float64)[:, None]
        two = torch.cat([torch.zeros_like(logits), logits], dim=1)
        torch.testing.assert_close(binary_entropy(logits), entropy(two), rtol=1e-9, atol=1e-15)

    def test_attains_its_bounds(self):
        expected = torch.tensor([3 * math.log(2), 0.0])
        torch.testing.assert_close(binary_entropy(torch.tensor([[0.0, 0.0, -0.0], [INF, -INF, 500.0]])), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_certain_labels_score_zero_and_never_nan(self, dtype):
        scores = binary_entropy(EXTREME.to(dtype))
        assert not scores.isnan().any()
        assert (scores[:4] == 0).all()
        assert (scores < 1e-30).all()

    def test_far_from_the_boundary_the_order_is_kept(self):
        """Where a probability rounds to 1, its entropy must not fall to what the rarer outcome has alone."""
        logits = torch.linspace(0.5, 80, 5000)[:, None]
        assert (binary_entropy(logits).diff() < 0).all()
        torch.testing.assert_close(binary_entropy(logits).double(), binary_entropy(logits.double()), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_scored_in_float32_or_wider(self, dtype):
        logits = torch.randn(5, 300).to(dtype)
        scores = binary_entropy(logits)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(scores, binary_entropy(logits.double()), check_dtype=False)

    @pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 2, 3)])
    def test_refuses_what_is_not_one_logit_a_label(self, shape):
        with pytest.raises(ValueError, match=r"logits must be \(B, L\) with L >= 1"):
            binary_entropy(torch.randn(shape))


class TestGaussianEntropy:
    @given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-100, 100)), min_size=1, max_size=5))
    def test_is_the_differential_entropy_of_the_normal_distribution(self, outputs):
        mean, log_variance = np.array(outputs).T
        expected = scipy.stats.norm(mean, np.exp(log_variance / 2)).entropy()
        np.testing.assert_allclose(gaussian_entropy(torch.tensor(outputs).double()).numpy(), expected, atol=1e-12)

    def test_has_no_bounds_and_needs_no_variance(self):
        log_variances = torch.tensor([-INF, -2e30, 2e30, INF])
        scores = gaussian_entropy(torch.stack([torch.zeros(4), log_variances], dim=1))
        assert scores.tolist() == (log_variances / 2).tolist()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_scored_in_float32_or_wider(self, dtype):
        outputs = torch.randn(50, 2).to(dtype)
        scores = gaussian_entropy(outputs)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(scores, gaussian_entropy(outputs.double()), check_dtype=False)

    @pytest.mark.parametrize("shape", [(4,), (2,), (4, 1), (4, 3), (4, 2, 2)])
    def test_refuses_what_is_not_a_mean_and_a_log_variance(self, shape):
        with pytest.raises(ValueError, match=r"outputs must be \(B, 2\).*the mean and the log-variance"):
            gaussian_entropy(torch.randn(shape))


class TestSelectUncertain:
    SCORES = st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, -1.0, INF, -INF, NAN]), min_size=1, max_size=40)

    @given(SCORES, st.floats(0, 1, exclude_min=True))
    def test_takes_the_hardest_in_order_ties_as_in_the_batch_nan_first(self, scores, fraction):
        hardness = [(INF, 1) if math.isnan(score) else (score, 0) for score in scores]
        order = sorted(range(len(scores)), key=lambda i: (-hardness[i][0], -hardness[i][1], i))
        chosen = select_uncertain(torch.tensor(scores), fraction)
        assert chosen.tolist() == order[: max(1, math.floor(fraction * len(scores)))]
        assert chosen.dtype == torch.int64

    @pytest.mark.parametrize(("fraction", "count"), [(1e-9, 1), (0.19, 1), (0.2, 2), (0.55, 5), (0.999, 9), (1, 10)])
    def test_rounds_the_share_down_and_takes_at_least_one(self, fraction, count):
        assert len(select_uncertain(torch.arange(10.0), fraction)) == count

    @pytest.mark.parametrize("fraction", [0, 0.0, -0.5, 1.5, NAN, INF])
    def test_refuses_a_share_outside_zero_to_one(self, fraction):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
            select_uncertain(torch.ones(3), fraction)

    @pytest.mark.parametrize("fraction", ["half", None, True])
    def test_refuses_a_share_that_is_no_number(self, fraction):
        with pytest.raises(TypeError, match=r"fraction must be a number in \(0, 1\]"):
            select_uncertain(torch.ones(3), fraction)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 1)])
    def test_refuses_scores_that_are_no_vector(self, shape):
        with pytest.raises(ValueError, match=r"scores must be \(B,\) with B >= 1"):
            select_uncertain(torch.ones(shape), 0.5)


def uncertain_gradient(head, features, target, fraction, *, uncertainty=entropy, max_norm=None):
    """What a step makes of evidence."""
    settings = {"fraction": fraction, "uncertainty": uncertainty, "max_norm": max_norm}
    optimizer = GradientAlignedAlternator(torch.optim.SGD(head.parameters(), lr=0.0), head, **settings)
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.rule = lambda gramian: torch.tensor([0.0, 1.0])
    optimizer.guide("image", features, target)
    optimizer.step()
    return {name: parameter.grad for name, parameter in head.named_parameters()}


class TestUncertainGradient:
    @given(st.integers(0, 2**32), st.floats(0.01, 1), st.sampled_from([None, 0.3]))
    def test_is_the_guide_gradient_of_the_most_uncertain(self, seed, fraction, max_norm):
        head, features, target = self._batch(seed)
        chosen = select_uncertain(entropy(head(features).detach()), fraction)
        expected = guide_gradient(head, features[chosen], target[chosen], F.cross_entropy, max_norm=max_norm)
        actual = uncertain_gradient(head, features, target, fraction, max_norm=max_norm)
        torch.testing.assert_close(actual, expected)

    def test_an_uncertainty_of_another_shape_is_refused(self):
        head, features, target = self._batch(0)
        message = r"guide 'image': uncertainty must return one score a sample, \(8,\), not \(8, 3\)"
        with pytest.raises(ValueError, match=message):
            uncertain_gradient(head, features, target, 0.5, uncertainty=lambda logits: logits)

    @staticmethod
    def _batch(seed):
        torch.manual_seed(seed)
        head = torch.nn.Linear(5, 3).double()
        return head, torch.randn(8, 5).double(), torch.randint(3, (8,))


class TestChecks:
    @pytest.mark.parametrize("max_norm", ["1", True, [1.0]])
    def test_a_max_norm_that_is_no_number_is_named(self, max_norm):
        with pytest.raises(TypeError, match="max_norm must be a number or None"):
            guide_gradient(
                torch.nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4).long(), F.cross_entropy, max_norm=max_norm
            )

    @pytest.mark.parametrize("target", [torch.full((4,), 7), torch.zeros(4), torch.zeros(4, 3).long()])
    def test_a_target_that_the_loss_cannot_take_is_named(self, target):
        with pytest.raises(ValueError, match=r"target of shape .* cannot be taken by loss_fn with logits \(4, 2\)"):
            guide_gradient(torch.nn.Linear(3, 2), torch.randn(4, 3), target, F.cross_entropy)
