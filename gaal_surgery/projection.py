"""The two passes over the gradients' memory: their Gramian, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from gaal_surgery.surgery import HalfSpace, current_only

Gradient = TypeVar("Gradient", bound=Tensor | Sequence[Tensor] | Mapping[str, Tensor])
Rule = Callable[[Tensor], Tensor]


def align(gradient: Gradient, guides: Sequence[Gradient], rule: Rule = HalfSpace()) -> Gradient:
    """The current gradient after surgery (Eqs. 3-5 of the paper, for the default rule).

    Args:
        gradient: a tensor, or a sequence or mapping of tensors (the parameters of one module): one vector to the rule.
        guides: gradients of the same structure that it must not hurt; mappings match by key.
        rule: Gramian -> weights.

    Returns:
        The structure of ``gradient``, in its dtypes. Unchanged to the bit where no guide objects, and where it is
        itself not finite; guides that are not finite are ignored.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors.
        ValueError: a guide differs from the gradient in its keys, length or shapes.
    """
    if len(guides) == 0:
        return gradient
    gradients = [gradient, *guides]
    return combine(gradients, weigh(gramian(gradients), rule))


def gramian(gradients: Sequence[Gradient]) -> Tensor:
    """All inner products of ``n`` gradients of one structure: the only thing a rule sees.

    Products are taken of vectors scaled to unit norm in float32 or wider and norms in float64, so that gradients of
    any float dtype and of norms from 1e-20 to 1e15 neither overflow nor vanish.

    Returns:
        ``(n, n)``, float64 (float32 on devices without it), on the gradients' device.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors.
        ValueError: there is no gradient, or they differ in keys, length or shapes.
    """
    rows = _rows(gradients)
    norms = torch.stack([_norm(row) for row in rows])
    inverse = torch.where(norms > 0, 1 / norms, 0)
    result = torch.diag(norms.square())
    for i, row in enumerate(rows):
        unit = [_wide(tensor) * inverse[i] for tensor in row] if i + 1 < len(rows) else []
        for j in range(i + 1, len(rows)):
            # A sum in pairs keeps its precision over millions of elements, where torch.dot in float32 drifts.
            products = [(x * _wide(y)).sum() for x, y in zip(unit, rows[j], strict=True)]
            result[i, j] = result[j, i] = torch.stack(products).sum(dtype=norms.dtype) * norms[i]
    return result


def combine(gradients: Sequence[Gradient], weights: Tensor) -> Gradient:
    """The weighted sum of ``n`` gradients of one structure.

    A weight of exactly 0 leaves no trace of any gradient but the first, whatever it holds (non-finite numbers, signs
    of zeros).

    Args:
        gradients: ``n`` tensors, sequences or mappings of tensors.
        weights: ``(n,)``.

    Returns:
        The structure and the dtypes of the first gradient.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors.
        ValueError: the gradients differ in keys, length or shapes, or there is not one weight for each.
    """
    rows = _rows(gradients)
    if weights.shape != (len(rows),):
        raise ValueError(f"weights must be ({len(rows)},), one for each gradient, not {tuple(weights.shape)}")
    tensors = [_weighted_sum(column, weights) for column in zip(*rows, strict=True)]
    return cast(Gradient, _like(gradients[0], tensors))


def weigh(gramian: Tensor, rule: Rule) -> Tensor:
    """The rule's weights ``(n,)``, kept away from gradients that are not finite: row 0 stays, guides are ignored."""
    finite = gramian.diagonal().isfinite()
    usable = finite & finite[0]
    weights = rule(torch.where(usable & usable[:, None], gramian, 0))
    if weights.shape != gramian.shape[:1]:
        raise ValueError(f"rule must return ({len(gramian)},) weights, one a gradient, not {tuple(weights.shape)}")
    # Without a usable current gradient every weight is refused, so that it passes as it is.
    return torch.where(usable, weights, current_only(weights))


def _rows(gradients: Sequence[Tensor | Sequence[Tensor] | Mapping[str, Tensor]]) -> list[list[Tensor]]:
    """The tensors of every gradient in the order of the first, checked against it."""
    if len(gradients) == 0:
        raise ValueError("gradients is empty: pass at least one")
    keys = list(gradients[0]) if isinstance(gradients[0], Mapping) else None
    rows: list[list[Tensor]] = []
    for position, gradient in enumerate(gradients):
        if isinstance(gradient, Mapping):
            if keys is None or set(gradient) != set(keys):
                raise ValueError(f"gradient {position} has other keys than gradient 0: give them one structure")
            gradient = [gradient[key] for key in keys]
        elif keys is not None:
            raise ValueError(f"gradient {position} is no mapping, gradient 0 is: give them one structure")
        rows.append(_row(gradient))
        if [tensor.shape for tensor in rows[-1]] != [tensor.shape for tensor in rows[0]]:
            raise ValueError(f"gradient {position} has other shapes than gradient 0: give them one structure")
    return rows


def _row(gradient: Tensor | Iterable[Tensor]) -> list[Tensor]:
    row = [gradient] if isinstance(gradient, Tensor) else list(gradient)
    if not row or not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in row):
        raise TypeError("a gradient must be a float tensor, or a non-empty sequence or mapping of float tensors")
    return row


def _like(
    structure: Tensor | Sequence[Tensor] | Mapping[str, Tensor], tensors: list[Tensor]
) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor]:
    if isinstance(structure, Tensor):
        return tensors[0]
    if isinstance(structure, Mapping):
        return dict(zip(structure, tensors, strict=True))
    return tuple(tensors) if isinstance(structure, tuple) else tensors


def _norm(row: list[Tensor]) -> Tensor:
    dtype = torch.float32 if row[0].device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in row])
    )
    return norm


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _weighted_sum(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    total = _wide(tensors[0]) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = torch.where(weight != 0, torch.addcmul(total, tensor.to(total.dtype), weight), total)
    return total.to(tensors[0].dtype)
