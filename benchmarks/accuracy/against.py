"""One row against the others: the paired difference on every set, in accuracy and in balanced accuracy, with intervals.

The command reads the runs of `table1.py` and trains nothing. A difference is the accuracy of the row `--of` minus the
accuracy of another row, over the seeds and folds that both rows have. Intervals and p come from the corrected resampled
t test. Holm's procedure corrects p for the rows of one set. The intervals are not corrected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from comparison import compare
from jsonargparse.typing import PositiveInt
from output import command, write
from protocol import ENDINGS, RECIPES, ROWS, known_rows
from ranks import MEASURES
from runs import Machine
from sets import begun, home
from table1 import SPACE, chosen_runs

_LEVEL = 0.05
_COLUMNS = {"accuracy": "fused", "balanced": "balanced_accuracy"}  # of a results file, by measure


def main(
    sets: Sequence[str] = ("leaves100-texture", "leaves100-margin", "fashion", "houses"),
    of: str = "gaal-joint-own-encoders",
    rows: list[str] | None = None,
    seeds: PositiveInt = 5,
    trials: PositiveInt = 3,
    results: str | None = None,
    out: str | None = None,
    data_root: str = "data",
) -> None:
    """Compare and tabulate.

    Args:
        sets: sets of the protocol, or YAML files, as they were given to table1.
        of: the row that is compared with the others.
        rows: the other fused rows; None takes all fused rows.
        seeds: as for table1.
        trials: as for table1.
        results: the file of the runs; None takes runs.csv in the default of table1's --out.
        out: folder of the tables; None as for table1.
        data_root: folder of the data, whose digests tell the runs on these data. Without the data all runs count.
    """
    names = known_rows(rows or [name for name, row in ROWS.items() if row.block == "fused"])
    names = list(dict.fromkeys([*known_rows([of]), *names]))
    with begun(sets, results, out, Machine(data_root), list(RECIPES)[:trials], train=False) as (chosen, finished):
        table = pd.concat(
            differences(finished.table(chosen_runs(which, names, seeds, trials, finished, None)), of).assign(
                set=which.name
            )
            for which in chosen
        )
    if table.empty:
        raise SystemExit(f"error: no set has runs of {of} and of another row; run table1.py first")
    write(table, None, Path(out or home(sets)) / f"against-{of}", markdown(table))
    print(f"\n{markdown(table)}\n")


def differences(runs: pd.DataFrame, of: str) -> pd.DataFrame:
    """The difference of the row `of` from every other row.

    Args:
        runs: lines of a results file, of one set.
        of: a row.

    Returns:
        One line for each measure and other row: `measure`, `row`, `runs`, `difference` (positive where the row `of` is
        better), its 95% interval from `low` to `high`, `p` and `p_holm`. No line where the row `of` has no runs.
    """
    parts = []
    for measure, column in _COLUMNS.items():
        compared = compare(runs, dict.fromkeys(runs["row"].unique(), column), of)
        turned = {"difference": -compared["difference"], "low": -compared["high"], "high": -compared["low"]}
        part = compared.assign(**turned, measure=measure).reset_index()
        parts.append(part.dropna(subset="difference"))
    return pd.concat(parts)[["measure", "row", "runs", "difference", "low", "high", "p", "p_holm"]]


def markdown(table: pd.DataFrame) -> str:
    """A table for each measure, in points, with the rows in the order of the protocol and the sets in their order."""
    parts = []
    for measure, lines in table.groupby("measure", sort=False):
        cells = lines.assign(cell=lines.apply(_cell, axis=1))
        wide = cells.pivot(index="row", columns="set", values="cell")
        wide = wide.reindex(index=[row for row in ROWS if row in wide.index], columns=lines["set"].unique())
        wide = wide.rename(columns=lambda name: re.sub(rf"({'|'.join(ENDINGS)})$", "", name))
        wide.index = pd.Index([ROWS[row].label for row in wide.index], name="against")
        parts.append(f"**{MEASURES[str(measure)].capitalize()}**\n\n{wide.fillna('-').to_markdown()}")
    return "\n\n".join(parts)


def _cell(line: pd.Series) -> str:
    """The difference and the interval in points, in bold where the corrected p is below the level."""
    difference, low, high = (100 * line[name] for name in ("difference", "low", "high"))
    interval = "" if pd.isna(low) else f"{SPACE}[{low:+.1f},{SPACE}{high:+.1f}]"
    written = f"{difference:+.1f}{interval}"
    return f"**{written}**" if line["p_holm"] < _LEVEL else written


if __name__ == "__main__":
    command(main, __doc__, "--sets '[fashion-features]' --seeds 20")
