"""How the cost of surgery grows with batch, classes, feature width, guides and processes, beside a prediction.

The cost of surgery is the time of a step with guides minus the time of a step without guides: selection, guide
gradients, projection. The prediction is the sum of four times, all of them measured here: surgery of a tiny head,
operations at the rate of a large product, bytes at the bandwidth of a copy, and, with several processes, collectives of
equal size alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import timing
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tabular_image.commands import run_command
from tabular_image.style import BLUE, WIDTH, styled
from timing import RESULTS
from torch import nn
from torch.multiprocessing import start_processes

from gaal_surgery import GradientAlignedAlternator

FRACTION = 0.5  # share of the batch that guides


@dataclass(frozen=True)
class Size:
    """The size of one problem. `batch` is the number of rows in each process."""

    batch: int
    classes: int
    width: int
    guides: int
    processes: int = 1

    @property
    def parameters(self) -> int:
        """Numbers in the head."""
        return (self.width + 1) * self.classes


@dataclass(frozen=True)
class Rates:
    """Bytes copied and operations done in a second on this machine."""

    bandwidth: float
    operations: float

    def predict(self, size: Size) -> float:
        """Seconds for the products and the passes over memory."""
        # With several processes each process pulls back all its rows: only the device knows which rows are selected.
        pulled_back = size.batch if size.processes > 1 else FRACTION * size.batch
        operations = size.guides * 2 * (size.batch + pulled_back) * size.width * size.classes
        # Each guide gradient is written. The Gramian reads all gradients. The sum reads all gradients and is written.
        passes = size.guides + 2 * (size.guides + 1) + 1
        return operations / self.operations + 4 * passes * size.parameters / self.bandwidth


class HeadStep:
    """A backward pass and a step of the head alone, on given features, with and without guides."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self.head = nn.Linear(size.width, size.classes, device=device)
        self.features = torch.randn(size.batch, size.width, device=device)
        self.target = torch.randint(size.classes, (size.batch,), device=device)
        sgd = torch.optim.SGD(self.head.parameters(), lr=1e-3)
        self.optimizer = GradientAlignedAlternator(sgd, shared=self.head, fraction=FRACTION)

    def __call__(self, guides: int) -> None:
        """A step with this number of guides. Outside `turns` a guide serves one step."""
        F.cross_entropy(self.head(self.features), self.target).backward()
        for guide in range(guides):
            self.optimizer.guide(f"guide {guide}", self.features, self.target)
        self.optimizer.step()
        self.optimizer.zero_grad()


def surgery_seconds(size: Size, device: torch.device, repeats: int) -> pd.Series:
    """The seconds that guides add to a step, in every repeat."""
    step = HeadStep(size, device)
    seconds = timing.interleaved({"with": partial(step, size.guides), "without": partial(step, 0)}, device, repeats)
    return seconds["with"] - seconds["without"]


def exchange_seconds(size: Size, device: torch.device, repeats: int) -> float:
    """Seconds of a step's collectives alone: logits and targets are gathered, guide gradients are summed."""
    rows = torch.empty(size.guides * size.batch * (4 * size.classes + 8), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(rows) for _ in range(size.processes)]
    gradients = torch.zeros(size.guides * size.parameters, device=device)

    def exchange() -> None:
        dist.all_gather(everyone, rows)
        dist.all_reduce(gradients)

    return float(timing.interleaved({"exchange": exchange}, device, repeats)["exchange"].median())


def measure(size: Size, rates: Rates, device: torch.device, repeats: int) -> dict[str, float]:
    """One row of the table, in this process and its peers."""
    seconds = surgery_seconds(size, device, repeats)
    empty = surgery_seconds(replace(size, batch=2, classes=2, width=1), device, repeats).median()
    predicted = float(empty) + rates.predict(size)
    if size.processes > 1:
        predicted += exchange_seconds(size, device, repeats)
    measured = seconds.quantile([0.5, 0.25, 0.75]).to_list()
    return {
        **dict(zip(("ms", "lower_quartile", "upper_quartile"), (1e3 * value for value in measured), strict=True)),
        "predicted_ms": 1e3 * predicted,
        "/ predicted": measured[0] / predicted,
    }


