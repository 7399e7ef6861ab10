"""Table I: every method on every set, fairly compared.

Every method has the same splits, encoders, epochs and number of hyper-parameter trials. Every method is judged at the
epoch with the best validation accuracy. The trial with the best validation accuracy on the rows of seed 0 is chosen,
and the options of this trial are run for every seed.

The command prints a table for each set and writes the table as CSV and Markdown. The results file has the single runs.
A finished run is never repeated on the same data, so that an interrupted benchmark continues where it stopped. The
command tells which settings of a YAML file the protocol overrides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from comparison import compare
from jsonargparse.typing import PositiveInt
from output import command, write
from protocol import RECIPES, REFERENCE, ROWS, DataSet, Search, known_rows, paper_figures, repeated
from runs import FUSIONS, Machine, Results, Run, complete
from sets import begun, home

_PAIRED = ("difference", "low", "high", "p", "p_holm")  # columns of `compare` that balanced accuracy has too
_LEVEL = 0.05
SPACE = "\N{NO-BREAK SPACE}"  # inside a number's cell, so that a narrow column breaks between numbers


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
    """Carry out the missing runs, then tabulate.

    Args:
        sets: sets of the protocol, or YAML files with options of train.py for a set of your own.
        rows: rows of the table, one for each method or variant; None takes all rows.
        seeds: number of seeds. A row has one run for each seed, or for each seed and fold of a cross-validated set.
        trials: hyper-parameter trials of each row on each set; 1 takes the defaults.
        results: the file with one line for each finished run; None takes runs.csv in the default of --out.
        out: folder of the tables. None takes benchmarks/accuracy/results for the protocol's sets, and runs/accuracy
            below the current folder where one of the sets is a YAML file.
        train: train the missing runs. false tabulates the finished runs, and says so where the data cannot be checked.
        machine: how the runs are carried out.
    """
    names = known_rows(rows)
    with begun(sets, results, out, machine, list(RECIPES)[:trials], train) as (chosen, finished):
        for which in chosen:
            runs = chosen_runs(which, names, seeds, trials, finished, machine if train else None)
            if train:
                complete(runs, finished, machine)
            table = finished.table(runs)
            if table.empty:
                print(f"{which.name}: no run on these data is finished; give --train true to train")
                continue
            summary = summarise(table).round(6)  # rounded as in the CSV file, so that CSV and Markdown agree
            write(summary.reset_index(), None, Path(out or home(sets)) / f"table1-{which.name}", markdown(summary))
            print(f"\n{which.name}: {len(table)} of {len(runs)} runs\n{markdown(summary)}\n")


def chosen_runs(
    which: DataSet,
    rows: Sequence[str],
    seeds: int,
    trials: int,
    finished: Results,
    machine: Machine | None,
) -> list[Run]:
    """The repeated runs of every row with the options that its search chose.

    Args:
        which: the set.
        rows: names of rows.
        seeds: number of seeds.
        trials: number of trials of each search.
        finished: the results so far.
        machine: how missing trials are carried out. None leaves out the rows whose search is unfinished.
    """
    searches = {row: Search(which, row, trials) for row in rows}
    if machine is not None:
        complete([run for search in searches.values() for run in search.runs], finished, machine)
    return [
        run
        for row, search in searches.items()
        if all(trial in finished for trial in search.runs)
        for run in repeated(which, row, search.best(finished), seeds)
    ]


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One line for each row, block by block, the best row of a block first.

    Returns:
        By row: the columns of `compare` for the accuracy, and `best_p_holm`, the corrected p of the difference from the
        block's best row. `balanced` is the mean balanced accuracy. `balanced_difference` is the paired difference of
        balanced accuracy from the reference, with interval `balanced_low` to `balanced_high`, `balanced_p` and
        `balanced_p_holm`. Then follow `block`, other mean accuracies, seconds, and the paper's figures.
    """
    present = [row for row in ROWS if row in set(runs["row"])]
    fusions = [f"{figure}_{fusion}" for figure in ("test", "balanced") for fusion in FUSIONS]
    figures = ["fused", "image", "table", *fusions, "without_table"]
    figures += ["seconds", "conflict_image", "conflict_table"]
    means = runs.groupby("row")[figures].mean()
    parts = []
    for block in dict.fromkeys(ROWS[row].block for row in present):
        predictions = {row: ROWS[row].prediction for row in present if ROWS[row].block == block}
        reference = REFERENCE.get(block, "")
        part = compare(runs, predictions, reference)
        best = compare(runs, predictions, str(part.index[0]))
        part = part.join(best["p_holm"].rename("best_p_holm"))
        balanced = compare(runs, dict.fromkeys(predictions, "balanced_accuracy"), reference)
        balanced = balanced.rename(columns={"accuracy": "balanced"} | {name: f"balanced_{name}" for name in _PAIRED})
        part = part.join(balanced[["balanced", *(f"balanced_{name}" for name in _PAIRED)]])
        parts.append(part.assign(block=block).join(means))
    summary = pd.concat(parts)
    paper = paper_figures().set_index(["row", "set", "prediction"])
    for name in ("dvm", "sun", "celeba"):
        for row in summary.index:
            cell = (ROWS[row].paper, name, ROWS[row].prediction)
            if cell in paper.index:
                mark = "?" if paper.loc[cell, "suspect"] else ""
                summary.loc[row, f"paper_{name}"] = f"{paper.loc[cell, 'accuracy']:.4f}{mark}"
    return summary


