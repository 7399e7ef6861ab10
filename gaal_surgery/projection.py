"""The two passes over the gradients' memory: their Gramian, and their weighted sum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from gaal_surgery.surgery import HalfSpace, current_only

# What float32 can hold is what the squares of norms from 1e-20 to 1e15 need, once multiplied by this.
_SHIFT = 2.0**20
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


@torch.no_grad()
def gramian(gradients: Sequence[Gradient]) -> Tensor:
    """All inner products of ``n`` gradients of one structure: the only thing a rule sees.

    Gradients are constants, here and in :func:`combine`. Products are taken in float32 or wider, chunk by chunk, and
    summed in float64, so that gradients of any float dtype and of norms from 1e-20 to 1e15 neither overflow nor vanish.

    Returns:
        ``(n, n)``, float64 (float32 on devices without it), on the gradients' device.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors.
        ValueError: there is no gradient, or they differ in keys, length or shapes.
    """
    rows = _rows(gradients)
    pairs = [(i, j) for i in range(len(rows)) for j in range(i, len(rows))]
    products = dict(zip(pairs, _products(rows, pairs).unbind(), strict=True))
    entries = [products[min(i, j), max(i, j)] for i in range(len(rows)) for j in range(len(rows))]
    return torch.stack(entries).view(len(rows), len(rows))


def _products(rows: list[list[Tensor]], pairs: list[tuple[int, int]]) -> Tensor:
    """The inner product of each pair of rows."""
    wide = torch.float32 if rows[0][0].device.type == "mps" else torch.float64
    if torch.compiler.is_compiling():  # which makes one pass of it
        products = [[(x.to(wide) * y.to(wide)).sum() for x, y in zip(rows[i], rows[j], strict=True)] for i, j in pairs]
        return torch.stack([torch.stack(parts).sum() for parts in products])
    dots = []
    for vectors in map(_flatten, _groups(rows)):
        (space,) = _workspace(vectors, 1)
        for pieces in _chunks(vectors):
            for i, piece in enumerate(pieces):
                shifted = torch.mul(piece, _SHIFT, out=space[: len(piece)])
                dots += [torch.dot(shifted, other) for other in pieces[i:]]
    return torch.stack(dots).to(wide).view(-1, len(pairs)).sum(dim=0) / _SHIFT


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
    first, *_ = _rows(gradients)
    result = cast(Gradient, _like(gradients[0], [torch.empty_like(tensor) for tensor in first]))
    combine_into(result, gradients, weights)
    return result


@torch.no_grad()
def combine_into(destination: Gradient, gradients: Sequence[Gradient], weights: Tensor) -> None:
    """Write what :func:`combine` returns into the tensors of ``destination``, which may be the first gradient."""
    rows = _rows([destination, *gradients])
    if weights.shape != (len(gradients),):
        raise ValueError(f"weights must be ({len(gradients)},), one for each gradient, not {tuple(weights.shape)}")
    if torch.compiler.is_compiling():
        for output, *column in zip(*rows, strict=True):
            output.copy_(_fused_sum(column, weights))
        return
    for outputs, *parts in _groups(rows):
        in_place = len(outputs) == 1 and outputs[0].is_contiguous()
        result = outputs[0].view(-1) if in_place else outputs[0].new_empty(sum(map(Tensor.numel, outputs)))
        _combine_vectors(result, _flatten(parts), weights)
        if not in_place:
            for output, part in zip(outputs, torch.split(result, [*map(Tensor.numel, outputs)]), strict=True):
                output.copy_(part.view(output.shape))


def _fused_sum(column: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of tensors of one shape, as a compiler makes one pass of it."""
    dtype = _wide_dtype(column)
    total = column[0].to(dtype) * weights[0]
    for guide, weight in zip(column[1:], weights[1:], strict=True):
        total = torch.where(weight != 0, torch.addcmul(total, guide.to(dtype), weight), total)
    return total


def _combine_vectors(output: Tensor, vectors: Sequence[Tensor], weights: Tensor) -> None:
    """The weighted sum of vectors, into one that may be the memory of the first."""
    dtype = _wide_dtype(vectors)
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    # As in _fused_sum, but torch.where takes four times as long on a CPU: in the place of a guide with weight 0 stands
    # -1 times a guide whose bits are cleared, as adding -0.0 changes nothing.
    kept = weights != 0
    masks = (-kept.to(bits)).unbind()[1:]
    factors = torch.where(kept, weights, -1).to(dtype).unbind()[1:]
    first = weights[0].to(dtype)
    cleared, sums = _workspace(vectors, 2)
    for target, (current, *guides) in zip(torch.split(output, _chunk_size(output)), _chunks(vectors), strict=True):
        total = target if target.dtype == dtype else sums[: len(target)]
        torch.mul(current, first, out=total)
        for guide, mask, factor in zip(guides, masks, factors, strict=True):
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


def _groups(rows: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """The rows in parts: each large tensor by itself, small ones of a dtype together until they make a chunk."""
    start = size = 0
    for position, tensor in enumerate(rows[0]):
        together = size + tensor.numel() <= _CHUNK and tensor.dtype == rows[0][start].dtype
        if start < position and not together:
            yield [row[start:position] for row in rows]
            start, size = position, 0
        size += tensor.numel()
    yield [row[start:] for row in rows]


def _flatten(parts: list[list[Tensor]]) -> list[Tensor]:
    """Each list of tensors as a vector."""
    return [part[0].reshape(-1) if len(part) == 1 else torch.cat([x.reshape(-1) for x in part]) for part in parts]


def _chunks(vectors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Pieces of vectors of one length side by side, in one dtype of float32 or wider."""
    dtype, size = _wide_dtype(vectors), _chunk_size(vectors[0])
    for pieces in zip(*(torch.split(vector, size) for vector in vectors), strict=True):
        yield [piece.to(dtype) for piece in pieces]


def _workspace(vectors: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Room for a piece, so many times: memory that is allocated anew has to be fetched anew."""
    size = min(_chunk_size(vectors[0]), len(vectors[0]))
    return vectors[0].new_empty(count, size, dtype=_wide_dtype(vectors)).unbind()


def _wide_dtype(vectors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [vector.dtype for vector in vectors], torch.float32)


def _chunk_size(vector: Tensor) -> int:
    """On a CPU, elements that stay in its cache from one operation to the next; elsewhere all."""
    return _CHUNK if vector.device.type == "cpu" else max(1, len(vector))
