"""Figures 3 and 5: the share of samples that guide, by modality, and the margin, absolute and relative.

One setting is changed at a time; the other share stays at a half, the margin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from output import RESULTS, write
from protocol import RECIPES, Row, base_options, repeated, row_options
from runs import Machine, Results, complete

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
MARGINS = (-0.01, 0.0, 0.001, 0.01, 0.1)
COSINES = (-0.1, 0.0, 0.05, 0.1, 0.2, 0.4)
SWEEPS: dict[str, dict[float, dict[str, float | bool]]] = {
    "share of images that guide": {value: {"image_fraction": value} for value in FRACTIONS},
    "share of table rows that guide": {value: {"table_fraction": value} for value in FRACTIONS},
    "margin": {value: {"margin": value} for value in MARGINS},
    "margin, relative (cosine)": {value: {"margin": value, "relative": True} for value in COSINES},
}
PREDICTIONS = {"fused": "black", "image": "tab:blue", "table": "tab:orange"}


def main(
    sets: Sequence[str] = ("leaves100-texture",),
    seeds: PositiveInt = 3,
    recipe: str = "adamw 0.003",
    results: str = str(RESULTS / "runs.csv"),
    out: str = str(RESULTS),
    machine: Machine = Machine(),  # noqa: B008
) -> None:
    """Run what is missing, then tabulate and draw.

    Args:
        sets: names of the protocol, or YAML files with options of train.py.
        seeds: runs of each setting.
        recipe: optimizer and learning rate, as the protocol names them.
        results: the file with one line a finished run.
        out: folder of the tables and pictures.
        machine: how the runs are carried out.
    """
    finished = Results(results)
    for set_name, base in dict(base_options(name) for name in sets).items():
        points = {
            (sweep, value): repeated(
                set_name, f"{sweep} {value}", row_options(base, Row("gaal"), **RECIPES[recipe], **settings), seeds
            )
            for sweep, values in SWEEPS.items()
            for value, settings in values.items()
        }
        complete([run for runs in points.values() for run in runs], finished, machine)
        lines = []
        for (sweep, value), runs in points.items():
            accuracies = finished.table(runs)[list(PREDICTIONS)]
            line = {"sweep": sweep, "value": value, "runs": len(accuracies)}
            line |= {name: accuracies[name].mean() for name in PREDICTIONS}
            line |= {f"{name}_deviation": accuracies[name].std() for name in PREDICTIONS}
            lines.append(line)
        table = pd.DataFrame(lines)
        print(f"\n{set_name}\n{table.to_string(index=False)}")
        write(table, _draw(table, set_name), Path(out) / f"sensitivity-{set_name}")


def _draw(table: pd.DataFrame, title: str) -> Figure:
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (sweep, part) in zip(figure.subplots(2, 2).flat, table.groupby("sweep", sort=False), strict=True):
        for name, colour in PREDICTIONS.items():
            # Values are placed one step apart: margins spread over decades.
            axes.errorbar(
                range(len(part)), part[name], part[f"{name}_deviation"], color=colour, marker="o", capsize=3, label=name
            )
        axes.set(xlabel=sweep, ylabel="test accuracy", xticks=range(len(part)), xticklabels=part["value"])
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(f"{title}, mean ± deviation over seeds")
    return figure


if __name__ == "__main__":
    auto_cli(main)