def markdown(summary: pd.DataFrame) -> str:
    """The summary in Markdown: for each block a table and the detectable difference, then the meaning of bold."""
    blocks = [_block(str(block), part) for block, part in summary.groupby("block", sort=False)]
    bold = "Bold: the best accuracy of a table"
    if summary["best_p_holm"].notna().any():
        bold += (
            ", and every accuracy that is not significantly worse (corrected resampled t test against the best row on "
            f"the same seeds and folds, Holm's correction over the table's rows, {_LEVEL:.0%} level)"
        )
    return "\n\n".join([*blocks, f"{bold}."])


def _block(block: str, part: pd.DataFrame) -> str:
    reference = ROWS[REFERENCE[block]].label.replace("*", r"\*") if block in REFERENCE else ""
    interval = " [95% interval]" if part["low"].notna().any() else ""
    leading = part["accuracy"].eq(part["accuracy"].max()) | part["best_p_holm"].ge(_LEVEL)
    table = pd.DataFrame(
        {
            "method": [ROWS[str(row)].label.replace("*", r"\*") for row in part.index],
            "accuracy": [_accuracy(line, bool(leading[row])) for row, line in part.iterrows()],
            "balanced accuracy": [_cell(value, ".3f") for value in part["balanced"]],
            **{f"{name} alone": [_cell(value, ".3f") for value in part[name]] for name in _single(part)},
            f"minus {reference}{interval}": [_difference(line) for _, line in part.iterrows()],
            "p (Holm)": ["<0.001" if p < 0.001 else _cell(p, ".3f") for p in part["p_holm"]],
        }
    )
    table = table.loc[:, [name == "accuracy" or (cells != "-").any() for name, cells in table.items()]]
    written = table.to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([f"**{block.capitalize()}**", written, _strength(part, reference)])


def _single(part: pd.DataFrame) -> list[str]:
    """The predictions of one modality that differ from the prediction by which the block is judged."""
    return [name for name in ("image", "table") if not (part[name].isna() | part[name].eq(part["accuracy"])).all()]


def _accuracy(line: pd.Series, leading: bool) -> str:
    """Mean and deviation, in bold where the row leads."""
    spread = "" if pd.isna(line["deviation"]) else f"{SPACE}±{SPACE}{line['deviation']:.3f}"
    written = _cell(line["accuracy"], ".3f") + spread
    return f"**{written}**" if leading else written


def _difference(line: pd.Series) -> str:
    """The difference from the reference with its interval."""
    interval = "" if pd.isna(line["low"]) else f" [{line['low']:+.3f},{SPACE}{line['high']:+.3f}]"
    return _cell(line["difference"], "+.3f") + interval


def _strength(part: pd.DataFrame, reference: str) -> str:
    """The number of runs, and the difference that these runs could have detected."""
    runs = f"Runs of a row: {' to '.join(map(str, dict.fromkeys((part['runs'].min(), part['runs'].max()))))}."
    if part["detectable"].isna().all():
        return runs
    return (
        f"{runs} A true difference of {part['detectable'].median():.3f} from {reference} would have been found with "
        f"80% power: the median over these rows, of a single test at the {_LEVEL:.0%} level."
    )


def _cell(value: object, form: str) -> str:
    return "-" if pd.isna(value) else format(value, form)


if __name__ == "__main__":
    command(main, __doc__, "--sets '[leaves100-texture]' --seeds 1 --trials 1")