def measure_in_processes(size: Size, rates: Rates, repeats: int) -> dict[str, float]:
    """One row of the table, measured in gloo processes on this machine, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_peer, (Path(folder), size, rates, repeats), nprocs=size.processes, start_method="spawn")
        row: dict[str, float] = json.loads((Path(folder) / "row.json").read_text())
    return row


def _peer(rank: int, folder: Path, size: Size, rates: Rates, repeats: int) -> None:
    device = timing.setup("cpu", threads=1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size.processes)
    row = measure(size, rates, device, repeats)
    if rank == 0:
        (folder / "row.json").write_text(json.dumps(row))
    dist.barrier()  # a peer may still wait for the last collective
    dist.destroy_process_group()


@styled()
def draw(table: pd.DataFrame) -> Figure:
    """A panel for each factor: the measured time with quartiles, and the predicted time."""
    factors = table["factor"].unique()
    columns = min(2, len(factors))
    rows = -(-len(factors) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes in panels[len(factors) :]:
        axes.remove()
    for axes, factor in zip(panels, factors, strict=False):
        part = table[table["factor"] == factor].sort_values(factor)
        axes.plot(part[factor], part["ms"], marker="o", color=BLUE, label="measured, with quartiles")
        axes.fill_between(part[factor], part["lower_quartile"], part["upper_quartile"], color=BLUE, alpha=0.25)
        axes.plot(part[factor], part["predicted_ms"], linestyle="--", color="black", marker="x", label="predicted")
        axes.set(xscale="log", yscale="log", xlabel=factor, ylabel="surgery, ms")
        axes.set_xticks(part[factor], part[factor])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main(
    batches: list[int] = [128, 32, 64, 256, 512],  # noqa: B006 - read only; the command line shows it
    classes: list[int] = [286, 10, 100, 1000, 10_000],  # noqa: B006
    widths: list[int] = [512, 256, 1024, 2048, 4096],  # noqa: B006
    guides: list[int] = [1, 2, 4, 8],  # noqa: B006
    processes: list[int] = [1, 2],  # noqa: B006
    repeats: int = 25,
    threads: int = 1,
    device: str = "cpu",
    out: Path = RESULTS,
) -> None:
    """Measure surgery on Linear heads. The first value of each list is the standard, and one list varies at a time.

    Args:
        batches: rows in the batch of each process.
        classes: numbers of the head's outputs.
        widths: numbers of features.
        guides: numbers of guides.
        processes: numbers of processes. Several processes run on the CPU with one thread each.
        repeats: measured steps, after three steps of warm-up.
        threads: CPU threads of a single process.
        device: device of a single process, such as cpu or cuda.
        out: folder of the results.
    """
    where = timing.setup(device, threads)
    rates = Rates(
        timing.copy_bandwidth(timing.OUT_OF_CACHE // 4, where, repeats), timing.matrix_rate(2048, where, repeats)
    )
    standard = Size(batches[0], classes[0], widths[0], guides[0])
    rows = []
    varied = {"batch": batches, "classes": classes, "width": widths, "guides": guides, "processes": processes}
    for factor, values in varied.items():
        for size in (replace(standard, **{factor: value}) for value in values):
            alone = size.processes == 1
            row = measure(size, rates, where, repeats) if alone else measure_in_processes(size, rates, repeats)
            rows.append({"factor": factor, **asdict(size), **row})
    table = pd.DataFrame(rows).assign(copy_gb_s=rates.bandwidth / 1e9, gflop_s=rates.operations / 1e9)
    timing.write(table, draw(table), "scaling", out, where)


if __name__ == "__main__":
    sys.exit(run_command(main, __file__, __doc__, example="--batches '[128]' --processes '[1]'"))
