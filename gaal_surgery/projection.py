"""The two passes over the gradients' memory: the gradients' Gramian, and their weighted sum.

The public functions check the structure of the gradients. Below them, a gradient is a list of tensors.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gaal_surgery.surgery import HalfSpace, Rule, check_function, on_host, weigh, widest

Gradient = TypeVar("Gradient", bound=Tensor | Sequence[Tensor] | Mapping[str, Tensor])

# So many numbers of a tensor stay in a CPU's cache from one operation to the next.
_CHUNK = 2**17
_CHUNK_ON_DEVICE = 2**24
_BLOCK = 5
_FEW = 8  # the fused kernels read so many tensors in place; more tensors are joined first
# The range of squared norms whose products fit float32, for any spread of the numbers over a tensor.
_SAFE = (1e-24, 1e34)


class Joined(NamedTuple):
    """``n`` gradients of one structure, laid out for the two passes.

    Attributes:
        large: for each large tensor of the structure, its ``n`` versions.
        small: ``(n, numbers)``, all tensors smaller than a chunk.
        fused: whether Triton kernels read the gradients.
    """

    large: list[list[Tensor]]
    small: Tensor
    fused: bool

    def last(self, count: int) -> "Joined":
        """Only the last ``count`` gradients."""
        return Joined([column[-count:] for column in self.large], self.small[-count:], self.fused)


@torch.no_grad()
def align(gradient: Gradient, guides: Sequence[Gradient], rule: Rule = HalfSpace(), *, fused: bool = False) -> Gradient:
    """The current gradient after surgery (Eqs. 3-5 of the paper, for the default rule).

    A guide is a gradient that the current gradient must not hurt. Where their inner product is negative, the two are in
    conflict: a plain step along the current gradient then raises the guide's loss.

    Args:
        gradient: a tensor, or a sequence or mapping of tensors, such as the parameters' gradients of one module. The
            rule sees one vector.
        guides: gradients of the same structure. Mappings match by key.
        rule: from the Gramian to weights.
        fused: use Triton kernels, which need less memory on a device and about as much time.

    Returns:
        The structure of ``gradient``, in its dtypes. The result equals ``gradient`` to the bit where the rule adds no
        guide, and where ``gradient`` is not finite. Guides that are not finite are ignored.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors, or the rule cannot be called.
        ValueError: a guide differs from the gradient in keys, length or shapes, or ``fused`` is set and the gradient is
            on a CPU.
        ImportError: ``fused`` is set, and Triton is missing or older than 3.3.

    Example:
        >>> gradient = {"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.tensor([2.0])}
        >>> guide = {"weight": torch.tensor([[-1.0, 1.0]]), "bias": torch.tensor([0.0])}
        >>> align(gradient, [guide])
        {'weight': tensor([[0.5000, 0.5000]]), 'bias': tensor([2.])}
    """
    check_function("rule", rule)
    if len(guides) == 0:
        return gradient
    rows = _rows([gradient, *guides], ["gradient", *(f"guides[{i}]" for i in range(len(guides)))])
    if fused:
        fused_kernels().check_device(rows[0][0].device)
    joined = join(rows, fused)
    products = gramian_of(joined)
    weights = weigh(products, rule)
    aligned: Gradient = _combined(gradient, rows[0], joined, weights, cancels(products, weights))
    return aligned


@torch.no_grad()
def gramian(gradients: Sequence[Gradient]) -> Tensor:
    """All inner products of ``n`` gradients of one structure: the only thing a rule sees.

    Gradients are constants here: the result has no graph. Products are accumulated in float32 or wider, and in float64
    where float32 is not enough. Gradients may have any float dtype. Norms from 1e-20 to 1e15 cause no overflow and no
    underflow. Guides that nearly depend on one another stay distinct.

    Returns:
        ``(n, n)``, float64 (float32 on devices without float64), on the gradients' device.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors.
        ValueError: there is no gradient, or the gradients differ in keys, length or shapes.

    Example:
        >>> gramian([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
        tensor([[25.,  3.],
                [ 3.,  1.]], dtype=torch.float64)
    """
    return gramian_of(join(_rows(gradients)))


@torch.no_grad()
def combine(gradients: Sequence[Gradient], weights: Tensor) -> Gradient:
    """The weighted sum of ``n`` gradients of one structure.

    Gradients are constants here: the result has no graph. A weight of exactly 0 leaves no trace of any gradient but the
    first, whatever that gradient holds (non-finite numbers, signs of zeros).

    Args:
        gradients: ``n`` tensors, sequences or mappings of tensors.
        weights: ``(n,)``.

    Returns:
        The structure and the dtypes of the first gradient.

    Raises:
        TypeError: a gradient is not a tensor, nor a sequence or mapping of tensors.
        ValueError: the gradients differ in keys, length or shapes, or there is not one weight for each gradient.

    Example:
        >>> gradients = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0])]
        >>> combine(gradients, torch.tensor([1.0, -0.25]))
        tensor([0., 1.])
    """
    rows = _rows(gradients)
    if weights.shape != (len(rows),):
        raise ValueError(f"weights must be ({len(rows)},), one for each gradient, not {tuple(weights.shape)}")
    combined: Gradient = _combined(gradients[0], rows[0], join(rows), weights, exact=len(rows) > 2)
    return combined


def fused_kernels() -> Any:
    """The module of the Triton kernels, imported only on demand."""
    try:
        import gaal_surgery.fused
    except ImportError as error:
        raise ImportError(
            f"fused=True needs triton 3.3 or newer ({error}): install it, or leave fused=False"
        ) from error
    return gaal_surgery.fused


def join(rows: list[list[Tensor]], fused: bool = False) -> Joined:
    """The rows with their small tensors joined, so that one operation handles all small tensors."""
    large, small = _by_size(rows[0], fused)
    joined = torch.cat([row[i].reshape(-1) for row in rows for i in small]) if small else rows[0][0].new_empty(0)
    return Joined([[row[i] for row in rows] for i in large], joined.view(len(rows), -1), fused)


def gramian_of(joined: Joined) -> Tensor:
    """:func:`gramian` of joined gradients."""
    count, wide = len(joined.small), widest(joined.small.device)
    columns = [*joined.large, list(joined.small)]
    if joined.fused:
        products: Tensor = fused_kernels().gramian(columns)
        return products
    if torch.compiler.is_compiling():  # the compiler fuses all products into one pass
        pairs = [(min(i, j), max(i, j)) for i in range(count) for j in range(count)]
        dots = [torch.stack([(x[i].to(wide) * x[j].to(wide)).sum() for x in columns]).sum() for i, j in pairs]
        return torch.stack(dots).view(count, count)
    dtype = common_dtype(itertools.chain(*columns))
    # With few numbers the widest dtype costs less than a check whether float32 was enough.
    if dtype is wide or not on_host(joined.small) or (not joined.large and joined.small.shape[1] <= _CHUNK):
        return _products(joined, wide)
    products = _products(joined, dtype)
    return products if _are_exact(products) else _products(joined, wide)


def combine_into(destination: list[Tensor], joined: Joined, weights: Tensor, exact: bool) -> None:
    """Write the weighted sum of gradients into tensors. These may be the first gradient's own tensors.

    Args:
        destination: tensors of the shapes of a gradient.
        joined: ``n`` gradients. The first row of ``small`` is overwritten.
        weights: ``(n,)``.
        exact: sum in the widest dtype, where terms may cancel one another.
    """
    large, small = _by_size(destination, joined.fused)
    columns = [*joined.large, list(joined.small)]
    totals, written = [*(destination[i] for i in large), joined.small[0]], small
    if joined.fused:
        fused_kernels().combine_into(totals, columns, weights)
    elif on_host(weights):
        numbers = weights.tolist()
        for output, (current, *guides) in zip(totals, columns, strict=True):
            total = output.copy_(current).to(_dtype_of_sum(output, guides, exact))
            total = total if numbers[0] == 1 else total.mul_(numbers[0])
            for guide, weight in zip(guides, numbers[1:], strict=True):
                total = total if weight == 0 else total.add_(guide, alpha=weight)
            output.copy_(total)
    else:
        acts, written, totals = weights != 0, large + small, []
        for current, *guides in columns:
            total = current.to(_dtype_of_sum(current, guides, exact)) * weights[0]
            for guide, weight, acting in zip(guides, weights[1:], acts[1:], strict=True):
                total = torch.where(acting, torch.addcmul(total, guide, weight), total)
            totals.append(total)
    totals += torch.split(totals.pop(), [destination[i].numel() for i in small])
    if written:
        outputs, totals = [destination[i] for i in written], totals[-len(written) :]
        torch._foreach_copy_(outputs, [x.view_as(output) for output, x in zip(outputs, totals, strict=True)])


def _dtype_of_sum(current: Tensor, guides: list[Tensor], exact: bool) -> torch.dtype:
    return widest(current.device) if exact else common_dtype([current, *guides])


def cancels(products: Tensor, weights: Tensor) -> bool:
    """Whether the sum may have terms so much longer than g that the rounding of these terms would show."""
    if len(products) == 2 or not on_host(products):
        return len(products) > 2
    norms = [math.sqrt(square) for square in products.diagonal().tolist()]
    added: float = sum(abs(w) * norm for w, norm in zip(weights.tolist()[1:], norms[1:], strict=True))
    return added > 100 * norms[0]


def _are_exact(products: Tensor) -> bool:
    """Whether float32 was enough: norms are in the safe range, and no guide is nearly a combination of others."""
    squares = products.diagonal()
    if not all(_SAFE[0] < square < _SAFE[1] for square in squares.tolist()):
        return False
    if len(squares) < 3:
        return True
    inverse = squares[1:].rsqrt()
    factor, failed = torch.linalg.cholesky_ex(products[1:, 1:] * inverse * inverse[:, None])
    return not failed and float(factor.diagonal().amin()) > 0.1


def _products(joined: Joined, dtype: torch.dtype) -> Tensor:
    """The Gramian by products in ``dtype``, chunk by chunk, added up in the widest dtype."""
    count, wide = len(joined.small), widest(joined.small.device)
    size = 8 * _chunk(joined.small) // count
    starts = range(0, joined.small.shape[1] or 1, size)
    products = [_row_products(joined.small[:, start : start + size].to(dtype)).to(wide) for start in starts]
    space = joined.small.new_empty(0, dtype=dtype)
    for column in joined.large:
        vectors = [tensor.reshape(-1) for tensor in column]
        for start in range(0, len(vectors[0]), size):
            chunk = [vector[start : start + size].to(dtype) for vector in vectors]
            if count <= 3:  # dot products copy nothing
                dots = {(i, j): torch.dot(chunk[i], chunk[j]) for i in range(count) for j in range(i, count)}
                matrix = torch.stack([dots[min(i, j), max(i, j)] for i in range(count) for j in range(count)])
                products.append(matrix.view(count, count).to(wide))
            else:
                # Every chunk reuses `space`, as newly allocated memory would have to be fetched again.
                products.append(_row_products(torch.stack(chunk, out=space.resize_(count, len(chunk[0])))).to(wide))
    return functools.reduce(torch.add, products)


def _row_products(matrix: Tensor) -> Tensor:
    """The inner products of a matrix's rows. Most products below the diagonal are copied from above."""
    if len(matrix) <= _BLOCK:
        product = matrix @ matrix.T
        return torch.maximum(product, product.T)  # makes the matrix symmetric to the bit
    product = matrix.new_empty(len(matrix), len(matrix))
    for i in range(0, len(matrix), _BLOCK):
        torch.mm(matrix[i : i + _BLOCK], matrix[i:].T, out=product[i : i + _BLOCK, i:])
    upper = product.triu()
    return upper + upper.triu(1).T


