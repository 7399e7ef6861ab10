"""The rules of surgery: from the Gramian of the gradients to the weights of their sum.

A rule is a callable ``(n, n) -> (n,)``. Row 0 is the current gradient g, the others are its guides p_i; the aligned
gradient is the weighted sum. It is the signature of TorchJD's Gramian weightings, any of which is a rule too. A rule
with the attribute ``keeps_current = True`` promises that its first weight is always 1, which saves a pass over g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# Squared sine under which a guide counts as a combination of others: what rounding to float32 leaves is below 1e-14.
_DEPENDENT = 1e-13
_FEASIBLE = 1e-9
_MOST_GUIDES = 12


@dataclass(frozen=True)
class HalfSpace:
    """The nearest gradient whose inner product with every guide reaches its margin (Eqs. 3-5 of the paper).

    For one guide that is ``g + max(0, (eps - g.p) / |p|^2) p``; at margin 0 it never lengthens g, and it is A-GEM's
    rule. For several guides the quadratic program is solved exactly, by comparing the solutions of all ``2^m`` sets of
    active constraints. A guide of norm 0 asks for nothing. Where no point reaches every margin (opposed guides), the
    margins shrink together to the largest feasible fraction; as margins scale freely with the length of the gradient,
    that fraction is 0.

    Args:
        margin: the eps of Eq. 3. An absolute margin above 0 makes the result long where a guide is short.
        relative: take ``margin * |g| * |p_i|`` for eps instead, with ``|g|`` before surgery: the margin is a cosine.

    Raises:
        TypeError: the margin is not a number.
        ValueError: the margin is not finite, or there are more than 12 guides.
    """

    margin: float = 0.0
    relative: bool = False
    keeps_current: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_finite("margin", self.margin)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights ``(n,)`` for a Gramian ``(n, n)``."""
        alignment = gramian[0, 1:]
        squared_norms = gramian.diagonal()[1:]
        if self.relative:
            required = self.margin * (gramian[0, 0].sqrt() * squared_norms.sqrt())
        else:
            required = torch.full_like(alignment, self.margin)
        if len(alignment) == 1:
            shortfall = (required - alignment).clamp(min=0)
            multipliers = torch.where(squared_norms > 0, shortfall / squared_norms, 0)
        else:
            multipliers = _nearest_multipliers(gramian[1:, 1:], alignment, required)
        return _keep_current(multipliers)


@dataclass(frozen=True)
class DualFloor:
    """What the authors' released code does: GEM's program with a floor under its dual variable, not under g.p.

    Only where ``g.p < 0``, adds ``max(floor, -g.p / (|p|^2 + ridge)) p``. Several guides act each by itself, against g.

    Args:
        floor: least multiple of the guide that is added.
        ridge: added to the squared norm of the guide; it leaves part of the conflict where guides are short.

    Raises:
        TypeError: floor or ridge is not a number.
        ValueError: floor or ridge is negative or not finite.
    """

    floor: float = 0.75
    ridge: float = 1e-3
    keeps_current: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("floor", "ridge"):
            value = getattr(self, name)
            _check_finite(name, value)
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights ``(n,)`` for a Gramian ``(n, n)``."""
        alignment = gramian[0, 1:]
        multipliers = (-alignment / (gramian.diagonal()[1:] + self.ridge)).clamp(min=self.floor)
        return _keep_current(torch.where(alignment < 0, multipliers, 0))


@dataclass(frozen=True)
class Orthogonal:
    """g minus its projection on the span of the guides, whatever the sign of the conflict: MLA's idea on gradients."""

    keeps_current: ClassVar[bool] = True

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights ``(n,)`` for a Gramian ``(n, n)``."""
        unit, inverse_norms = _normalised(gramian[1:, 1:])
        everywhere = torch.ones(1, len(unit), dtype=torch.bool, device=gramian.device)
        coordinates = _solve(unit, (gramian[0, 1:] * inverse_norms)[:, None], everywhere)
        return _keep_current(-coordinates[0, :, 0] * inverse_norms)


def keeps_current(rule: object) -> bool:
    """Whether the rule promises 1 for its first weight."""
    return getattr(rule, "keeps_current", False)


def current_only(weights: Tensor) -> Tensor:
    """The weights ``(n,)`` that keep the current gradient as it is: 1, 0, ..., 0."""
    return (torch.arange(len(weights), device=weights.device) == 0).to(weights.dtype)


def _nearest_multipliers(guides: Tensor, alignment: Tensor, required: Tensor) -> Tensor:
    """Multipliers ``(m,)`` of the nearest point of ``m`` half-spaces: the dual of Eq. 4, exact and without a branch.

    Args:
        guides: ``(m, m)``, the Gramian of the guides.
        alignment: ``(m,)``, their inner products with g.
        required: ``(m,)``, what those must reach.
    """
    count = len(alignment)
    if count > _MOST_GUIDES:
        raise ValueError(f"HalfSpace takes at most {_MOST_GUIDES} guides, not {count}: use guides='previous'")
    unit, inverse_norms = _normalised(guides)
    # Beside the program itself, the one without margins, for where the margins cannot be met together.
    shortfall = torch.stack([required - alignment, -alignment], dim=1) * inverse_norms[:, None]
    bits = torch.arange(count, device=guides.device)
    active = (torch.arange(2**count, device=guides.device)[:, None] >> bits) % 2 == 1
    multipliers = _solve(unit, shortfall, active)
    slack = unit @ multipliers - shortfall
    violation = torch.minimum(multipliers, slack).clamp(max=0).abs().amax(dim=1).nan_to_num(torch.inf)
    smallest, best = violation.min(dim=0)
    chosen = multipliers.take_along_dim(best.view(1, 1, 2), dim=0)[0].clamp(min=0)
    feasible = smallest[0] <= _FEASIBLE * shortfall[:, 0].abs().amax()
    return torch.where(feasible, chosen[:, 0], chosen[:, 1]) * inverse_norms


def _normalised(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """The Gramian of the unit vectors and the inverse norms; a vector of norm 0 keeps 0 in both."""
    norms = gramian.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return gramian * inverse * inverse[:, None], inverse


def _solve(matrix: Tensor, rhs: Tensor, active: Tensor) -> Tensor:
    """Solve ``(m, m)`` positive semi-definite systems restricted to each set of unknowns; the others are 0.

    Gauss-Jordan elimination over all sets at once, without a branch or a synchronisation (LAPACK's drivers check for
    errors on the host). An unknown whose pivot vanishes depends on earlier ones and stays 0.

    Args:
        matrix: ``(m, m)`` with unit (or zero) diagonal.
        rhs: ``(m, r)``.
        active: ``(s, m)`` booleans.

    Returns:
        ``(s, m, r)``.
    """
    tableau = torch.cat([matrix, rhs], dim=1).expand(len(active), -1, -1)
    rows = torch.arange(len(matrix), device=matrix.device)
    for j in range(len(matrix)):
        pivot = tableau[:, j, j]
        usable = active[:, j] & (pivot > _DEPENDENT)
        scale = torch.where(usable, 1 / pivot, 0)
        pivot_row = torch.where(usable[:, None], tableau[:, j] * scale[:, None], 0)
        eliminated = tableau - tableau[:, :, j, None] * pivot_row[:, None]
        tableau = torch.where((rows == j)[:, None], pivot_row[:, None], eliminated)
    return tableau[:, :, len(matrix) :]


def _keep_current(multipliers: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(multipliers[:1]), multipliers])


def _check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
