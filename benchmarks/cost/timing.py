"""Shared by the cost benchmarks: timing, peak memory, measured floors, and writing the table and the picture."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tabular_image.files import replacing
from tabular_image.style import DPI, WIDTH, styled
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 3
# Bytes of operands that exceed every cache, so that operands come from memory, as after an encoder's backward pass.
OUT_OF_CACHE = 2**28
_SPREAD = 4  # an axis is logarithmic where the largest ratio is more than this multiple of the smallest

Work = Callable[[], object]


def setup(device: str, threads: int) -> torch.device:
    """The device to measure on. Also sets the random seed and the number of threads."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    return torch.device(device)


def machine(device: torch.device) -> str:
    """The machine of the measurement, in a line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
        name = (
            f"{model[1] if model else platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
        )
    return f"{name}, {platform.system()}, torch {torch.__version__}"


# Time


def seconds_of(work: Work, device: torch.device) -> float:
    """Seconds until the last kernel of the work is done."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def interleaved(ways: Mapping[str, Work], device: torch.device, repeats: int) -> pd.DataFrame:
    """Seconds of every way (columns) in every repeat (rows).

    The ways take turns, so that a slow minute slows all ways alike. Each repeat has another order, so that a way does
    not always find the caches as one other way left them.
    """
    order = random.Random(0)
    rounds = [
        {way: seconds_of(work, device) for way, work in order.sample(list(ways.items()), len(ways))}
        for _ in range(WARM_UP + repeats)
    ]
    return pd.DataFrame(rounds[WARM_UP:], columns=list(ways))


def summary(seconds: pd.DataFrame, *baselines: str) -> pd.DataFrame:
    """A row for each way: median and quartiles in milliseconds, and the ratio of medians to each baseline."""
    milliseconds = 1e3 * seconds
    table = pd.DataFrame(
        {
            "ms": milliseconds.median(),
            "lower_quartile": milliseconds.quantile(0.25),
            "upper_quartile": milliseconds.quantile(0.75),
        }
    )
    for baseline in baselines:
        table[f"/ {baseline}"] = table["ms"] / table["ms"][baseline]
    return table.rename_axis("way").reset_index()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Memory


def peak_memory(work: Work, device: torch.device) -> int:
    """Most bytes that torch's allocator held during the work, minus the bytes that it held before.

    On a CPU the bytes come from the profiler's record of every allocation. This record leaves out the allocations of
    libraries below torch, and the release of memory that was held before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every profile prints two lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate((size for _, size in allocations), initial=0))


# Floors


class Rotation:
    """Equal sets of operands that take turns. Each set leaves the cache before the turn of the set comes again."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        first = make()
        size = sum(tensor.nbytes for tensor in first)
        self._sets = cycle([first, *(make() for _ in range(OUT_OF_CACHE // size))])

    def __call__(self) -> Sequence[Tensor]:
        """The set that was used longest ago."""
        return next(self._sets)


def copying(numbers: int, device: torch.device, *, cached: bool = False) -> Work:
    """A copy of float32 numbers, from memory to memory. With `cached` one pair of operands may stay in the cache."""

    def make() -> Sequence[Tensor]:
        return torch.randn(2, numbers, device=device).unbind()

    if cached:
        source, destination = make()
        return lambda: destination.copy_(source)
    operands = Rotation(make)

    def copy() -> None:
        source, destination = operands()
        destination.copy_(source)

    return copy


def copy_bandwidth(size: int, device: torch.device, repeats: int) -> float:
    """Bytes that a copy of `size` bytes from memory to memory reads and writes in a second."""
    numbers = max(1, size // 4)
    seconds = interleaved({"copy": copying(numbers, device)}, device, repeats)["copy"].median()
    return 2 * 4 * numbers / float(seconds)


def matrix_rate(side: int, device: torch.device, repeats: int, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a product of square matrices. Sides of some thousands give the machine's highest rate."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    seconds = interleaved({"product": lambda: a @ b}, device, repeats)["product"].median()
    return 2 * side**3 / float(seconds)


# Results


@styled()
def dots(table: pd.DataFrame, marks: str, by: str, value: str, label: str, *, way: str = "way") -> Figure:
    """A panel for every value of `by`, in it a line for each way, and on the line a mark for every value of `marks`.

    Args:
        table: one row for each panel, way and mark.
        marks: column with the sizes of the problem.
        by: column with the panels' titles.
        value: column with ratios; the line at 1 is the baseline.
        label: label of the axis of ratios.
        way: column with the lines' names.
    """
    groups = list(table.groupby(by, sort=False))
    ways, sizes = (table[name].drop_duplicates().tolist() for name in (way, marks))
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + rows * (0.7 + 0.2 * len(ways))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes, (name, group) in zip(panels, groups, strict=False):
        for size, symbol in zip(sizes, cycle("os^DvP")):
            part = group[group[marks] == size]
            heights = [ways.index(each) for each in part[way]]
            axes.plot(part[value], heights, symbol, fillstyle="none", markersize=5.5, label=str(size))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=name, xlabel=label)
        axes.set_yticks(range(len(ways)), ways)
        axes.tick_params(labelbottom=True)
        if table[value].max() > _SPREAD * table[value].min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(len(ways) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2 if max(map(len, labels)) > 10 else len(sizes), title=marks
    )
    return figure


def write(table: pd.DataFrame, figure: Figure, name: str, out: Path, device: torch.device) -> None:
    """Prints the table, and writes table and figure to `out`, both with the machine of the measurement."""
    where = machine(device)
    print(f"{where}\n\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / f"{name}.csv") as temporary:
        # Twelve digits, so that ratios can be recomputed from the times.
        table.assign(machine=where).to_csv(temporary, index=False, float_format="%.12g", lineterminator="\n")
    save(figure, where, out / f"{name}.png")
    print(f"\nwritten: {out / name}.csv and .png")


def save(figure: Figure, where: str, path: Path) -> None:
    """Writes a picture with the machine of the measurement above it."""
    figure.suptitle(where, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
