"""Figure 1(a): how often gradients conflict, in joint training, in alternation, and in the applied updates.

Two gradients conflict where their cosine is negative. No variant has surgery.

- "joint": concatenation. On each encoder, the gradient of the joint loss is compared with the gradient of the encoder's
  own slice loss.
- "alternating, gradients": the shared head's gradient in a modality's turn is compared with the guide, which is the
  gradient of the other modality's samples.
- "alternating, updates": the update that the optimizer makes of the head's gradient is compared with the same guide.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from output import command
from protocol import Row
from runs import histories
from study import Study
from tabular_image.style import WIDTH, styled

from gaal_surgery.stats import plot_cosines

VARIANTS = {
    "joint": Row("concatenation", settings={"measure_conflict": True}),
    "alternating, gradients": Row("alternating"),
    "alternating, updates": Row("alternating", settings={"align": "update"}),
}
_BINS = 40


def main(study: Study) -> None:
    """Carry out the missing runs, then tabulate and draw."""
    for set_name, runs, _ in study.completed(VARIANTS, needs="conflict.csv"):
        steps = histories(runs, study.machine, "conflict.csv")
        # A step whose cosine is undefined is left out of the share.
        steps["conflict"] = (steps["cosine_before"] < 0).astype(float).where(steps["cosine_before"].notna())
        steps["part"] = (steps["step"] / (steps.groupby("row")["step"].transform("max") + 1) * _BINS).astype(int)
        figures = ["conflict", "cosine_before"]
        shares = steps.groupby(["row", "modality"], sort=False)[figures].mean()
        print(f"\n{set_name}: share of steps in conflict, mean cosine\n{shares.round(4).to_string()}")
        table = steps.groupby(["row", "modality", "part"], sort=False)[figures].mean().reset_index()
        study.write(table, draw(table, set_name), f"conflict-{set_name}")


@styled()
def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel for each variant; a point is the mean over a part of the training."""
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    panels = figure.subplots(len(VARIANTS), sharex=True)
    for axes, (row, part) in zip(panels, table.groupby("row", sort=False), strict=True):
        plot_cosines(
            axes,
            {
                f"{modality}: {series['conflict'].mean():.0%} of steps in conflict": (
                    ((series["part"] + 0.5) / _BINS).tolist(),
                    series["cosine_before"].tolist(),
                )
                for modality, series in part.groupby("modality")  # the image first, in the image's colour
            },
        )
        axes.set(title=row, ylabel="mean cosine")
    axes.set_xlabel("share of the training")
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    command(main, __doc__, "--sets '[leaves100-texture]' --seeds 1", Study)
