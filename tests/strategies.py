"""What the tests share: random surgery problems, an independent solver, and what tensors may be compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from gaal_surgery import HalfSpace, align, surgery

RULES = {name: rule() for name, rule in surgery.RULES.items()}
RULES |= {
    "margin": HalfSpace(0.3),
    "relative_margin": HalfSpace(0.3, relative=True),
    "negative_margin": HalfSpace(-0.3),
}
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@dataclass(frozen=True)
class Problem:
    """A gradient ``(n,)`` and its guides ``(m, n)``, in float64."""

    gradient: np.ndarray
    guides: np.ndarray

    def required(self, rule: HalfSpace) -> np.ndarray:
        """What the inner product with each guide must reach."""
        if not rule.relative:
            return np.full(len(self.guides), rule.margin)
        return rule.margin * np.linalg.norm(self.gradient) * np.linalg.norm(self.guides, axis=1)

    def aligned(self, rule: Any) -> np.ndarray:
        """What the library makes of it."""
        return align(torch.tensor(self.gradient), list(torch.tensor(self.guides)), rule).numpy()

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        return torch.tensor(self.gradient).to(dtype), list(torch.tensor(self.guides).to(dtype))


def nearest(problem: Problem, required: np.ndarray) -> np.ndarray | None:
    """The nearest point of the half-spaces, None where they have none in common.

    Least distance programming as non-negative least squares (Lawson and Hanson, 1974, chapter 23).
    """
    norms = np.linalg.norm(problem.guides, axis=1)
    unit = problem.guides[norms > 0] / norms[norms > 0, None]
    shortfall = required[norms > 0] / norms[norms > 0] - unit @ problem.gradient
    if (shortfall <= 0).all():
        return problem.gradient
    scale = np.abs(shortfall).max()
    system = np.vstack([unit.T, shortfall / scale])
    residual = system @ nnls(system, np.eye(len(system))[-1])[0] - np.eye(len(system))[-1]
    if np.linalg.norm(residual) < 1e-7:
        return None
    return problem.gradient - scale * residual[:-1] / residual[-1]


def nearest_within_reach(problem: Problem, rule: HalfSpace) -> np.ndarray:
    """The nearest point that the rule promises: margins that cannot be met together count as 0."""
    point = nearest(problem, problem.required(rule))
    if point is None:
        point = nearest(problem, np.zeros(len(problem.guides)))
    assert point is not None
    return point


@st.composite
def generic_problems(draw: st.DrawFn, max_guides: int = 5, dimension: int = 16) -> Problem:
    """Vectors in general position."""
    normal = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal
    return Problem(normal(dimension), normal((draw(st.integers(1, max_guides)), dimension)))


@st.composite
def dependent_problems(draw: st.DrawFn, max_guides: int = 5) -> Problem:
    """Guides that combine a few vectors of small integers: duplicates, opposites, sums, multiples and zeros abound."""
    dimension = draw(st.integers(1, 5))
    vector = st.lists(st.integers(-3, 3), min_size=dimension, max_size=dimension)
    basis = np.array(draw(st.lists(vector, min_size=1, max_size=3)), dtype=float)
    row = st.lists(st.integers(-2, 2), min_size=len(basis), max_size=len(basis))
    combinations = np.array(draw(st.lists(row, min_size=1, max_size=max_guides)), dtype=float)
    return Problem(np.array(draw(vector), dtype=float), combinations @ basis)


@st.composite
def rounded_problems(draw: st.DrawFn, max_guides: int = 8) -> Problem:
    """Guides of any rank, dependent or opposed but for their rounding to float32, of any length."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count, rank = draw(st.integers(2, max_guides)), draw(st.integers(1, 8))
    dimension = draw(st.integers(rank, 12))
    vectors = torch.randn(count + 1, rank, generator=generator) @ torch.randn(rank, dimension, generator=generator)
    if draw(st.booleans()):
        vectors[0] = torch.randn(dimension, generator=generator)  # outside the span of the guides
    for one, other in draw(st.lists(st.tuples(st.integers(1, count), st.integers(1, count)), max_size=2)):
        vectors[one] = -vectors[other]  # exactly opposed
    lengths = draw(st.lists(st.integers(-10, 10), min_size=count + 1, max_size=count + 1))
    vectors *= torch.tensor([10.0**length for length in lengths])[:, None]
    return Problem(vectors[0].double().numpy(), vectors[1:].double().numpy())


def problems(max_guides: int = 5) -> st.SearchStrategy[Problem]:
    """Surgery problems, degenerate ones included."""
    return generic_problems(max_guides) | dependent_problems(max_guides)


def half_spaces() -> st.SearchStrategy[HalfSpace]:
    """The paper's rule with margins of both kinds."""
    return st.builds(HalfSpace, margin=st.sampled_from([0.0, -0.25, 0.05, 0.5, 2.0]), relative=st.booleans())


def scale_free_half_spaces() -> st.SearchStrategy[HalfSpace]:
    """Those whose result keeps its direction when the gradients change their lengths."""
    return st.builds(HalfSpace, margin=st.sampled_from([0.0, 0.1, 0.7]), relative=st.just(True))


def assert_near(actual: Any, expected: Any, tolerance: float, *scales: Any) -> None:
    """Equal up to ``tolerance`` times the longest of ``expected`` and ``scales``."""
    actual, expected = np.asarray(actual, dtype=float), np.asarray(expected, dtype=float)
    longest = max(np.linalg.norm(scale) for scale in (expected, *scales))
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) <= tolerance * longest


def bits(tensor: Tensor) -> list[int]:
    """The bytes of a tensor: -0.0 differs from 0.0, NaN equals itself."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()
