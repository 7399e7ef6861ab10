"""Time of the Gramian and the combination of a gradient and its guides, beside other ways and beside a floor.

The Gramian holds the inner products of the gradients. The combination is the weighted sum of the gradients. The floor
is the time to move the bytes at the speed of a copy. The Gramian reads every gradient. The combination reads every
gradient and writes one. With one guide these are five passes over memory, and a copy is two passes. Operands come from
memory, not from a cache, as after an encoder's backward pass.

A second table compares the whole projection, rule included, with TorchJD's aggregators. Both go from lists of gradients
to a list of tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import timing
import torch
from matplotlib.figure import Figure
from tabular_image.commands import run_command
from timing import RESULTS, Rotation, Work
from torch import Tensor
from torchjd.aggregation import Aggregator, DualProj, PCGrad, UPGrad
from torchjd.autojac import jac_to_grad

from gaal_surgery import HalfSpace, align, gramian
from gaal_surgery.projection import cancels, combine_into, gramian_of, join
from gaal_surgery.surgery import weigh

Gradients = list[list[Tensor]]
BLOCK = 2**19
SCALE = 2.0**26
MOST_COMPILED = 16  # most tensors in a compiled list, because the compiler writes code for every tensor


# Ways to compute the Gramian.


def blocks(gradients: Gradients) -> Iterator[list[Tensor]]:
    """The gradients' numbers in pieces of at most BLOCK, which stay in the cache. Small tensors are joined."""
    joined: list[tuple[Tensor, ...]] = []
    size = 0
    for tensors in zip(*gradients, strict=True):
        for pieces in zip(*(tensor.flatten().split(BLOCK) for tensor in tensors), strict=True):
            if size + len(pieces[0]) > BLOCK:
                yield [_cat(row) for row in zip(*joined, strict=True)]
                joined, size = [], 0
            joined.append(pieces)
            size += len(pieces[0])
    yield [_cat(row) for row in zip(*joined, strict=True)]


