"""Table I: every method on every set, fairly compared.

Every method gets the same splits, encoders, epochs and number of hyper-parameter trials, and is judged at the epoch
with the best validation accuracy. The trials are chosen by validation accuracy on the rows of seed 0; the chosen
options are then run for every seed. Prints a table for each set and writes it as CSV and Markdown; the single runs are
in the results file. A run that was finished is never repeated on the same data, so an interrupted benchmark goes on
where it stopped. The command tells which settings of a YAML file the protocol overrides.
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
from tabular_image.files import replacing

_PAIRED = ("difference", "low", "high", "p", "p_holm")  # of what `compare` returns, shown of balanced accuracy too
_LEVEL = 0.05
_SPACE = "\N{NO-BREAK SPACE}"  # inside a number's cell, so that a narrow column breaks between numbers


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
    """Run what is missing, then tabulate.

    Args:
        sets: names of the protocol, or YAML files with options of train.py for a set of your own.
        rows: methods; None takes all.
        seeds: runs of each method, times the folds where a set is cross-validated.
        trials: hyper-parameter trials of each method on each set; 1 takes the defaults.
        results: the file with one line a finished run; None is runs.csv in the default of out.
        out: folder of the tables; None is benchmarks/accuracy/results for the protocol's sets, and runs/accuracy below
            the current folder where one of the sets is a YAML file.
        train: train what is missing; false tabulates what is finished, and says so where it could not check the data.
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
                print(f"{which.name}: no run on these data is finished")
                continue
            summary = summarise(table).round(6)  # as in the CSV file, so that the two agree to the last digit
            path = Path(out or home(sets)) / f"table1-{which.name}"
            write(summary.reset_index(), None, path)
            with replacing(path.with_suffix(".md")) as temporary:
                temporary.write_text(markdown(summary) + "\n")
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
        seeds: of each.
        trials: of each search.
        finished: the results so far.
        machine: carries out the missing trials; None leaves out rows whose search is not finished.
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
    """One line a row, block by block and best first within each.

    Returns:
        By row: the columns of `compare` for the accuracy; `best_p_holm`, the corrected p of the difference from the
        block's best row; `balanced`, the mean balanced accuracy, its paired difference from the reference
        `balanced_difference` with the interval `balanced_low` to `balanced_high`, `balanced_p` and `balanced_p_holm`;
        `block`; other mean accuracies and seconds; and the paper's figures.
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
    """The summary for people: a table a block, what each block could have shown, and at the end what bold means."""
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
    """The single predictions that differ from the one that the block is judged by."""
    return [name for name in ("image", "table") if not (part[name].isna() | part[name].eq(part["accuracy"])).all()]


def _accuracy(line: pd.Series, leading: bool) -> str:
    """Mean and deviation, in bold where the row leads."""
    spread = "" if pd.isna(line["deviation"]) else f"{_SPACE}±{_SPACE}{line['deviation']:.3f}"
    written = _cell(line["accuracy"], ".3f") + spread
    return f"**{written}**" if leading else written


def _difference(line: pd.Series) -> str:
    """The difference from the reference with its interval."""
    interval = "" if pd.isna(line["low"]) else f" [{line['low']:+.3f},{_SPACE}{line['high']:+.3f}]"
    return _cell(line["difference"], "+.3f") + interval


def _strength(part: pd.DataFrame, reference: str) -> str:
    """How many runs there are, and what they could have shown."""
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
