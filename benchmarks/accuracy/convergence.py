"""Figure 4: training losses and validation accuracy over the epochs, with surgery, without, and trained jointly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from output import RESULTS, write
from protocol import RECIPES, Row, base_options, repeated, row_options
from runs import Machine, Results, complete, histories

VARIANTS = {"gaal": "tab:green", "alternating": "tab:blue", "concatenation": "tab:red"}
CURVES = {
    "train_loss_image": "training loss, image",
    "train_loss_table": "training loss, table",
    "val_accuracy": "validation accuracy, fused",
}


def main(
    sets: Sequence[str] = ("leaves100-texture",),
    seeds: PositiveInt = 5,
    recipe: str = "adamw 0.003",
    results: str = str(RESULTS / "runs.csv"),
    out: str = str(RESULTS),
    machine: Machine = Machine(),  # noqa: B008
) -> None:
    """Run what is missing, then tabulate and draw.

    Args:
        sets: names of the protocol, or YAML files with options of train.py.
        seeds: runs of each method.
        recipe: optimizer and learning rate, as the protocol names them.
        results: the file with one line a finished run.
        out: folder of the tables and pictures.
        machine: how the runs are carried out.
    """
    finished = Results(results)
    for set_name, base in dict(base_options(name) for name in sets).items():
        runs = [
            run
            for name in VARIANTS
            for run in repeated(set_name, name, row_options(base, Row(name), **RECIPES[recipe]), seeds)
        ]
        complete(runs, finished, machine, needs="metrics.csv")
        epochs = histories(runs, machine, "metrics.csv")
        curves = epochs.groupby(["row", "epoch"], sort=False)[list(CURVES)]
        table = curves.mean().join(curves.std(), rsuffix="_deviation").reset_index()
        last = table.groupby("row", sort=False).tail(1)
        print(f"\n{set_name}, after the last epoch\n{last.to_string(index=False)}")
        write(table, _draw(table, set_name), Path(out) / f"convergence-{set_name}")


def _draw(table: pd.DataFrame, title: str) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for row, part in table.groupby("row", sort=False):
            mean, deviation = part[column], part[f"{column}_deviation"].fillna(0)
            axes.plot(part["epoch"], mean, color=VARIANTS[row], label=row)
            axes.fill_between(part["epoch"], mean - deviation, mean + deviation, color=VARIANTS[row], alpha=0.15)
        axes.set(xlabel="epoch", ylabel=label, yscale="log" if "loss" in column else "linear")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    figure.suptitle(f"{title}, mean and deviation over seeds")
    return figure


if __name__ == "__main__":
    auto_cli(main)