def _cat(pieces: tuple[Tensor, ...]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def gramian_float32(gradients: Gradients) -> Tensor:
    """Dot products in float32. The products become 0 for norms under about 1e-17."""
    return _sum(
        [_symmetric([[torch.dot(x, y) for y in block[i:]] for i, x in enumerate(block)]) for block in blocks(gradients)]
    )


def gramian_scaled(gradients: Gradients) -> Tensor:
    """Dot products in float32 with one factor scaled. The products are right for norms from 1e-20 to 1e15."""
    matrices = []
    buffer = gradients[0][0].new_empty(BLOCK)  # reused, because new memory costs more than the product
    for block in blocks(gradients):
        upper = []
        for i, x in enumerate(block):
            scaled = torch.mul(x, SCALE, out=buffer[: len(x)])
            upper.append([torch.dot(scaled, y) for y in block[i:]])
        matrices.append(_symmetric(upper))
    return _sum(matrices) / SCALE


def gramian_float64(gradients: Gradients) -> Tensor:
    """Dot products in float64, a block at a time."""
    matrices = []
    buffers = gradients[0][0].new_empty(len(gradients), BLOCK, dtype=torch.float64)
    for block in blocks(gradients):
        wide = [buffer[: len(x)].copy_(x) for buffer, x in zip(buffers, block, strict=True)]
        matrices.append(_symmetric([[torch.dot(x, y) for y in wide[i:]] for i, x in enumerate(wide)]))
    return _sum(matrices)


def gramian_matrix(gradients: Gradients) -> Tensor:
    """One small product of matrices for each block, in scaled float32, for many guides."""
    products = []
    buffer = gradients[0][0].new_empty(len(gradients), BLOCK)
    for block in blocks(gradients):
        stacked = buffer[:, : len(block[0])]
        for row, x in zip(stacked, block, strict=True):
            torch.mul(x, SCALE**0.5, out=row)
        products.append(stacked @ stacked.T)
    return torch.stack(products).sum(dim=0, dtype=torch.float64) / SCALE


def gramian_foreach(gradients: Gradients) -> Tensor:
    """Products of whole tensors by foreach kernels, summed one by one."""

    def inner(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return torch.stack([product.sum() for product in torch._foreach_mul(x, y)]).sum()

    return _sum([_symmetric([[inner(x, y) for y in gradients[i:]] for i, x in enumerate(gradients)])])


def _symmetric(upper: list[list[Tensor]]) -> list[Tensor]:
    """All entries of a symmetric matrix, row by row, from the entries on and right of the diagonal."""
    count = len(upper)
    return [upper[min(i, j)][abs(i - j)] for i in range(count) for j in range(count)]


def _sum(matrices: list[list[Tensor]]) -> Tensor:
    numbers = torch.stack([number for matrix in matrices for number in matrix]).view(len(matrices), -1)
    count = math.isqrt(numbers.shape[1])
    return numbers.sum(dim=0, dtype=torch.float64).view(count, count)


# Ways to combine. Each way leaves the sum in the first gradient, as a step does.


def combine_library(gradients: Gradients, weights: Tensor) -> None:
    """The library's combination, as a step does it."""
    combine_into(gradients[0], join(gradients), weights, exact=False)


def combine_numbers(gradients: Gradients, weights: Tensor) -> None:
    """Weights as Python numbers, which a GPU would have to wait for. A weight of 0 touches nothing."""
    first, *others = weights.tolist()
    torch._foreach_mul_(gradients[0], first)
    for guide, weight in zip(gradients[1:], others, strict=True):
        if weight != 0:
            torch._foreach_add_(gradients[0], guide, alpha=weight)


def combine_in_place(gradients: Gradients, weights: Tensor) -> None:
    """Multiply and add in place. A weight of 0 still spreads infinities and changes the signs of zeros."""
    torch._foreach_mul_(gradients[0], weights[0])
    for guide, weight in zip(gradients[1:], weights[1:], strict=True):
        for destination, tensor in zip(gradients[0], guide, strict=True):
            destination.addcmul_(tensor, weight)


def combine_foreach(gradients: Gradients, weights: Tensor) -> None:
    """Foreach kernels, one for each operation."""
    torch._foreach_mul_(gradients[0], weights[0])
    for guide, weight in zip(gradients[1:], weights[1:], strict=True):
        torch._foreach_add_(gradients[0], torch._foreach_mul(guide, weight))


def library_both(gradients: Gradients, weights: Tensor, *, fused: bool = False) -> None:
    """The library's Gramian and combination, as a step does them: the small tensors are joined once."""
    joined = join(gradients, fused)
    gramian_of(joined)
    combine_into(gradients[0], joined, weights, exact=False)


class Way(NamedTuple):
    """A Gramian and a combination. `both` does both where they share work."""

    gramian: Callable[[Gradients], Tensor]
    combine: Callable[[Gradients, Tensor], None]
    both: Callable[[Gradients, Tensor], None] | None = None


WAYS = {
    "library": Way(gramian, combine_library, library_both),
    "float64 blocks": Way(gramian_float64, combine_numbers),
    "scaled float32 blocks": Way(gramian_scaled, combine_numbers),
    "scaled float32 matrix": Way(gramian_matrix, combine_numbers),
    "float32 blocks, in place (unsafe)": Way(gramian_float32, combine_in_place),
    "foreach (unsafe)": Way(gramian_foreach, combine_foreach),
}
FUSED = Way(
    lambda gradients: gramian_of(join(gradients, fused=True)),
    lambda gradients, weights: combine_into(gradients[0], join(gradients, fused=True), weights, exact=False),
    partial(library_both, fused=True),
)  # on a GPU
AGGREGATORS = {"TorchJD PCGrad": PCGrad(), "TorchJD UPGrad": UPGrad(), "TorchJD DualProj": DualProj()}


# Measurements.


def gradient_lists(shapes: list[tuple[int, ...]], guides: int, device: torch.device) -> Callable[[], list[Tensor]]:
    """A function that makes the tensors of a gradient and its guides, gradient by gradient."""
    return lambda: [torch.randn(shape, device=device) for _ in range(1 + guides) for shape in shapes]


def measure_stages(
    shapes: list[tuple[int, ...]], guides: int, ways: dict[str, Way], device: torch.device, repeats: int
):
    """For every way: the Gramian, the combination, and one after the other."""
    operands = Rotation(gradient_lists(shapes, guides, device))
    weights = torch.tensor([1.0, *[-0.1] * guides], dtype=torch.float64, device=device)

    def gradients() -> Gradients:
        tensors = list(operands())
        return [tensors[i : i + len(shapes)] for i in range(0, len(tensors), len(shapes))]

    def both(way: Way) -> None:
        current = gradients()
        if way.both is not None:
            way.both(current, weights)
        else:
            way.gramian(current)
            way.combine(current, weights)

    works: dict[str, Work] = {}
    for name, way in ways.items():
        works[f"{name}/gramian"] = lambda way=way: way.gramian(gradients())
        works[f"{name}/combine"] = lambda way=way: way.combine(gradients(), weights)
        works[f"{name}/both"] = lambda way=way: both(way)
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    works["copy/both"] = timing.copying(numbers, device)
    works["copy, cached/both"] = timing.copying(numbers, device, cached=True)
    table = timing.summary(timing.interleaved(works, device, repeats), "library/both")
    table[["way", "stage"]] = table["way"].str.rsplit("/", n=1).to_list()
    passes = {"gramian": guides + 1, "combine": guides + 2, "both": 2 * guides + 3}
    for name, label in {"copy": "floor", "copy, cached": "cached floor"}.items():
        copy = table.loc[table["way"] == name, "ms"].item()
        table[f"/ {label}"] = table["ms"] / (copy / 2 * table["stage"].map(passes))
    rivals = table[~table["way"].str.contains("copy|unsafe")]
    table["winner"] = table.index.isin(rivals.groupby("stage")["ms"].idxmin())
    return table


def measure_torchjd(shapes: list[tuple[int, ...]], guides: int, device: torch.device, repeats: int) -> pd.DataFrame:
    """The library's and TorchJD's ways from gradients to one gradient. TorchJD stacks the gradients to Jacobians.

    TorchJD's aggregators are also measured with ready Jacobians, and on one ready matrix.
    """
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    operands = Rotation(gradient_lists(shapes, guides, device))
    stacked = Rotation(lambda: [torch.randn(1 + guides, *shape, device=device) for shape in shapes])
    matrices = Rotation(lambda: [torch.randn(1 + guides, numbers, device=device)])
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]

    def gradients() -> Gradients:
        tensors = list(operands())
        return [tensors[i : i + len(shapes)] for i in range(0, len(tensors), len(shapes))]

    def aligned(fused: bool = False) -> None:
        gradient, *others = gradients()
        align(gradient, others, fused=fused)

    def aligned_in_place(fused: bool = False) -> None:
        current = gradients()
        joined = join(current, fused)
        products = gramian_of(joined)
        weights = weigh(products, HalfSpace())
        combine_into(current[0], joined, weights, cancels(products, weights))

    def aggregated(aggregator: Aggregator, jacobians: Sequence[Tensor]) -> None:
        for parameter, jacobian in zip(parameters, jacobians, strict=True):
            parameter.grad, parameter.jac = None, jacobian
        jac_to_grad(parameters, aggregator)

    def from_gradients(aggregator: Aggregator) -> None:
        aggregated(aggregator, [torch.stack(tensors) for tensors in zip(*gradients(), strict=True)])

    works: dict[str, Work] = {"align": aligned, "align in place, as a step does": aligned_in_place}
    if device.type == "cuda":
        works["align, fused"] = partial(aligned, fused=True)
        works["align in place, fused"] = partial(aligned_in_place, fused=True)
    for name, aggregator in AGGREGATORS.items():
        works[name] = partial(from_gradients, aggregator)
        works[f"{name}, Jacobians"] = lambda aggregator=aggregator: aggregated(aggregator, stacked())
        works[f"{name}, matrix"] = lambda aggregator=aggregator: aggregator(matrices()[0])
    return timing.summary(timing.interleaved(works, device, repeats), "align")


def parse(name: str) -> list[tuple[int, ...]]:
    """The shapes of "2048x286" (weight and bias of a Linear head) or of "1000*64x8" (1000 tensors of 64 x 8)."""
    count, _, shape = name.rpartition("*")
    sides = tuple(map(int, shape.split("x")))
    return [sides] * int(count) if count else [sides[::-1], sides[-1:]]


def draw(table: pd.DataFrame) -> Figure:
    """Time of Gramian and combination together, as a ratio to the floor."""
    both = table[(table["stage"] == "both") & ~table["way"].str.contains("copy")]
    return timing.dots(both, "guides", "parameters", "/ floor", "ratio to the floor")


def draw_torchjd(table: pd.DataFrame) -> Figure:
    """Time of the whole projection beside TorchJD's aggregators."""
    return timing.dots(table, "guides", "parameters", "/ align", "ratio to align")


def main(
    lists: list[str] = ["512x10", "2048x286", "4096x1000", "10*256x256", "100*64x64", "1000*32x16"],  # noqa: B006
    guides: list[int] = [1, 2, 4, 8],  # noqa: B006
    compiled: bool = True,
    repeats: int = 15,
    threads: int = 1,
    device: str = "cpu",
    out: Path = RESULTS,
) -> None:
    """Measure projections, interleaved.

    Args:
        lists: the shared module's parameters: "WIDTHxCLASSES" of a Linear head, or "COUNT*SHAPE" of equal tensors.
        guides: numbers of guides.
        compiled: also measure `torch.compile`, which needs a C++ compiler.
        repeats: measurements of each way, after three rounds of warm-up.
        threads: CPU threads.
        device: device to measure on, such as cpu or cuda.
        out: folder of the results.
    """
    where = timing.setup(device, threads)
    stages, whole = [], []
    for name in lists:
        shapes = parse(name)
        for count in guides:
            torch.compiler.reset()
            ways = WAYS | ({"library, fused": FUSED} if where.type == "cuda" else {})
            if compiled and len(shapes) <= MOST_COMPILED:
                ways["library, compiled"] = Way(torch.compile(gramian), torch.compile(combine_library))
            label = {"parameters": name, "guides": count}
            stages.append(measure_stages(shapes, count, ways, where, repeats).assign(**label))
            whole.append(measure_torchjd(shapes, count, where, repeats).assign(**label))
    for results, name, picture in ((stages, "projection", draw), (whole, "projection-torchjd", draw_torchjd)):
        table = pd.concat(results, ignore_index=True)
        timing.write(table, picture(table), name, out, where)


if __name__ == "__main__":
    sys.exit(run_command(main, __file__, __doc__, example="--lists '[2048x286]' --repeats 5"))