def _chunk(tensor: Tensor) -> int:
    """How many numbers are worked on at a time."""
    return _CHUNK if on_host(tensor) else _CHUNK_ON_DEVICE


def _by_size(tensors: list[Tensor], fused: bool) -> tuple[list[int], list[int]]:
    """The positions of the tensors that are at least a chunk, and the positions of the smaller tensors."""
    alone = torch.compiler.is_compiling() or (fused and len(tensors) <= _FEW)
    most = 0 if alone else _chunk(tensors[0])
    positions = range(len(tensors))
    return [i for i in positions if tensors[i].numel() >= most], [i for i in positions if tensors[i].numel() < most]


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """float32, or a wider dtype that one of the tensors has."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)


def _rows(gradients: Sequence[Gradient], names: Sequence[str] | None = None) -> list[list[Tensor]]:
    """The tensors of every gradient in the order of the first gradient, checked against the first gradient."""
    if len(gradients) == 0:
        raise ValueError("gradients is empty: pass at least one")
    names = names or [f"gradient {position}" for position in range(len(gradients))]
    keys = list(gradients[0]) if isinstance(gradients[0], Mapping) else None
    rows: list[list[Tensor]] = []
    for name, gradient in zip(names, gradients, strict=True):
        tensors: Any = gradient
        if isinstance(gradient, Mapping):
            if keys is None or set(gradient) != set(keys):
                raise ValueError(f"{name} has other keys than {names[0]}: give them one structure")
            tensors = [gradient[key] for key in keys]
        elif keys is not None:
            raise ValueError(f"{name} is no mapping, {names[0]} is: give them one structure")
        row = [tensors] if isinstance(tensors, Tensor) else list(tensors) if isinstance(tensors, Iterable) else []
        if not row or not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in row):
            kinds = "a float tensor, or a non-empty sequence or mapping of float tensors"
            raise TypeError(f"a gradient must be {kinds}; {name} is not")
        rows.append(row)
        if [tensor.shape for tensor in row] != [tensor.shape for tensor in rows[0]]:
            raise ValueError(f"{name} has other shapes than {names[0]}: give them one structure")
    return rows


def _combined(structure: Any, row: list[Tensor], joined: Joined, weights: Tensor, exact: bool) -> Any:
    """The weighted sum in the structure of a gradient whose tensors are ``row``."""
    tensors = [torch.empty_like(tensor) for tensor in row]
    combine_into(tensors, joined, weights, exact)
    if isinstance(structure, Tensor):
        return tensors[0]
    if isinstance(structure, Mapping):
        return dict(zip(structure, tensors, strict=True))
    return tuple(tensors) if isinstance(structure, tuple) else tensors
