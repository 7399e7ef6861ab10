"""Figure 1(b) and the lower block of Table I: the accuracy of every method when the table is absent at test time.

The runs are the runs of `table1.py`, with its searches, seeds and results file. A run that `table1.py` finished is not
repeated. Each method has three accuracies: the main prediction with the table, the main prediction with an absent table
(zeros, the mean of the training rows), and the image prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from output import command, write
from protocol import RECIPES, ROWS, known_rows
from runs import Machine, complete
from sets import begun, home
from table1 import chosen_runs
from tabular_image.style import BLUE, VERMILLION, WIDTH, styled


def main(
    sets: Sequence[str] = ("leaves100-texture", "leaves100-margin", "fashion", "houses"),
    rows: list[str] | None = None,
    seeds: PositiveInt = 5,
    trials: PositiveInt = 3,
    results: str | None = None,
    out: str | None = None,
    train: bool = True,
    machine: Machine = Machine(),  # noqa: B008
) -> None:
    """Carry out the missing runs, then tabulate and draw.

    Args:
        sets: sets of the protocol, or YAML files with options of train.py.
        rows: rows of the table, one for each method or variant; None takes all rows.
        seeds: as for table1.
        trials: as for table1.
        results: the file with one line for each finished run; None takes runs.csv in the default of --out.
        out: folder of the tables and pictures; None as for table1.
        train: as for table1.
        machine: how the runs are carried out.
    """
    names = known_rows(rows)
    with begun(sets, results, out, machine, list(RECIPES)[:trials], train) as (chosen, finished):
        for which in chosen:
            runs = chosen_runs(which, names, seeds, trials, finished, machine if train else None)
            if train:
                complete(runs, finished, machine)
            table = summarise(finished.table(runs))
            if table.empty:
                print(f"{which.name}: no run on these data is finished; give --train true to train")
                continue
            print(f"\n{which.name}\n{table.to_string(index=False)}")
            write(table, draw(table, which.name), Path(out or home(sets)) / f"missing-{which.name}")


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One line for each row: mean accuracies with the table, without the table, and of the image prediction alone."""
    lines = []
    for row, group in runs.groupby("row", sort=False):
        lines.append(
            {
                "row": row,
                "runs": len(group),
                "with_table": group[ROWS[row].prediction].mean(),
                "without_table": group["without_table"].mean(),
                "image": group["image"].mean(),
            }
        )
    return pd.DataFrame(lines)


@styled()
def draw(table: pd.DataFrame, title: str) -> Figure:
    """A line for each method: its prediction with and without the table, and its image prediction."""
    figure = Figure(figsize=(WIDTH, 1.4 + 0.2 * len(table)), layout="constrained")
    axes = figure.subplots()
    for column, marker, colour, label in (
        ("with_table", "o", "black", "its prediction, with the table"),
        ("without_table", "x", VERMILLION, "the same, table absent"),
        ("image", "s", BLUE, "its image prediction"),
    ):
        axes.plot(table[column], table["row"], marker, color=colour, label=label, fillstyle="none", markersize=6)
    alone = table.loc[table["row"] == "image", "image"]
    if len(alone):
        axes.axvline(alone.item(), color=BLUE, linewidth=0.8, linestyle="--", label="image trained alone")
    axes.set(xlabel="test accuracy, mean over runs", title=title)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    command(main, __doc__, "--sets '[fashion]' --seeds 1 --trials 1")
