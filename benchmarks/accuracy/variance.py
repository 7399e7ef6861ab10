"""How much of the spread over seeds is training, and how much is the draw of the test rows.

A seed of `table1.py` decides the split and the training. This command repeats the runs of `table1.py` with the split of
seed 0 (`--split_seed 0`): the seed then decides the initial weights and the order of the rows alone. The table has the
standard deviations over the seeds, of each row's accuracy and of the paired difference from the reference row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from jsonargparse.typing import PositiveInt
from output import command, write
from protocol import RECIPES, REFERENCE, ROWS, known_rows
from runs import Machine, Run, complete
from sets import begun, home
from table1 import SPACE, chosen_runs

SPLIT = 0


def main(
    sets: Sequence[str] = ("fashion-features",),
    rows: Sequence[str] = ("concatenation", "mmpareto", "gaal", "alternating-calibrated", "gaal-joint-own-encoders"),
    seeds: PositiveInt = 20,
    trials: PositiveInt = 3,
    results: str | None = None,
    out: str | None = None,
    machine: Machine = Machine(),  # noqa: B008
) -> None:
    """Carry out the missing runs, then tabulate.

    Args:
        sets: sets of the protocol, or YAML files with options of train.py. The splits of a set must be drawn: where the
            data set says which rows are the test, both halves of the table are equal.
        rows: fused rows. The reference row gaal is always among them.
        seeds: number of seeds, with splits of their own and with one split.
        trials: as for table1.
        results: the file with one line for each finished run; None takes runs.csv in the default of --out.
        out: folder of the tables; None as for table1.
        machine: how the runs are carried out.
    """
    if seeds < 2:
        raise SystemExit("error: one seed has no spread; give --seeds 2 or more")
    names = list(dict.fromkeys([*known_rows(rows), REFERENCE["fused"]]))
    with begun(sets, results, out, machine, list(RECIPES)[:trials]) as (chosen, finished):
        for which in chosen:
            drawn = chosen_runs(which, names, seeds, trials, finished, machine)
            fixed = [with_fixed_split(run) for run in drawn]
            complete([*drawn, *fixed], finished, machine)
            table = summarise(finished.table(drawn), finished.table(fixed))
            write(table, None, Path(out or home(sets)) / f"variance-{which.name}", markdown(table))
            print(f"\n{which.name}\n{markdown(table)}\n")


def with_fixed_split(run: Run) -> Run:
    """The run on the split of one seed, whatever the seed of the run. The run of that seed is on this split already."""
    if run.options.seed == SPLIT:
        return run
    return replace(run, set=f"{run.set}, split of seed {SPLIT}", options=replace(run.options, split_seed=SPLIT))


def summarise(drawn: pd.DataFrame, fixed: pd.DataFrame) -> pd.DataFrame:
    """One line for each row, the most accurate row on drawn splits first.

    Args:
        drawn: lines of a results file, with a split for each seed.
        fixed: lines of the same rows and seeds, on one split.

    Returns:
        `row`, then with the prefixes `drawn_` and `fixed_`: the mean `accuracy` over seeds with its standard
        `deviation`, and the mean paired `difference` from the reference row with its standard deviation
        `difference_deviation`.
    """
    table = _spread(drawn).add_prefix("drawn_").join(_spread(fixed).add_prefix("fixed_"))
    return table.sort_values("drawn_accuracy", ascending=False).reset_index()


def _spread(lines: pd.DataFrame) -> pd.DataFrame:
    accuracies = lines.pivot_table(index=["seed", "fold"], columns="row", values="fused")
    differences = accuracies.sub(accuracies[REFERENCE["fused"]], axis=0).drop(columns=REFERENCE["fused"])
    means = {"accuracy": accuracies.mean(), "difference": differences.mean()}
    return pd.DataFrame(means | {"deviation": accuracies.std(), "difference_deviation": differences.std()})


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""

    def cells(figure: str, deviation: str, form: str) -> list[str]:
        pairs = table[[figure, deviation]].itertuples(index=False)
        return ["-" if pd.isna(mean) else f"{mean:{form}}{SPACE}±{SPACE}{spread:.4f}" for mean, spread in pairs]

    reference = ROWS[REFERENCE["fused"]].label
    columns = {"method": [ROWS[row].label for row in table["row"]]}
    for name, words in (("drawn", "a split for each seed"), ("fixed", "one split")):
        columns[f"accuracy, {words}"] = cells(f"{name}_accuracy", f"{name}_deviation", ".3f")
        columns[f"minus {reference}, {words}"] = cells(f"{name}_difference", f"{name}_difference_deviation", "+.4f")
    return pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    command(main, __doc__, "--seeds 2 --trials 1")
