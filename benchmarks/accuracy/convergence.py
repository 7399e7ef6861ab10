"""Figure 4: losses and validation accuracy over the epochs, for GAAL, plain alternation and joint training."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from output import command
from protocol import Row
from runs import histories
from study import Study
from tabular_image.style import BLUE, GREEN, VERMILLION, WIDTH, marker, styled

COLOURS = {"gaal": GREEN, "alternating": BLUE, "concatenation": VERMILLION}
CURVES = {
    "train_loss_image": "training loss, image",
    "train_loss_table": "training loss, table",
    "val_accuracy": "validation accuracy, fused",
}


def main(study: Study) -> None:
    """Carry out the missing runs, then tabulate and draw."""
    for set_name, runs, _ in study.completed({name: Row(name) for name in COLOURS}, needs="metrics.csv"):
        curves = histories(runs, study.machine, "metrics.csv").groupby(["row", "epoch"], sort=False)[list(CURVES)]
        table = curves.mean().join(curves.std().add_suffix("_deviation")).reset_index()
        last = table.groupby("row", sort=False).tail(1)
        print(f"\n{set_name}, after the last epoch\n{last.to_string(index=False)}")
        study.write(table, draw(table, set_name), f"convergence-{set_name}")


@styled()
def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel for each curve, a line for each method."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for row, part in table.groupby("row", sort=False):
            mean, deviation = part[column], part[f"{column}_deviation"].fillna(0)
            axes.plot(part["epoch"], mean, color=COLOURS[row], marker=marker(len(part)), markersize=2.5, label=row)
            axes.fill_between(part["epoch"], mean - deviation, mean + deviation, color=COLOURS[row], alpha=0.15)
        axes.set(xlabel="epoch", ylabel=label, yscale="log" if "loss" in column else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.suptitle(f"{title}, mean and deviation over seeds")
    return figure


if __name__ == "__main__":
    command(main, __doc__, "--sets '[leaves100-texture]' --seeds 1", Study)
