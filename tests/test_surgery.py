import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, nnls
from strategies import (
    DTYPES,
    Problem,
    assert_near,
    bits,
    dependent_problems,
    generic_problems,
    half_spaces,
    nearest,
    nearest_within_reach,
    problems,
    rounded_problems,
    scale_free_half_spaces,
)
from torchjd import aggregation
from torchjd.linalg import DualConeProjector

from gaal_surgery import DualFloor, GradientAlignedAlternator, HalfSpace, Orthogonal, align, combine, gramian, surgery

LENGTHS = st.integers(-20, 15)
MODEST_LENGTHS = st.integers(-6, 6)


class TestHalfSpace:
    @given(problems(), half_spaces())
    def test_gives_the_nearest_feasible_point(self, problem, rule):
        expected = nearest_within_reach(problem, rule)
        assert_near(problem.aligned(rule), expected, 1e-8, problem.gradient)

    @given(problems(), half_spaces())
    def test_every_guide_reaches_its_margin_where_all_can(self, problem, rule):
        required = problem.required(rule)
        assume(nearest(problem, required) is not None)
        aligned = problem.aligned(rule)
        asking = np.linalg.norm(problem.guides, axis=1) > 0
        scale = np.linalg.norm(problem.guides, axis=1) * (np.linalg.norm(problem.gradient) + np.linalg.norm(aligned))
        assert ((problem.guides @ aligned - required + 1e-9 * scale)[asking] >= 0).all()

    @given(dependent_problems(), half_spaces())
    def test_margins_out_of_reach_together_count_as_zero(self, problem, rule):
        guides = np.vstack([problem.guides, -problem.guides])[:5]
        problem = Problem(problem.gradient, guides)
        assume(nearest(problem, problem.required(rule)) is None)
        assert_near(problem.aligned(rule), problem.aligned(HalfSpace()), 1e-12, problem.gradient)

    @given(problems())
    def test_never_lengthens_the_gradient_without_a_margin(self, problem):
        assert np.linalg.norm(problem.aligned(HalfSpace())) <= np.linalg.norm(problem.gradient) * (1 + 1e-12)

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(generic_problems(), st.sampled_from([HalfSpace(), HalfSpace(0.2, relative=True)]))
    def test_leaves_the_bits_where_no_guide_objects(self, dtype, problem, rule):
        gradient, guides = problem.tensors(dtype)
        gradient[::3] = -0.0
        # Turned towards the gradient, each guide's cosine with it is above the margin.
        norm = gradient.double().norm()
        guides = [(gradient.double() + norm * guide.double() / guide.double().norm() / 2).to(dtype) for guide in guides]
        assert bits(align(gradient, guides, rule)) == bits(gradient)

    @given(generic_problems(), half_spaces())
    def test_a_guide_of_norm_zero_asks_for_nothing(self, problem, rule):
        gradient, guides = problem.tensors(torch.float64)
        zero = torch.zeros_like(gradient)
        assert bits(align(gradient, [zero], rule)) == bits(gradient)
        assert bits(align(gradient, [zero, -zero], rule)) == bits(gradient)
        assert_near(align(gradient, [zero, *guides], rule), align(gradient, guides, rule), 1e-12)

    @given(problems(), half_spaces())
    def test_a_gradient_of_norm_zero_is_lifted_to_the_margins_alone(self, problem, rule):
        problem = Problem(np.zeros_like(problem.gradient), problem.guides)
        assert_near(problem.aligned(rule), nearest_within_reach(problem, rule), 1e-8)

    @given(problems(), half_spaces(), st.randoms(use_true_random=False))
    def test_the_order_of_guides_and_coordinates_does_not_matter(self, problem, rule, random):
        guides = random.sample(range(len(problem.guides)), len(problem.guides))
        coordinates = random.sample(range(len(problem.gradient)), len(problem.gradient))
        shuffled = Problem(problem.gradient[coordinates], problem.guides[guides][:, coordinates])
        assert_near(shuffled.aligned(rule), problem.aligned(rule)[coordinates], 1e-8, problem.gradient)

    @given(problems(), scale_free_half_spaces(), MODEST_LENGTHS, st.lists(MODEST_LENGTHS, min_size=5, max_size=5))
    def test_the_gradient_sets_the_length_and_guides_only_the_direction(self, problem, rule, length, lengths):
        factors = 10.0 ** np.array(lengths[: len(problem.guides)])
        scaled = Problem(problem.gradient * 10.0**length, problem.guides * factors[:, None])
        assert_near(scaled.aligned(rule) / 10.0**length, problem.aligned(rule), 1e-8, problem.gradient)

    @given(problems(), half_spaces(), st.lists(MODEST_LENGTHS, min_size=5, max_size=5))
    def test_is_exact_for_guides_of_very_different_lengths(self, problem, rule, lengths):
        factors = 10.0 ** np.array(lengths[: len(problem.guides)])
        problem = Problem(problem.gradient, problem.guides * factors[:, None])
        assert_near(problem.aligned(rule), nearest_within_reach(problem, rule), 1e-8, problem.gradient)

    @given(generic_problems(), st.floats(-5, -1))
    def test_tells_guides_apart_that_are_almost_parallel(self, problem, angle):
        basis = problem.guides
        rest = problem.gradient - basis.T @ np.linalg.lstsq(basis.T, problem.gradient)[0]
        guides = np.vstack([basis[:1], basis[0] + 10**angle * basis[1:]])
        # Orthogonal to every guide, save what opposes each of them: the nearest point is the rest.
        opposed = Problem(rest - guides.sum(axis=0), guides)
        assert_near(opposed.aligned(HalfSpace()), rest, 1e-8, opposed.gradient)

    @given(problems(), half_spaces())
    def test_adds_guides_and_never_subtracts_them(self, problem, rule):
        current, *multipliers = rule(gramian([torch.tensor(problem.gradient), *torch.tensor(problem.guides)])).tolist()
        assert current == 1
        assert all(multiplier >= 0 for multiplier in multipliers)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    @given(generic_problems(max_guides=3), scale_free_half_spaces(), LENGTHS, LENGTHS)
    def test_holds_for_norms_from_1e_minus_20_to_1e15(self, dtype, problem, rule, gradient_length, guide_length):
        scaled = Problem(problem.gradient * 10.0**gradient_length, problem.guides * 10.0**guide_length)
        self._assert_nearest(scaled, rule, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(generic_problems(max_guides=3), half_spaces())
    def test_holds_in_every_float_dtype(self, dtype, problem, rule):
        self._assert_nearest(problem, rule, dtype)

    @staticmethod
    def _assert_nearest(problem, rule, dtype):
        gradient, guides = problem.tensors(dtype)
        rounded = Problem(gradient.double().numpy(), torch.stack(guides).double().numpy())
        result = align(gradient, guides, rule)
        assert result.dtype == dtype
        assert_near(result.double(), nearest_within_reach(rounded, rule), 20 * torch.finfo(dtype).eps, rounded.gradient)

    @given(problems(max_guides=1), half_spaces())
    def test_one_guide_is_the_special_case_of_several(self, problem, rule):
        guide = problem.guides[0]
        for beside in (guide, 3 * guide if rule.relative or rule.margin == 0 else guide, 0 * guide):
            several = Problem(problem.gradient, np.stack([guide, beside]))
            assert_near(several.aligned(rule), problem.aligned(rule), 1e-12, problem.gradient)

    @given(problems(max_guides=1), half_spaces())
    def test_one_guide_follows_equation_5(self, problem, rule):
        (guide,) = problem.guides
        squared = guide @ guide
        missing = max(0, problem.required(rule)[0] - problem.gradient @ guide)
        expected = problem.gradient + (missing / squared * guide if squared > 0 else 0)
        assert_near(problem.aligned(rule), expected, 1e-12, problem.gradient)

    def test_takes_twelve_guides_and_refuses_more(self):
        normal = np.random.default_rng(0).standard_normal
        problem = Problem(normal(32), normal((13, 32)))
        most = Problem(problem.gradient, problem.guides[:12])
        assert_near(most.aligned(HalfSpace()), nearest_within_reach(most, HalfSpace()), 1e-8)
        with pytest.raises(ValueError, match="at most 12 guides, not 13: use guides='previous'"):
            problem.aligned(HalfSpace())

    @pytest.mark.parametrize("margin", [float("nan"), float("inf"), -float("inf")])
    def test_a_margin_that_is_not_finite_is_refused(self, margin):
        with pytest.raises(ValueError, match="margin must be a finite number"):
            HalfSpace(margin)


RELATIVE = st.builds(HalfSpace, margin=st.floats(0, 0.9), relative=st.just(True))
WHERE = pytest.mark.parametrize("everywhere", [False, True], ids=["on_a_cpu", "without_a_branch"])


class TestRoundedGuides:
    """Guides that depend on one another up to the rounding of float32: what rounding left must decide nothing."""

    @staticmethod
    def aligned(problem, rule, everywhere=False):
        """In units of g; everywhere, as where the device is not waited for."""
        vectors = torch.tensor(np.vstack([problem.gradient, problem.guides]))
        vectors = vectors / vectors[0].norm()
        with pytest.MonkeyPatch.context() as patch:
            if everywhere:
                patch.setattr(surgery, "on_host", lambda tensor: False)
            return rule(gramian(list(vectors))) @ vectors

    @staticmethod
    def least_product(problem, aligned):
        """With a unit guide, in units of g; a guide of norm 0 asks for nothing."""
        guides = torch.tensor(problem.guides)
        return (guides @ aligned / guides.norm(dim=1)).nan_to_num(torch.inf).min()

    @WHERE
    @given(rounded_problems(), RELATIVE)
    def test_every_margin_is_reached_or_none_is_asked_for(self, everywhere, problem, rule):
        aligned = self.aligned(problem, rule, everywhere)
        if self.least_product(problem, aligned) < rule.margin - 1e-5:
            without = self.aligned(problem, HalfSpace(), everywhere)
            torch.testing.assert_close(aligned, without, rtol=0, atol=1e-5)
            assert self.least_product(problem, without) > -1e-5
            assert aligned.norm() < 1 + 1e-5

    @WHERE
    @given(rounded_problems(), RELATIVE, st.randoms(use_true_random=False))
    def test_the_order_of_the_guides_changes_nothing(self, everywhere, problem, rule, random):
        order = list(range(len(problem.guides)))
        random.shuffle(order)
        permuted = self.aligned(Problem(problem.gradient, problem.guides[order]), rule, everywhere)
        torch.testing.assert_close(permuted, self.aligned(problem, rule, everywhere), rtol=1e-4, atol=1e-5)

    @given(rounded_problems(), RELATIVE)
    def test_the_result_is_the_same_with_a_branch_and_without(self, problem, rule):
        without_a_branch = self.aligned(problem, rule, everywhere=True)
        torch.testing.assert_close(self.aligned(problem, rule), without_a_branch, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("margin", [0.1, 0.4])
    def test_the_gradients_themselves_may_be_float32(self, margin):
        """Rank 1: no point reaches every margin."""
        for seed in range(40):
            torch.manual_seed(seed)
            vectors = torch.randn(4, 1) @ torch.randn(1, 3)
            aligned = align(vectors[0], list(vectors[1:]), HalfSpace(margin, relative=True))
            assert (vectors[1:] @ aligned / vectors[1:].norm(dim=1)).min() > -1e-5 * vectors[0].norm()

    @given(st.integers(0, 2**32), st.floats(1e-3, 1e-1))
    def test_long_multiples_of_nearly_opposed_guides_are_summed_exactly(self, seed, angle):
        """Half a degree from opposed, the multiples are thousands of times as long as their sum."""
        generator = torch.Generator().manual_seed(seed)
        gradient, guide, rest = torch.randn(3, 50, generator=generator)
        guides = [guide, -guide + angle * rest]
        aligned = align(gradient, guides, HalfSpace(0.5, relative=True)).double()
        for its in guides:
            product = its.double() @ aligned / its.double().norm() / gradient.double().norm()
            assert product > 0.5 - 1e-6 * aligned.norm() / gradient.norm()


class TestDualFloor:
    RULES = st.builds(DualFloor, floor=st.sampled_from([0.0, 0.75, 2.0]), ridge=st.sampled_from([1e-3, 0.5]))

    @given(problems(max_guides=1), RULES, st.sampled_from([1e-3, 1.0, 1e3]))
    def test_follows_the_released_code(self, problem, rule, length):
        guide = problem.guides[0] * length
        product = problem.gradient @ guide
        v = max(rule.floor, -product / (guide @ guide + rule.ridge)) if product < -1e-12 else 0
        assume(product == 0 or abs(product) > 1e-12)
        assert_near(Problem(problem.gradient, guide[None]).aligned(rule), problem.gradient + v * guide, 1e-12)

    @given(problems(max_guides=1), RULES)
    def test_solves_the_dual_of_gem_with_a_floor(self, problem, rule):
        (guide,) = problem.guides
        assume(problem.gradient @ guide < -1e-12)
        system = np.append(guide, np.sqrt(rule.ridge))[:, None]
        solution = lsq_linear(system, np.append(-problem.gradient, 0), bounds=(rule.floor, np.inf), tol=1e-14)
        assert_near(problem.aligned(rule), problem.gradient + solution.x[0] * guide, 1e-6, problem.gradient)

    @given(generic_problems(), RULES)
    def test_leaves_the_bits_where_no_guide_objects(self, problem, rule):
        guides = problem.guides * np.sign(problem.guides @ problem.gradient)[:, None]
        assert Problem(problem.gradient, guides).aligned(rule).tobytes() == problem.gradient.tobytes()

    @pytest.mark.parametrize("rule", [DualFloor(), HalfSpace()])
    def test_a_right_angle_is_no_objection(self, rule):
        gradient = torch.tensor([1.0, -2.0, 0.0, -0.0])
        assert bits(align(gradient, [torch.tensor([0.0, 0.0, 3.0, 1.0])], rule)) == bits(gradient)

    @given(problems(), RULES)
    def test_several_guides_act_each_by_itself(self, problem, rule):
        changes = [Problem(problem.gradient, guide[None]).aligned(rule) - problem.gradient for guide in problem.guides]
        assert_near(problem.aligned(rule), problem.gradient + sum(changes), 1e-12, problem.gradient)

    @pytest.mark.parametrize("name", ["floor", "ridge"])
    @pytest.mark.parametrize(
        ("value", "message"),
        [(-0.1, "must not be negative"), (float("nan"), "finite number"), (float("inf"), "finite number")],
    )
    def test_arguments_out_of_range_are_refused(self, name, value, message):
        with pytest.raises(ValueError, match=f"{name} must .*{message.removeprefix('must ')}"):
            DualFloor(**{name: value})


class TestOrthogonal:
    @given(problems())
    def test_subtracts_the_projection_on_the_span_of_the_guides(self, problem):
        coordinates = np.linalg.lstsq(problem.guides.T, problem.gradient, rcond=1e-10)[0]
        expected = problem.gradient - problem.guides.T @ coordinates
        assert_near(problem.aligned(Orthogonal()), expected, 1e-8, problem.gradient)

    @given(problems())
    def test_is_orthogonal_to_every_guide_whatever_the_sign(self, problem):
        products = problem.guides @ problem.aligned(Orthogonal())
        norms = np.linalg.norm(problem.guides, axis=1) * np.linalg.norm(problem.gradient)
        assert (np.abs(products) <= 1e-10 * norms).all()

    @given(problems())
    def test_is_idempotent(self, problem):
        once = problem.aligned(Orthogonal())
        assert_near(Problem(once, problem.guides).aligned(Orthogonal()), once, 1e-10, problem.gradient)


class NonNegativeLeastSquares(DualConeProjector):
    """UPGrad's and DualProj's quadratic program by scipy: TorchJD's own solver is an extra of its own."""

    def __call__(self, U, G):  # noqa: N803
        root = np.linalg.cholesky(G.numpy() + 1e-12 * np.eye(len(G))).T
        solve = lambda u: u + nnls(root, -root @ u)[0]  # noqa: E731
        return torch.tensor(np.apply_along_axis(solve, -1, U.numpy()))


SOLVER = {"projector": NonNegativeLeastSquares()}
TORCHJD = [
    ("AlignedMTL", {}),
    ("DualProj", SOLVER),
    ("IMTLG", {}),
    ("MGDA", {}),
    ("PCGrad", {}),
    ("UPGrad", SOLVER),
]


@pytest.mark.parametrize(("name", "settings"), TORCHJD)
class TestTorchJDWeighting:
    def test_is_a_rule_of_align(self, name, settings):
        jacobian = torch.randn(3, 8, dtype=torch.float64)
        torch.manual_seed(1)  # PCGrad draws an order
        aligned = align(jacobian[0], list(jacobian[1:]), getattr(aggregation, f"{name}Weighting")(**settings))
        torch.manual_seed(1)
        expected = getattr(aggregation, name)(**settings)(jacobian)
        torch.testing.assert_close(aligned, expected, rtol=1e-6, atol=1e-6)

    def test_is_a_rule_of_the_alternator(self, name, settings):
        weighting = getattr(aggregation, f"{name}Weighting")(**settings)
        head = torch.nn.Linear(5, 3).double()
        optimizer = GradientAlignedAlternator(
            torch.optim.SGD(head.parameters(), lr=0.1), shared=head, fraction=1.0, rule=weighting
        )
        features, guide = torch.randn(2, 7, 5, dtype=torch.float64)
        target = torch.arange(7) % 3
        F.cross_entropy(head(guide), target).backward()
        guide_gradient = [parameter.grad.clone() for parameter in head.parameters()]
        optimizer.zero_grad()
        F.cross_entropy(head(features), target).backward()
        gradients = [[parameter.grad.clone() for parameter in head.parameters()], guide_gradient]
        torch.manual_seed(1)
        expected = combine(gradients, weighting(gramian(gradients)))
        optimizer.guide("other", guide, target)
        torch.manual_seed(1)
        optimizer.step()
        torch.testing.assert_close([parameter.grad for parameter in head.parameters()], expected)


@pytest.mark.parametrize(
    "build", [lambda: HalfSpace(margin="1"), lambda: DualFloor(floor=True), lambda: DualFloor(ridge=None)]
)
def test_a_setting_that_is_no_number_is_named(build):
    with pytest.raises(TypeError, match=r"(margin|floor|ridge) must be a number"):
        build()
