"""The rules of surgery, and how a rule is called: from the Gramian of the gradients to the weights of their sum.

A rule is a callable ``(n, n) -> (n,)``. Row 0 is the current gradient g. The other rows are the guide gradients p_i.
The aligned gradient is the weighted sum of all rows. TorchJD's Gramian weightings have this signature too, so each of
them can serve as a rule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import mul

import torch
from torch import Tensor

Rule = Callable[[Tensor], Tensor]

_DEPENDENT = 1e-11  # squared sine under which a guide counts as a combination of others
_MOST_GUIDES = 12


@dataclass(frozen=True)
class HalfSpace:
    """The paper's rule: the nearest gradient whose inner product with every guide reaches a margin (Eqs. 3-5).

    The *margin* eps is the least inner product that the result may have with a guide's gradient. One guide p turns the
    gradient g into ``g + max(0, (eps - g.p) / |p|^2) p``. At margin 0 this is A-GEM's rule, and the result is never
    longer than g. Several guides give a quadratic program, which is solved exactly. A guide of norm 0 asks for nothing.

    Opposed guides may leave no point that reaches every margin. The rule then uses margin 0 for this step. Smaller
    positive margins would not help: if a point reached them, a multiple of the point would reach the full margins.
    Margins also count as out of reach where g would have to change by thousands of times what the guides lack.

    Args:
        margin: the eps of Eq. 3. An absolute margin above 0 makes the result long where a guide is short.
        relative: use ``margin * |g| * |p_i|`` for eps, with ``|g|`` from before surgery. The margin is then a cosine.

    Raises:
        TypeError: the margin is not a number.
        ValueError: the margin is not finite, or there are more than 12 guides.

    Example:
        >>> align(torch.tensor([1.0, 0.0]), [torch.tensor([-1.0, 1.0])], HalfSpace())
        tensor([0.5000, 0.5000])
    """

    margin: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        check_number("margin", self.margin, math.isfinite, "a number", "a finite number")

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights ``(n,)`` for a Gramian ``(n, n)``."""
        guides = len(gramian) - 1
        if guides > _MOST_GUIDES:
            raise ValueError(f"HalfSpace takes at most {_MOST_GUIDES} guides, not {guides}: use guides='previous'")
        if on_host(gramian) and (multipliers := self._in_plain_numbers(gramian.tolist())) is not None:
            return gramian.new_tensor([1.0, *multipliers])
        if guides == 1:  # few operations, as a device launches each of them
            wide = gramian.to(widest(gramian.device))
            squares = wide.diagonal()
            margin = self.margin * squares.sqrt().prod() if self.relative else self.margin
            weights = ((margin - wide[0]) / squares).clamp(min=0).nan_to_num(0.0, 0.0)  # 0 for a guide of length 0
            weights[0].fill_(1)
            return weights
        unit, products, inverse = _unit_guides(gramian)
        margins = gramian[0, 0].sqrt() * (inverse > 0) if self.relative else inverse
        lacking = self.margin * margins - products
        if self.margin <= 0:
            added = _nonnegative(unit, lacking)
        else:
            precision = math.sqrt(torch.finfo(gramian.dtype).eps)
            added = _reach_or(_nonnegative(unit, -products), unit, lacking, precision)
        return _keep_current(added * inverse)

    def _in_plain_numbers(self, gramian: list[list[float]]) -> list[float] | None:
        """The multipliers, computed ten times as fast as by tensors on a CPU; None where the program is hard."""
        norms = [math.sqrt(row[i]) for i, row in enumerate(gramian)]
        inverse = [1 / norm if norm > 0 else 0.0 for norm in norms[1:]]
        margins = [self.margin * (norms[0] * (x > 0) if self.relative else x) for x in inverse]
        lacking = [margin - product * x for margin, product, x in zip(margins, gramian[0][1:], inverse, strict=True)]
        added = [max(0.0, gap) * x for gap, x in zip(lacking, inverse, strict=True)]
        if len(added) == 1 or not any(added):
            return added
        if self.margin > 0:
            return None
        rows = [row[1:] for row in gramian[1:]]
        for _ in range(100):  # coordinate descent, which ends soon where the guides are far from dependent
            moved = 0.0
            for i, row in enumerate(rows):
                gap = lacking[i] - inverse[i] * sum(map(mul, row, added))
                step = max(-added[i], gap * inverse[i])
                added[i] += step
                moved = max(moved, abs(step * norms[i + 1]))
            if moved <= 1e-15 * max(lacking):
                return added
        return None


