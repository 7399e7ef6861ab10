"""Time of the guide gradient, clipped or not, beside other ways to compute the gradient, and beside a floor.

The guide gradient is the head's mean gradient on the samples that guide. For a Linear head the mean gradient of k
samples is one product of matrices, clipped or not. The closed form writes this out for the cross-entropy: logits,
softmax, product. The floor is the larger of two times: the operations of the closed form at the rate of a large
product, and the bytes of the closed form at the bandwidth of a copy. Both rates are measured here. Any other head (an
MLP here) is compared with the ordinary backward pass and has no floor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import timing
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabular_image.commands import run_command
from timing import RESULTS, Work
from torch import Tensor, nn

from gaal_surgery import guide_gradient, per_sample_gradients

CHUNK = 16  # samples that the chunked vmap differentiates at a time
MAX_NORM = 1.0
_SAMPLES = "samples that guide"


def closed_form(head: nn.Linear, features: Tensor, target: Tensor, max_norm: float | None = None) -> list[Tensor]:
    """Gradient of the mean cross-entropy on the weight and the bias."""
    with torch.no_grad():
        errors = torch.softmax(head(features), dim=1)
        errors[torch.arange(len(target), device=target.device), target] -= 1
        if max_norm is not None:
            # A sample's gradient is the outer product of its errors with its features and a 1 for the bias.
            norms = errors.norm(dim=1) * (features.square().sum(dim=1) + 1).sqrt()
            errors *= (max_norm / norms).clamp(max=1)[:, None]
        errors /= len(target)
        return [errors.T @ features, errors.sum(dim=0)]


def per_sample_mean(head: nn.Module, features: Tensor, target: Tensor) -> list[Tensor]:
    """The mean gradient by `vmap(grad)`: every sample's gradient, then the mean."""
    gradients = per_sample_gradients(head, features, target, F.cross_entropy)
    return [gradient.mean(dim=0) for gradient in gradients.values()]


def chunked_mean(head: nn.Module, features: Tensor, target: Tensor) -> list[Tensor]:
    """The mean gradient by `vmap(grad)` in chunks of samples: only one chunk's gradients are in memory at a time."""
    chunks = zip(features.split(CHUNK), target.split(CHUNK), strict=True)
    parts = ([len(chunk) * mean for mean in per_sample_mean(head, chunk, labels)] for chunk, labels in chunks)
    return [sum(column) / len(features) for column in zip(*parts, strict=True)]


def mean_backward(head: nn.Module, features: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The mean gradient by autograd, as in an ordinary training loop."""
    return torch.autograd.grad(F.cross_entropy(head(features), target), tuple(head.parameters()))


def floor_seconds(head: nn.Linear, k: int, bandwidth: float, rate: float) -> float:
    """Least seconds for logits and gradient: two products, whose operands are read and whose results are written."""
    width, classes = head.in_features, head.out_features
    products = 2 * (2 * k * width * classes)
    numbers = 2 * (width * classes + k * width + k * classes)
    return max(products / rate, 4 * numbers / bandwidth)


def measure(
    head: nn.Module, k: int, width: int, classes: int, rates: tuple[float, float], per_sample_gib: float, repeats: int
) -> pd.DataFrame:
    """Times and memory of every way on one head."""
    weight = next(head.parameters())
    features = torch.randn(k, width, device=weight.device)
    target = torch.randint(classes, (k,), device=weight.device)
    size = sum(parameter.nbytes for parameter in head.parameters())
    ways: dict[str, Work] = {
        "guide": lambda: guide_gradient(head, features, target, F.cross_entropy),
        "guide, clipped": lambda: guide_gradient(head, features, target, F.cross_entropy, max_norm=MAX_NORM),
        "backward": lambda: mean_backward(head, features, target),
    }
    if isinstance(head, nn.Linear):
        ways["closed form"] = lambda: closed_form(head, features, target)
        ways["closed form, clipped"] = lambda: closed_form(head, features, target, MAX_NORM)
        errors = torch.randn(k, classes, device=weight.device)
        ways["product alone"] = lambda: (errors.T @ features, errors.sum(dim=0))
    # vmap holds the gradients of all samples and a copy of the parameters for each sample. All must fit into memory.
    if k * size <= per_sample_gib * 2**30:
        ways["vmap"] = lambda: per_sample_mean(head, features, target)
        ways[f"vmap, chunks of {CHUNK}"] = lambda: chunked_mean(head, features, target)
    baseline = "closed form" if isinstance(head, nn.Linear) else "backward"
    table = timing.summary(timing.interleaved(ways, weight.device, repeats), baseline)
    table = table.rename(columns={f"/ {baseline}": "/ baseline"}).assign(baseline=baseline)
    floor = floor_seconds(head, k, *rates) if isinstance(head, nn.Linear) else float("nan")
    table["floor_ms"] = 1e3 * floor
    table["/ floor"] = table["ms"] / table["floor_ms"]
    table["peak_mib"] = [timing.peak_memory(work, weight.device) / 2**20 for work in ways.values()]
    table["per_sample_gradients_mib"] = k * size / 2**20
    return table


def draw(table: pd.DataFrame) -> Figure:
    """A panel for each head."""
    titled = table.assign(title=table["head"] + ", baseline: " + table["baseline"])
    return timing.dots(titled.rename(columns={"k": _SAMPLES}), _SAMPLES, "title", "/ baseline", "ratio")


def main(
    heads: list[str] = ["512x10", "2048x286", "4096x1000", "4096x50000"],  # noqa: B006 - read only
    ks: list[int] = [32, 128, 256],  # noqa: B006
    hidden: int = 512,
    per_sample_gib: float = 4.0,
    repeats: int = 15,
    threads: int = 1,
    device: str = "cpu",
    out: Path = RESULTS,
) -> None:
    """Measure guide gradients, interleaved.

    Args:
        heads: Linear heads, as "WIDTHxCLASSES". The second head is also measured as an MLP.
        ks: numbers of samples that guide.
        hidden: width of the MLP head's hidden layer.
        per_sample_gib: leave `vmap` out where the gradients of all samples take more GiB than this.
        repeats: measurements of each way, after three rounds of warm-up.
        threads: CPU threads.
        device: device to measure on, such as cpu or cuda.
        out: folder of the results.
    """
    where = timing.setup(device, threads)
    rates = (
        timing.copy_bandwidth(timing.OUT_OF_CACHE // 4, where, repeats),
        timing.matrix_rate(2048, where, repeats),
    )
    print(f"copy {rates[0] / 1e9:.1f} GB/s, matrix products {rates[1] / 1e9:.1f} GFLOP/s")
    tables = []
    for position, name in enumerate(heads):
        width, classes = map(int, name.split("x"))
        modules: dict[str, nn.Module] = {f"Linear {name}": nn.Linear(width, classes)}
        if position == min(1, len(heads) - 1):
            mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
            modules[f"MLP {width}x{hidden}x{classes}"] = mlp
        for label, head in modules.items():
            for k in ks:
                table = measure(head.to(where), k, width, classes, rates, per_sample_gib, repeats)
                tables.append(table.assign(head=label, k=k, copy_gb_s=rates[0] / 1e9, gflop_s=rates[1] / 1e9))
    table = pd.concat(tables, ignore_index=True)
    timing.write(table, draw(table), "guide", out, where)


if __name__ == "__main__":
    sys.exit(run_command(main, __file__, __doc__, example="--heads '[2048x286]' --repeats 5"))
