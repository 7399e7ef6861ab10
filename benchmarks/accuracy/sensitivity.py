"""Figures 3 and 5: accuracy by the share of samples that guide, for each modality, and by the margin.

The margin is the least inner product of a step with its guide, or the least cosine where the margin is relative. One
setting is changed at a time. The other settings keep their defaults: both shares 0.5, the margin 0.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from output import command
from protocol import Row
from study import Study
from tabular_image.style import COLOURS, WIDTH, styled

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
MARGINS = (-0.01, 0.0, 0.001, 0.01, 0.1)
COSINES = (-0.1, 0.0, 0.05, 0.1, 0.2, 0.4)
SWEEPS: dict[str, dict[float, dict[str, float | bool]]] = {
    "share of images that guide": {value: {"image_fraction": value} for value in FRACTIONS},
    "share of table rows that guide": {value: {"table_fraction": value} for value in FRACTIONS},
    "margin": {value: {"margin": value} for value in MARGINS},
    "margin, relative (cosine)": {value: {"margin": value, "relative": True} for value in COSINES},
}
PREDICTIONS = ("fused", "image", "table")


def main(study: Study) -> None:
    """Carry out the missing runs, then tabulate and draw."""
    points = {f"{sweep} {value}": (sweep, value) for sweep, values in SWEEPS.items() for value in values}
    rows = {name: Row("gaal", settings=SWEEPS[sweep][value]) for name, (sweep, value) in points.items()}
    for set_name, _, runs in study.completed(rows):
        accuracies = runs.groupby("row", sort=False)[list(PREDICTIONS)]
        table = accuracies.mean().join(accuracies.std().add_suffix("_deviation"))
        table.insert(0, "runs", accuracies.size())
        table.insert(0, "value", [points[name][1] for name in table.index])
        table.insert(0, "sweep", [points[name][0] for name in table.index])
        print(f"\n{set_name}\n{table.to_string(index=False)}")
        study.write(table, draw(table, set_name), f"sensitivity-{set_name}")


@styled()
def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel for each sweep, a line for each prediction."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    for axes, (sweep, part) in zip(figure.subplots(2, 2).flat, table.groupby("sweep", sort=False), strict=True):
        for name in PREDICTIONS:
            # Values are drawn at equal distances, because margins differ by powers of ten.
            spread = part[f"{name}_deviation"]
            axes.errorbar(range(len(part)), part[name], spread, color=COLOURS[name], marker="o", capsize=3, label=name)
        axes.set(xlabel=sweep, ylabel="test accuracy", xticks=range(len(part)), xticklabels=part["value"])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{title}, mean ± deviation over seeds")
    return figure


if __name__ == "__main__":
    command(main, __doc__, "--sets '[leaves100-texture]' --seeds 1", Study)