@dataclass(frozen=True)
class DualFloor:
    """The rule of the authors' released code: GEM's program with a floor under its dual variable, the guide's multiple.

    The rule acts only in a conflict, ``g.p < 0``. There the rule adds ``max(floor, -g.p / (|p|^2 + ridge)) p`` to g.
    Each of several guides acts on g as if the other guides were absent. The floor is not the margin of Eq. 3, which
    bounds g.p.

    Args:
        floor: least multiple of the guide that is added.
        ridge: added to the squared norm of the guide. The ridge leaves part of the conflict where guides are short.

    Raises:
        TypeError: floor or ridge is not a number.
        ValueError: floor or ridge is negative or not finite.

    Example:
        >>> g, p = torch.tensor([-0.01, 1.0]), torch.tensor([1.0, 0.0])
        >>> align(g, [p], DualFloor())
        tensor([0.7400, 1.0000])
    """

    floor: float = 0.75
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            allowed = "a finite number and must not be negative"
            check_number(name, value, lambda x: 0 <= x < math.inf, "a number", allowed)

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights ``(n,)`` for a Gramian ``(n, n)``."""
        products = gramian[0, 1:]
        multipliers = (-products / (gramian.diagonal()[1:] + self.ridge)).clamp(min=self.floor)
        return _keep_current(torch.where(products < 0, multipliers, 0))


@dataclass(frozen=True)
class Orthogonal:
    """The rule that subtracts from g its projection on the span of the guides: MLA's idea, applied to gradients.

    The rule acts whether or not g and the guides are in conflict.

    Example:
        >>> align(torch.tensor([1.0, 2.0]), [torch.tensor([0.0, 4.0])], Orthogonal())
        tensor([1., 0.])
    """

    def __call__(self, gramian: Tensor) -> Tensor:
        """Weights ``(n,)`` for a Gramian ``(n, n)``."""
        unit, products, inverse = _unit_guides(gramian)
        everything = torch.ones(1, len(unit), dtype=torch.bool, device=gramian.device)
        return _keep_current(-_solve(unit, products, everything)[0] * inverse)


# Every rule of the library, by its name on command lines.
RULES: dict[str, Callable[[], Rule]] = {
    "halfspace": HalfSpace,
    "dualfloor": DualFloor,
    "orthogonal": Orthogonal,
}


def weigh(gramian: Tensor, rule: Rule) -> Tensor:
    """The rule's weights ``(n,)``, with gradients that are not finite kept from the rule.

    A guide that is not finite gets weight 0. A current gradient that is not finite passes unchanged.

    Raises:
        TypeError: the rule does not return a tensor.
        ValueError: the rule does not return one weight for each gradient.
    """
    usable = None
    if not on_host(gramian) or not math.isfinite(gramian.trace()):
        finite, current = gramian.diagonal() < torch.inf, current_only(gramian)
        usable = finite & finite[:, None]
        gramian = torch.where(usable, gramian, current[-1])  # current[-1] is a 0 that is on the device already
    weights = rule(gramian)
    if not isinstance(weights, Tensor):
        raise TypeError(f"rule must return a tensor of weights, not {type(weights).__name__}")
    if weights.shape != gramian.shape[:1]:
        raise ValueError(
            f"rule must return one weight for each gradient, ({len(gramian)},), not {tuple(weights.shape)}"
        )
    # Without a usable current gradient the rule's weights are dropped, and the gradient passes unchanged.
    return weights.to(gramian) if usable is None else torch.where(usable[0], weights.to(gramian), current)


def current_only(gramian: Tensor) -> Tensor:
    """The weights ``(n,)`` that keep the current gradient as it is: 1, 0, ..., 0."""
    return torch.eye(1, len(gramian), dtype=gramian.dtype, device=gramian.device)[0]


def check_function(name: str, function: object) -> None:
    """Raise unless the named argument is callable, and is not a class, passed where an instance was meant."""
    if isinstance(function, type):
        raise TypeError(f"{name} must be an instance, not the class {function.__name__}: pass {function.__name__}()")
    if not callable(function):
        raise TypeError(f"{name} must be callable, not {type(function).__name__}")


def check_number(name: str, value: object, allowed: Callable[[float], bool], kind: str, range_: str) -> None:
    """Raise unless the named argument is a number in its range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {kind}, not {type(value).__name__}")
    if not allowed(value):
        raise ValueError(f"{name} must be {range_}, not {value}")


