"""Figure 1(a): how often gradients are in conflict, trained jointly, in alternation, and in the updates really applied.

- "joint": concatenation; the joint loss's gradient on each encoder against that of the encoder's own slice loss.
- "alternating, gradients": the shared head's gradient in a modality's turn against the other modality's guide.
- "alternating, updates": the update that the optimizer made of that gradient, against the same guide. Nothing is
  projected in either: what is measured is a training that surgery has not touched.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from output import command
from protocol import Row
from runs import histories
from study import Study

VARIANTS = {
    "joint": Row("concatenation", settings={"measure_conflict": True}),
    "alternating, gradients": Row("alternating"),
    "alternating, updates": Row("alternating", settings={"align": "update"}),
}
_BINS = 40


def main(study: Study) -> None:
    """Run what is missing, then tabulate and draw."""
    for set_name, runs, _ in study.completed(VARIANTS, needs="conflict.csv"):
        steps = histories(runs, study.machine, "conflict.csv")
        # A cosine that is not defined is neither in conflict nor out of it.
        steps["conflict"] = (steps["cosine_before"] < 0).astype(float).where(steps["cosine_before"].notna())
        steps["part"] = (steps["step"] / (steps.groupby("row")["step"].transform("max") + 1) * _BINS).astype(int)
        figures = ["conflict", "cosine_before"]
        shares = steps.groupby(["row", "modality"], sort=False)[figures].mean()
        print(f"\n{set_name}: share of steps in conflict, mean cosine\n{shares.round(4).to_string()}")
        table = steps.groupby(["row", "modality", "part"], sort=False)[figures].mean().reset_index()
        study.write(table, _draw(table, set_name), f"conflict-{set_name}")


def _draw(table: pd.DataFrame, title: str) -> Figure:
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    grid = figure.subplots(2, len(VARIANTS), sharex=True, sharey="row")
    for (upper, lower), (row, part) in zip(grid.T, table.groupby("row", sort=False), strict=True):
        for modality, series in part.groupby("modality", sort=False):
            progress = (series["part"] + 0.5) / _BINS
            upper.plot(progress, series["cosine_before"], label=f"{modality}")
            lower.plot(progress, series["conflict"], label=f"{modality}")
        upper.axhline(0, color="black", linewidth=0.8)
        upper.set(title=row)
        lower.set(xlabel="share of the training")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    grid[0, 0].set(ylabel="mean cosine")
    grid[1, 0].set(ylabel="share of steps in conflict", ylim=(-0.03, 1.03))
    grid[0, -1].legend(title="turn or encoder", frameon=False)
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    command(main, __doc__, "--sets '[leaves100-texture]' --seeds 1", Study)
