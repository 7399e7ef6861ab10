"""The two passes over the gradients' memory as Triton kernels, one launch each for a module of a few tensors.

Both kernels are custom operators, so they compile and have a meta form. They multiply and add in float64. No sum is
atomic, so results repeat to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

if not hasattr(tl, "tuple"):
    raise ImportError(f"triton {triton.__version__} has no tuples of pointers")

_BLOCK = 1024
_MOST = 16  # tensors of one launch; the kernel's code is unrolled over them


def check_device(device: torch.device) -> None:
    """Raise where Triton cannot run: on a CPU, unless Triton's interpreter is on."""
    if device.type == "cpu" and isinstance(_inner_products, triton.JITFunction):
        remedy = "leave fused=False, or set TRITON_INTERPRET=1 before triton is imported"
        raise ValueError(f"fused=True runs Triton kernels, but the gradients are on a CPU: {remedy}")


def gramian(columns: list[list[Tensor]]) -> Tensor:
    """All inner products ``(n, n)`` of ``n`` gradients, float64. The diagonal tells which gradients are finite.

    Args:
        columns: for each tensor of the structure, its ``n`` versions.
    """
    partial = [
        inner_products([x.contiguous() for column in part for x in column], len(part[0])) for part in _parts(columns)
    ]
    return (partial[0] if len(partial) == 1 else torch.cat(partial)).sum(dim=0)


def combine_into(outputs: list[Tensor], columns: list[list[Tensor]], weights: Tensor) -> None:
    """Write the weighted sum of gradients into tensors. These may be the first gradient's own tensors.

    Args:
        outputs: a tensor for each column.
        columns: as in :func:`gramian`.
        weights: ``(n,)``. A weight of exactly 0 leaves no trace of any gradient but the first.
    """
    for part in _parts([[output, *column] for output, column in zip(outputs, columns, strict=True)]):
        totals = [
            output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
            for output, *_ in part
        ]
        weighted_sum(totals, [x.contiguous() for _, *column in part for x in column], weights.contiguous())
        for total, (output, *_) in zip(totals, part, strict=True):
            if total is not output:
                output.copy_(total)


def _parts(columns: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """The columns that hold numbers, split into launches; at least one column."""
    columns = [column for column in columns if column[0].numel()] or columns[:1]
    size = max(1, _MOST // len(columns[0]))
    return [columns[i : i + size] for i in range(0, len(columns), size)]


def _blocks(tensors: list[Tensor]) -> int:
    return sum(triton.cdiv(tensor.numel(), _BLOCK) for tensor in tensors)


def _partial_products(tensors: list[Tensor], count: int) -> Tensor:
    return tensors[0].new_empty(_blocks(tensors[::count]), count, count, dtype=torch.float64)


@torch.library.custom_op(
    "gaal_surgery::inner_products", mutates_args=(), schema="(Tensor[] tensors, int count) -> Tensor"
)
def inner_products(tensors: list[Tensor], count: int) -> Tensor:
    """The inner products ``(blocks, n, n)`` of ``n`` gradients, block by block. Their tensors alternate in the list."""
    partial = _partial_products(tensors, count)
    if len(partial):
        sizes = tuple(tensor.numel() for tensor in tensors[::count])
        with torch.cuda.device_of(partial):
            _inner_products[(len(partial),)](tuple(tensors), sizes, partial, count, _BLOCK)
    return partial


inner_products.register_fake(_partial_products)


@torch.library.custom_op(
    "gaal_surgery::weighted_sum",
    mutates_args=("outputs",),
    schema="(Tensor(a!)[] outputs, Tensor[] tensors, Tensor weights) -> ()",
)
def weighted_sum(outputs: list[Tensor], tensors: list[Tensor], weights: Tensor) -> None:
    """Write the weighted sum of gradients, whose tensors alternate in the list, into contiguous outputs."""
    if blocks := _blocks(outputs):
        sizes = tuple(output.numel() for output in outputs)
        with torch.cuda.device_of(weights):
            _weighted_sum[(blocks,)](tuple(outputs), tuple(tensors), sizes, weights, len(weights), _BLOCK)


@weighted_sum.register_fake
def _(outputs: list[Tensor], tensors: list[Tensor], weights: Tensor) -> None:
    return None


@triton.jit
def _inner_products(tensors, sizes, partial, count: tl.constexpr, width: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    partial += block * count * count
    for column in tl.static_range(len(sizes)):
        blocks = tl.cdiv(sizes[column], width)
        if (block >= 0) & (block < blocks):
            places = block * width + tl.arange(0, width)
            inside = places < sizes[column]
            for i in tl.static_range(count):
                one = tl.load(tensors[column * count + i] + places, inside, 0.0).to(tl.float64)
                for j in tl.static_range(i, count):
                    other = tl.load(tensors[column * count + j] + places, inside, 0.0).to(tl.float64)
                    product = tl.sum(one * other)
                    tl.store(partial + (i * count + j), product)
                    tl.store(partial + (j * count + i), product)
        block -= blocks


@triton.jit
def _weighted_sum(outputs, tensors, sizes, weights, count: tl.constexpr, width: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    for column in tl.static_range(len(sizes)):
        blocks = tl.cdiv(sizes[column], width)
        if (block >= 0) & (block < blocks):
            places = block * width + tl.arange(0, width)
            inside = places < sizes[column]
            total = tl.load(tensors[column * count] + places, inside, 0.0).to(tl.float64) * tl.load(weights)
            for i in tl.static_range(1, count):
                weight = tl.load(weights + i)
                guide = tl.load(tensors[column * count + i] + places, inside, 0.0).to(tl.float64)
                total = tl.where(weight != 0, total + guide * weight, total)
            if outputs[column].dtype.element_ty.primitive_bitwidth < 32:  # the interpreter cannot convert directly
                total = total.to(tl.float32)
            tl.store(outputs[column] + places, total.to(outputs[column].dtype.element_ty), inside)
        block -= blocks
