"""The two passes over the gradients' memory: their Gramian, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from gaal_surgery.surgery import HalfSpace, current_only

# What float32 can hold is what the squares of norms from 1e-20 to 1e15 need, once multiplied by the square of this.
_SHIFT = 2.0**10
_CHUNK = 2**17

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

    Products are taken in float32 or wider, chunk by chunk, and summed in float64, so that gradients of any float dtype
    and of norms from 1e-20 to 1e15 neither overflow nor vanish.

    Returns:
        ``(n, n)``, float64 (float32 on devices without it), on the gradients' device.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors.
        ValueError: there is no gradient, or they differ in keys, length or shapes.
    """
    rows = _rows(gradients)
    pairs = [(i, j) for i in range(len(rows)) for j in range(i, len(rows))]
    parts = []
    for column in zip(*rows, strict=True):
        spaces = _workspace(column, len(column))
        for pieces in _chunks(column):
            shifted = [
                torch.mul(piece, _SHIFT, out=space[: len(piece)]) for piece, space in zip(pieces, spaces, strict=True)
            ]
            parts.append(torch.stack([torch.dot(shifted[i], shifted[j]) for i, j in pairs]))
    products = dict(zip(pairs, (_sum(parts) / _SHIFT**2).unbind(), strict=True))
    entries = [products[min(i, j), max(i, j)] for i in range(len(rows)) for j in range(len(rows))]
    return torch.stack(entries).view(len(rows), len(rows))


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
    first = _row(gradients[0].values() if isinstance(gradients[0], Mapping) else gradients[0])
    result = cast(Gradient, _like(gradients[0], [torch.empty_like(tensor) for tensor in first]))
    combine_into(result, gradients, weights)
    return result


def combine_into(destination: Gradient, gradients: Sequence[Gradient], weights: Tensor) -> None:
    """Write what :func:`combine` returns into the tensors of ``destination``, which may be the first gradient."""
    outputs, *rows = _rows([destination, *gradients])
    if weights.shape != (len(rows),):
        raise ValueError(f"weights must be ({len(rows)},), one for each gradient, not {tuple(weights.shape)}")
    for output, column in zip(outputs, zip(*rows, strict=True), strict=True):
        if output.is_contiguous():
            _combine_column(output.view(-1), column, weights)
        else:
            flat = output.new_empty(output.numel())
            _combine_column(flat, column, weights)
            output.copy_(flat.view(output.shape))


def _combine_column(output: Tensor, column: Sequence[Tensor], weights: Tensor) -> None:
    """The weighted sum of tensors of ``(*shape)`` into ``(n,)``, which may be the memory of the first."""
    dtype = _wide_dtype(column)
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    # In the place of a guide with weight 0 stands -1 times a guide whose bits are cleared, as adding -0.0 changes
    # nothing. (torch.where would do, and takes four times as long on a CPU.)
    masks = -(weights != 0).to(bits)
    first, *factors = torch.where(weights != 0, weights, -1).to(dtype).unbind()
    first = weights[0].to(dtype)
    cleared, sums = _workspace(column, 2)
    for target, (current, *guides) in zip(torch.split(output, _chunk_size(output)), _chunks(column), strict=True):
        total = target if target.dtype == dtype else sums[: len(target)]
        torch.mul(current, first, out=total)
        for guide, mask, factor in zip(guides, masks[1:].unbind(), factors, strict=True):
            space = cleared[: len(guide)]
            torch.bitwise_and(guide.view(bits), mask, out=space.view(bits))
            total.addcmul_(space, factor)
        if total is not target:
            target.copy_(total)


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


def _chunks(column: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of tensors of one shape side by side, in one dtype of float32 or wider."""
    dtype, size = _wide_dtype(column), _chunk_size(column[0])
    for pieces in zip(*(torch.split(tensor.reshape(-1), size) for tensor in column), strict=True):
        yield [piece.to(dtype) for piece in pieces]


def _workspace(column: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Room for a piece, so many times: memory that is allocated anew has to be fetched anew."""
    size = min(_chunk_size(column[0]), column[0].numel())
    return column[0].new_empty(count, size, dtype=_wide_dtype(column)).unbind()


def _wide_dtype(column: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for tensor in column:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _chunk_size(tensor: Tensor) -> int:
    """On a CPU, elements that stay in its cache from one operation to the next; elsewhere, and if compiled, all."""
    whole = torch.compiler.is_compiling() or tensor.device.type != "cpu"
    return max(1, tensor.numel()) if whole else _CHUNK


def _sum(parts: list[Tensor]) -> Tensor:
    dtype = torch.float32 if parts[0].device.type == "mps" else torch.float64
    return torch.stack([part.to(dtype) for part in parts]).sum(dim=0)