def _unit_guides(gramian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The guides at length 1: their Gramian ``(m, m)``, products with g ``(m,)`` and inverse lengths ``(m,)``.

    A guide of length 0 has 0 in all three. Guides that depend on other guides leave a rest of rounding in the Gramian.
    The smallest such rest would decide the result, so the rest is taken out: Cholesky's decomposition with pivots
    builds the guides up from the most independent ones, and drops what remains once rounding alone explains the pivot.
    """
    rounding = torch.finfo(gramian.dtype).eps ** 0.7  # 1e-11 in float64; guides in float32 leave rests of about 1e-14
    gramian = gramian.to(widest(gramian.device))
    inverse = gramian.diagonal()[1:].sqrt().reciprocal().nan_to_num(0.0, 0.0)
    unit, products = gramian[1:, 1:] * inverse * inverse[:, None], gramian[0, 1:] * inverse
    if len(unit) == 1:
        return unit, products, inverse
    rest = torch.cat([unit, products[None]])
    for _ in range(len(unit)):
        pivot, guide = rest.diagonal().max(dim=0)
        column = rest.index_select(1, guide[None]) * torch.where(pivot > rounding, pivot.rsqrt(), 0)
        rest = rest - column * column[: len(unit), 0]
    return unit - rest[:-1], products - rest[-1], inverse


def _reach_or(without_margin: Tensor, unit: Tensor, lacking: Tensor, precision: float) -> Tensor:
    """Multipliers of the nearest point that reaches every margin, or ``without_margin`` where no point does.

    This is least distance programming as a non-negative least squares problem, which always has a solution (Lawson and
    Hanson, 1974, chapter 23). The residual is 0 where no point reaches every margin. For a point at distance d, in
    units of the largest lack, the residual is 1 / (1 + d^2).
    """
    most = lacking.amax()
    goal = torch.where(most > 0, lacking / most, -1)
    solution = _nonnegative(unit + goal * goal[:, None], goal)
    residual = 1 - goal @ solution
    return torch.where(residual > precision, most * solution / residual, without_margin)


def _nonnegative(matrix: Tensor, rhs: Tensor) -> Tensor:
    """The ``x >= 0`` that minimises ``x.Ax / 2 - b.x``, for A ``(m, m)`` positive semi-definite and b ``(m,)``.

    All ``2^m`` active sets are solved, and the solution that violates the conditions least is taken. No branch is
    needed.
    """
    count = len(rhs)
    numbers = torch.arange(2**count, device=rhs.device)
    active = (numbers[:, None] >> numbers[:count]) % 2 == 1
    candidates = _solve(matrix, rhs, active)
    violation = torch.minimum(candidates, candidates @ matrix - rhs).clamp(max=0).abs().amax(dim=1)
    best = violation.nan_to_num(torch.inf).argmin()
    return candidates.index_select(0, best[None])[0].clamp(min=0)


def _solve(matrix: Tensor, rhs: Tensor, active: Tensor) -> Tensor:
    """Solve positive semi-definite systems restricted to each set of unknowns; the other unknowns are 0.

    Gauss-Jordan elimination runs over all sets at once, without a branch. LAPACK's drivers would report errors to the
    host. An unknown whose pivot vanishes depends on earlier unknowns and stays 0.

    Args:
        matrix: ``(m, m)`` with unit (or zero) diagonal.
        rhs: ``(m,)``.
        active: ``(s, m)`` booleans.

    Returns:
        ``(s, m)``.
    """
    tableau = torch.cat([matrix, rhs[:, None]], dim=1).expand(len(active), -1, -1)
    rows = torch.arange(len(matrix), device=matrix.device)
    for j in range(len(matrix)):
        pivot = tableau[:, j, j]
        usable = active[:, j] & (pivot > _DEPENDENT)
        scale = torch.where(usable, pivot.reciprocal(), 0)
        pivot_row = torch.where(usable[:, None], tableau[:, j] * scale[:, None], 0)
        eliminated = tableau - tableau[:, :, j, None] * pivot_row[:, None]
        tableau = torch.where((rows == j)[:, None], pivot_row[:, None], eliminated)
    return tableau[:, :, -1]


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_host(tensor: Tensor) -> bool:
    """Whether reading the tensor costs nothing: a CPU tensor outside compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _keep_current(multipliers: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(multipliers[:1]), multipliers])
