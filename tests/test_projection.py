import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    EVERY_RULE,
    RULES,
    assert_near,
    bits,
    generic_problems,
    half_spaces,
    problems,
)

from gaal_surgery import HalfSpace, Orthogonal, align, combine, gramian
from gaal_surgery.projection import _CHUNK, combine_into, join

INF, NAN = float("inf"), float("nan")


def pieces(vector, cuts):
    """The vector as a list of tensors of 1 and 2 dimensions."""
    return [piece if i % 2 else piece[None] for i, piece in enumerate(torch.tensor_split(vector, cuts))]


def joined(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


STRUCTURES = {
    "tensor": lambda vector: vector.view(4, 4),
    "list": lambda vector: pieces(vector, [5, 9]),
    "tuple": lambda vector: tuple(pieces(vector, [5, 9])),
    "mapping": lambda vector: dict(zip("abc", pieces(vector, [5, 9]), strict=True)),
}


def flat(structure):
    if isinstance(structure, torch.Tensor):
        return structure.flatten()
    return joined(structure.values() if isinstance(structure, dict) else structure)


class TestAlign:
    @given(problems(), half_spaces(), st.lists(st.integers(0, 16), max_size=4).map(sorted))
    def test_how_the_parameters_are_split_does_not_matter(self, problem, rule, cuts):
        vectors = [torch.tensor(vector) for vector in (problem.gradient, *problem.guides)]
        gradient, *guides = (pieces(vector, cuts) for vector in vectors)
        assert_near(joined(align(gradient, guides, rule)), problem.aligned(rule), 1e-8, problem.gradient)

    @pytest.mark.parametrize("structure", STRUCTURES)
    @EVERY_RULE
    def test_keeps_the_structure_of_the_gradient(self, structure, rule):
        vectors = torch.randn(3, 16, dtype=torch.float64)
        gradient, *guides = map(STRUCTURES[structure], vectors)
        aligned = align(gradient, guides, rule)
        assert type(aligned) is type(gradient)
        expected = STRUCTURES[structure](align(vectors[0], list(vectors[1:]), rule))
        torch.testing.assert_close(aligned, expected)  # shapes and keys included

    def test_mappings_match_by_key(self):
        gradient = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
        guide = {"weight": -gradient["weight"], "bias": -gradient["bias"]}
        aligned = align(gradient, [dict(reversed(guide.items()))], Orthogonal())
        assert list(aligned) == ["weight", "bias"]
        torch.testing.assert_close(aligned, {name: torch.zeros_like(gradient[name]) for name in gradient})

    def test_dtypes_may_differ_from_tensor_to_tensor(self):
        gradient = [torch.randn(8).to(dtype) for dtype in DTYPES]
        aligned = align(gradient, [[-tensor.double() for tensor in gradient]])
        assert [tensor.dtype for tensor in aligned] == DTYPES
        assert float(joined([tensor.double() for tensor in aligned]).abs().max()) < 1e-5

    @pytest.mark.parametrize("gradient", [torch.tensor([1.0, -0.0]), [torch.ones(2)], {"a": torch.ones(2)}])
    def test_without_guides_returns_the_gradient_itself(self, gradient):
        assert align(gradient, []) is gradient

    def test_changes_no_argument(self):
        vectors = torch.randn(3, 16)
        before = vectors.clone()
        align(vectors[0], [vectors[1], vectors[2]], HalfSpace(0.5))
        assert bits(vectors) == bits(before)

    @EVERY_RULE
    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    @given(problem=generic_problems(max_guides=3))
    def test_a_guide_that_is_not_finite_is_ignored(self, rule, value, problem):
        gradient, guides = problem.tensors(torch.float64)
        bad = torch.cat([gradient[:-1], torch.tensor([value])])
        assert bits(align(gradient, [bad], rule)) == bits(gradient)
        zero = torch.zeros_like(gradient)
        assert bits(align(gradient, [*guides, bad], rule)) == bits(align(gradient, [*guides, zero], rule))

    @pytest.mark.parametrize("rule", [*RULES.values(), lambda gramian: gramian[0] * NAN])
    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    def test_a_gradient_that_is_not_finite_passes(self, rule, value):
        gradient = torch.tensor([1.0, -0.0, value])
        assert bits(align(gradient, [torch.tensor([-1.0, 2.0, 3.0])], rule)) == bits(gradient)

    def test_a_rule_must_return_one_weight_a_gradient(self):
        with pytest.raises(ValueError, match=r"rule must return one weight for each gradient, \(2,\), not \(2, 2\)"):
            align(torch.ones(3), [torch.ones(3)], lambda gramian: gramian)

    @pytest.mark.parametrize("count", [1, 3])
    @EVERY_RULE
    def test_compiles_without_a_graph_break(self, rule, count):
        torch.compiler.reset()
        vectors = list(torch.randn(1 + count, 12))
        compiled = torch.compile(partial(align, rule=rule), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(vectors[0], vectors[1:]), align(vectors[0], vectors[1:], rule))


class TestGramian:
    @pytest.mark.parametrize("dtype", DTYPES)
    @given(generic_problems(), st.lists(st.integers(0, 16), max_size=3).map(sorted))
    def test_equals_the_float64_products(self, dtype, problem, cuts):
        gradient, guides = problem.tensors(dtype)
        vectors = torch.stack([gradient, *guides])
        result = gramian([pieces(vector, cuts) for vector in vectors])
        reference = vectors.double() @ vectors.double().T
        assert result.dtype == torch.float64
        assert_near(result, reference, 1e-6 if dtype != torch.float64 else 1e-14)
        assert torch.equal(result, result.T)

    @pytest.mark.parametrize("lengths", [(1e-20, 1e-20), (1e15, 1e15), (1e-20, 1e15), (1e15, 1e-20)])
    def test_neither_overflows_nor_vanishes_in_float32(self, lengths):
        unit = torch.nn.functional.normalize(torch.randn(2, 1000, dtype=torch.float64))
        vectors = [vector.mul(length).float() for vector, length in zip(unit, lengths, strict=True)]
        reference = torch.stack(vectors).double() @ torch.stack(vectors).double().T
        torch.testing.assert_close(gramian(vectors), reference, rtol=1e-4, atol=0)

    def test_sums_many_small_products_in_float32_or_wider(self):
        ones = torch.ones(100_000, dtype=torch.float16)
        assert_near(gramian([ones, -ones]), [[1e5, -1e5], [-1e5, 1e5]], 1e-4)

    def test_takes_tensors_that_are_not_contiguous(self):
        matrices = torch.randn(2, 6, 4, dtype=torch.float64)
        transposed = [matrix.T for matrix in matrices]
        torch.testing.assert_close(gramian(transposed), gramian(list(matrices)))

    def test_one_gradient_has_its_squared_norm(self):
        assert gramian([torch.tensor([3.0, 4.0])]).tolist() == [[25.0]]


class TestLargeAndSmallTensors:
    """On a CPU large tensors are worked on in chunks and small ones joined: neither shows."""

    SHAPES = ((300, 1000), (7,), (_CHUNK,), (_CHUNK + 1,), (0,), (3, 5), *[(11,)] * 200, (2, _CHUNK))

    def gradients(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        return [[torch.randn(shape, generator=generator).to(dtype) for shape in self.SHAPES] for _ in range(3)]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gramian(self, dtype):
        gradients = self.gradients(dtype)
        matrix = torch.stack([joined(gradient) for gradient in gradients]).double()
        # Squares of numbers of few bits round alike: their sum is less exact, and still far more than they are.
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2e-5)
        assert_near(gramian(gradients), matrix @ matrix.T, tolerance)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_combine(self, dtype):
        gradients, weights = self.gradients(dtype), torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
        gradients[1][0][0, 0] = -0.0
        result = combine(gradients, weights)
        assert [tensor.shape for tensor in result] == [tensor.shape for tensor in gradients[0]]
        for tensor, column in zip(result, zip(*gradients, strict=True), strict=True):
            exact = sum(w * x.double() for w, x in zip(weights, column, strict=True))
            torch.testing.assert_close(tensor, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)

    def test_a_weight_of_zero_leaves_no_trace(self):
        gradient, guide, _ = self.gradients()
        for tensor, poison in zip(gradient, guide, strict=True):
            tensor[..., ::2] = -0.0
            poison[..., ::3] = INF
        assert bits(joined(combine([gradient, guide], torch.tensor([1.0, 0.0])))) == bits(joined(gradient))

    def test_each_small_tensor_keeps_its_precision(self):
        gradient = [torch.randn(8).bfloat16(), torch.randn(8), torch.randn(8)]
        for tensor, before in zip(combine([gradient, gradient], torch.tensor([1.0, 0.0])), gradient, strict=True):
            assert torch.equal(tensor, before)


class TestWritingInPlace:
    @pytest.mark.parametrize("size", [6, _CHUNK], ids=["small", "large"])
    def test_into_the_first_gradient_contiguous_or_not(self, size):
        gradient, guide = ([torch.randn(size, 2).T, torch.randn(size)] for _ in range(2))
        expected = combine([gradient, guide], torch.tensor([2.0, -0.5]))
        storages = [tensor.data_ptr() for tensor in gradient]
        combine_into(gradient, join([gradient, guide]), torch.tensor([2.0, -0.5]), exact=False)
        assert [tensor.data_ptr() for tensor in gradient] == storages
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@EVERY_RULE
@given(problem=problems())
def test_the_rules_keep_the_current_gradient(rule, problem):
    vectors = torch.tensor(np.vstack([problem.gradient, problem.guides]))
    assert rule(vectors @ vectors.T)[0] == 1


def test_a_small_first_weight_is_exact():
    gradient, guide = torch.randn(2, 5)
    aligned = align(gradient, [guide], lambda gramian: torch.tensor([1e-6, 0.0], dtype=torch.float64))
    torch.testing.assert_close(aligned, 1e-6 * gradient)


def test_gradients_are_constants():
    gradient, guide = torch.randn(2, 5, requires_grad=True)
    aligned = align(gradient, [guide], HalfSpace(0.5))
    assert not aligned.requires_grad
    assert torch.equal(aligned, align(gradient.detach(), [guide.detach()], HalfSpace(0.5)))


class TestCombine:
    @pytest.mark.parametrize("structure", STRUCTURES)
    @given(problem=generic_problems(), weights=st.lists(st.floats(-5, 5), min_size=6, max_size=6))
    def test_is_the_weighted_sum(self, structure, problem, weights):
        vectors = torch.tensor(np.vstack([problem.gradient, problem.guides]))
        weights = torch.tensor(weights[: len(vectors)], dtype=torch.float64)
        result = combine([STRUCTURES[structure](vector) for vector in vectors], weights)
        assert_near(flat(result), weights @ vectors, 1e-13, *(weights[:, None] * vectors))

    def test_a_weight_of_zero_leaves_no_trace(self):
        gradient = torch.tensor([1.0, 0.0, -0.0, -0.0, -3.0])
        other = torch.tensor([INF, -INF, NAN, 5.0, 0.0])
        assert bits(combine([gradient, other, -other], torch.tensor([1.0, 0.0, -0.0]))) == bits(gradient)

    def test_takes_tensors_that_are_not_contiguous(self):
        matrices = torch.randn(2, 6, 4)
        weights = torch.tensor([1.0, -0.5])
        transposed = combine([matrix.T for matrix in matrices], weights)
        torch.testing.assert_close(transposed, (matrices[0] - matrices[1] / 2).T)

    def test_half_precision_is_rounded_once(self):
        gradients = [torch.randn(1000).half() for _ in range(4)]
        weights = torch.tensor([1.0, 0.3, -0.7, 1.1], dtype=torch.float64)
        exact = sum(weight * gradient.double() for weight, gradient in zip(weights, gradients, strict=True))
        error = (combine(gradients, weights) - exact).abs()
        assert (error <= 1.01 * 2**-11 * exact.abs() + 2**-20).all()

    @pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()])
    def test_needs_one_weight_a_gradient(self, shape):
        with pytest.raises(ValueError, match=r"weights must be \(2,\), one for each gradient"):
            combine([torch.ones(3), torch.ones(3)], torch.ones(shape))


