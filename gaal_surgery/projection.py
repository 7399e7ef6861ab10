"""The two passes over the gradients' memory: their Gramian, and their weighted sum."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from gaal_surgery.surgery import HalfSpace, current_only, keeps_current

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
    return _combined(gradients, weigh(gramian(gradients), rule), keeps_current(rule))


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
        # Used again for every piece, as memory that is allocated anew has to be fetched anew.
        space = vectors[0].new_empty(min(_chunk_size(vectors[0]), len(vectors[0])), dtype=_wide_dtype(vectors))
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
    return _combined(gradients, weights)


def _combined(gradients: Sequence[Gradient], weights: Tensor, first_is_one: bool = False) -> Gradient:
    current, *_ = _rows(gradients)
    result = cast(Gradient, _like(gradients[0], [torch.empty_like(tensor) for tensor in current]))
    combine_into(result, gradients, weights, first_is_one=first_is_one)
    return result


@torch.no_grad()
def combine_into(
    destination: Gradient, gradients: Sequence[Gradient], weights: Tensor, *, first_is_one: bool = False
) -> None:
    """Write what :func:`combine` returns into the tensors of ``destination``, which may be the first gradient.

    To know that the first weight is 1 saves a pass.
    """
    outputs, current, *guides = _rows([destination, *gradients])
    if weights.shape != (len(gradients),):
        raise ValueError(f"weights must be ({len(gradients)},), one for each gradient, not {tuple(weights.shape)}")
    if not _has_kernel([*outputs, *current, *itertools.chain(*guides)]):
        for output, *column in zip(outputs, current, *guides, strict=True):
            output.copy_(_weighted_sum(column, weights))
        return
    if any(output is not tensor for output, tensor in zip(outputs, current, strict=True)):
        torch._foreach_copy_(outputs, current)
    if not first_is_one:
        torch._foreach_mul_(outputs, weights[0].to(outputs[0].dtype))
    for guide, weight in zip(guides, weights[1:], strict=True):
        _add_unless_zero(outputs, guide, weight)


def _weighted_sum(column: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of tensors of one shape, of any dtypes and layouts; compiled, a single pass."""
    dtype = _wide_dtype(column)
    total = column[0].to(dtype) * weights[0]
    for guide, weight in zip(column[1:], weights[1:], strict=True):
        total = torch.where(weight != 0, torch.addcmul(total, guide.to(dtype), weight), total)
    return total


def _has_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether :func:`_add_unless_zero` takes these tensors; it reads memory as it lies."""
    dtype = tensors[0].dtype
    return (
        not torch.compiler.is_compiling()
        and dtype in (torch.float32, torch.float64)
        and all(x.device.type == "cpu" and x.dtype is dtype and x.is_contiguous() for x in tensors)
    )


def _add_unless_zero(outputs: list[Tensor], tensors: list[Tensor], weight: Tensor) -> None:
    """Add the weighted tensors in place in one pass, or leave the memory alone where the weight is 0.

    That is what the kernel of fused SGD does: it ascends with a tensor for a learning rate, unless it is told that an
    infinity was found. `torch.where` takes four times as long on a CPU.
    """
    torch._fused_sgd_(
        outputs,
        tensors,
        [],
        lr=weight.to(outputs[0].dtype),
        found_inf=(weight == 0).float(),
        maximize=True,
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        is_first_step=False,
    )


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


def _wide_dtype(vectors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [vector.dtype for vector in vectors], torch.float32)


def _chunk_size(vector: Tensor) -> int:
    """On a CPU, elements that stay in its cache from one operation to the next; elsewhere all."""
    return _CHUNK if vector.device.type == "cpu" else max(1, len(vector))
