import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from strategies import DTYPES

from gaal_surgery import GradientAlignedAlternator, entropy, guide_gradient, select_uncertain

NAN, INF = float("nan"), float("inf")
LOGITS = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, min_side=2), elements=st.floats(-1e4, 1e4))


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
        with pytest.raises(ValueError, match=r"single column.*pass uncertainty=lambda logits: -logits.squeeze\(1\)"):
            entropy(torch.randn(4, 1))

    @pytest.mark.parametrize("shape", [(4,), (4, 2, 3)])
    def test_refuses_what_is_not_a_matrix(self, shape):
        with pytest.raises(ValueError, match=r"logits must be \(B, C\)"):
            entropy(torch.randn(shape))


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