# What a function calls the gradients of a list that it is given as arguments.
NAMES = {
    gramian: ["gradient 0", "gradient 1", "gradient 2"],
    align: ["gradient", "guides[0]", "guides[1]"],
}


@pytest.mark.parametrize("function", NAMES)
class TestStructureIsChecked:
    VECTOR = torch.ones(3)

    @staticmethod
    def call(function, gradients):
        return align(gradients[0], gradients[1:]) if function is align else function(gradients)

    @pytest.mark.parametrize(
        ("last", "message"),
        [
            ({"a": VECTOR}, "has other keys than"),
            ({"a": VECTOR, "c": VECTOR}, "has other keys than"),
            ({"a": VECTOR, "b": VECTOR, "c": VECTOR}, "has other keys than"),
            ([VECTOR, VECTOR], "is no mapping,"),
            ({"a": VECTOR, "b": torch.ones(3, 1)}, "has other shapes than"),
        ],
    )
    def test_against_a_mapping(self, function, last, message):
        gradient = {"a": self.VECTOR, "b": self.VECTOR}
        first, _, name = NAMES[function]
        with pytest.raises(ValueError, match=re.escape(f"{name} {message} {first}")):
            self.call(function, [gradient, gradient, last])

    @pytest.mark.parametrize(
        ("last", "message"),
        [
            ([VECTOR], "has other shapes than"),
            ([VECTOR, VECTOR, VECTOR], "has other shapes than"),
            ([VECTOR, torch.ones(4)], "has other shapes than"),
            ({"a": VECTOR, "b": VECTOR}, "has other keys than"),
        ],
    )
    def test_against_a_sequence(self, function, last, message):
        first, name, _ = NAMES[function]
        with pytest.raises(ValueError, match=re.escape(f"{name} {message} {first}")):
            self.call(function, [[self.VECTOR, self.VECTOR], last])

    @pytest.mark.parametrize("gradient", [[], {}, [1.0, 2.0], [None], None, torch.arange(3), torch.ones(2).cfloat()])
    def test_a_gradient_is_made_of_float_tensors(self, function, gradient):
        with pytest.raises(TypeError, match=f"a gradient must be a float tensor.*; {NAMES[function][0]} is not"):
            self.call(function, [gradient, gradient])


@pytest.mark.parametrize("rule", [HalfSpace, Orthogonal, "half space", None])
def test_a_rule_is_an_instance(rule):
    with pytest.raises(TypeError, match="rule must be"):
        align(torch.ones(3), [torch.ones(3)], rule)


def test_gramian_refuses_no_gradients():
    with pytest.raises(ValueError, match="gradients is empty"):
        gramian([])
