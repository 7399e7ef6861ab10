"""Ranks over several sets: which fused rows are better on all sets, and whether the differences exceed chance.

The command reads the tables of `table1.py`. On each set, the rows that every set has are ranked by mean accuracy and by
mean balanced accuracy. Rank 1 is the best, and equals share the mean of their ranks. Friedman's test asks whether the
mean ranks differ at all. Two rows differ where their mean ranks are further apart than Nemenyi's critical difference
(Demsar, JMLR 7, 2006). Both tests assume independent sets. The two tables of leaves100 share their pictures, so that
leaves100 counts too much.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse.typing import OpenUnitInterval
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from output import command, write
from protocol import ROWS
from scipy import stats
from sets import home
from tabular_image.style import VERMILLION, WIDTH, styled

MEASURES = {"accuracy": "accuracy", "balanced": "balanced accuracy"}


def main(
    sets: Sequence[str] = ("leaves100-texture", "leaves100-margin", "fashion", "houses"),
    rows: list[str] | None = None,
    level: OpenUnitInterval = 0.05,
    tables: str | None = None,
    out: str | None = None,
) -> None:
    """Rank, test and draw.

    Args:
        sets: two or more sets of the protocol, or YAML files, as they were given to table1.
        rows: three or more fused rows; None takes all fused rows that every set has.
        level: significance level of the critical difference.
        tables: folder of the tables of table1; None takes the default of table1's --out.
        out: folder of the ranks and the picture; None takes the folder of the tables.
    """
    folder = Path(tables or home(sets))
    names = [Path(name).stem for name in sets]
    if len(set(names)) < 2:
        raise SystemExit("error: ranks need two different sets or more; name more sets with --sets")
    summaries = {name: _fused(folder / f"table1-{name}.csv") for name in names}
    ranked = ranks(summaries, rows, level)
    for measure, part in ranked.groupby("measure", sort=False):
        first = part.iloc[0]
        print(
            f"\n{MEASURES[measure]}: Friedman's chi squared {first['friedman']:.2f}, p {first['p']:.3g}; critical "
            f"difference {first['critical_difference']:.2f}\n{part[['row', 'rank', *names]].to_string(index=False)}"
        )
    write(ranked, _draw(ranked, names), Path(out or folder) / "ranks", markdown(ranked))


def ranks(summaries: dict[str, pd.DataFrame], rows: Sequence[str] | None = None, level: float = 0.05) -> pd.DataFrame:
    """Mean ranks by accuracy and by balanced accuracy, best first.

    Args:
        summaries: by set, a table of the mean accuracies `accuracy` and `balanced` by row.
        rows: the rows to rank; None takes all rows that every set has.
        level: significance level of the critical difference.

    Returns:
        One line for each measure and row: `measure`, `row`, `rank` (mean over the sets), and the rank on each set under
        the set's name. All lines of a measure repeat `friedman` (chi squared), `p` (of Friedman's test) and
        `critical_difference` (Nemenyi).

    Raises:
        SystemExit: A set lacks one of the rows, or there are fewer than three rows.
    """
    complete = {name: table.dropna(subset=list(MEASURES)).index for name, table in summaries.items()}
    for name, present in complete.items():
        if missing := [row for row in rows or () if row not in present]:
            raise SystemExit(f"error: the table of {name} has no fused row {missing[0]}; it has {', '.join(present)}")
    found = dict.fromkeys(row for present in complete.values() for row in present)
    shared = list(rows or (row for row in found if all(row in present for present in complete.values())))
    if rows is None and len(shared) < len(found):
        print(f"careful: not every set has {', '.join(sorted(found.keys() - set(shared)))}; they are left out")
    if len(shared) < 3:
        raise SystemExit(
            f"error: ranks need three fused rows that every set has, and there are {len(shared)}; give other --sets, "
            "or run table1.py for more rows"
        )
    parts = []
    for measure in MEASURES:
        figures = pd.DataFrame({name: table.loc[shared, measure] for name, table in summaries.items()})
        part = figures.rank(ascending=False)
        part.insert(0, "rank", part.mean(axis=1))
        part = part.sort_values("rank", kind="stable").rename_axis("row").reset_index()
        friedman = stats.friedmanchisquare(*figures.to_numpy())
        part.insert(0, "measure", measure)
        critical = critical_difference(*figures.shape, level)
        parts.append(part.assign(friedman=friedman.statistic, p=friedman.pvalue, critical_difference=critical))
    return pd.concat(parts, ignore_index=True)


def markdown(ranked: pd.DataFrame) -> str:
    """The mean ranks in Markdown, the best row by accuracy first, and what the tests say of them."""
    wide = ranked.pivot(index="row", columns="measure", values="rank")[list(MEASURES)].sort_values("accuracy")
    wide.index = pd.Index([ROWS[row].label if row in ROWS else row for row in wide.index], name="method")
    wide.columns = [f"rank by {words}" for words in MEASURES.values()]
    first = ranked.drop_duplicates("measure").set_index("measure")
    chances = " and ".join(f"{first.loc[measure, 'p']:.2f} by {words}" for measure, words in MEASURES.items())
    return (
        f"{wide.round(2).to_markdown()}\n\nFriedman's test has a p of {chances}. Nemenyi's critical difference is "
        f"{first['critical_difference'].iloc[0]:.1f} ranks."
    )


def critical_difference(rows: int, sets: int, level: float = 0.05) -> float:
    """Nemenyi's critical difference: the least distance of two mean ranks that is significant at `level`."""
    studentised = stats.studentized_range.isf(level, rows, np.inf)
    return float(studentised / np.sqrt(2) * np.sqrt(rows * (rows + 1) / (6 * sets)))


def cliques(mean_ranks: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """First and last place of each longest stretch of ascending mean ranks whose ends are at most `critical` apart."""
    stretches: list[tuple[int, int]] = []
    for first, lowest in enumerate(mean_ranks):
        last = max(place for place, rank in enumerate(mean_ranks) if rank - lowest <= critical)
        if last > first and (not stretches or last > stretches[-1][1]):
            stretches.append((first, last))
    return stretches


def _fused(path: Path) -> pd.DataFrame:
    """The fused rows of a table that table1.py wrote, by row."""
    if not path.is_file():
        raise SystemExit(f"error: {path} does not exist; run table1.py, or give the folder of its tables as --tables")
    table = pd.read_csv(path, index_col="row")
    if missing := {"block", *MEASURES} - set(table):
        raise SystemExit(f"error: {path} has no column {min(missing)}; make it anew with table1.py")
    return table[table["block"] == "fused"]


@styled()
def _draw(ranked: pd.DataFrame, sets: Sequence[str]) -> Figure:
    """A diagram of critical differences for each measure (Demsar, figure 1)."""
    half = -(-ranked["row"].nunique() // 2)
    figure = Figure(figsize=(WIDTH, 2 * (1.3 + 0.22 * half)), layout="constrained")
    panels = figure.subplots(len(MEASURES))
    for axes, (measure, part) in zip(panels, ranked.groupby("measure", sort=False), strict=True):
        _diagram(axes, part)
        axes.set_title(f"mean rank in {MEASURES[measure]}, Friedman's p {part['p'].iloc[0]:.2g}", fontsize="medium")
    title = f"{', '.join(sets)}; a bar joins rows that are no further apart"
    figure.suptitle(textwrap.fill(title, 70, break_on_hyphens=False), fontsize="medium")
    return figure


def _diagram(axes: Axes, part: pd.DataFrame) -> None:
    """Rows left and right of an axis of mean ranks, the critical difference above the axis, bars of equals below."""
    mean_ranks, critical, count = part["rank"].tolist(), part["critical_difference"].iloc[0], len(part)
    half = -(-count // 2)
    bars = cliques(mean_ranks, critical)
    below = 0.6 + 0.35 * len(bars)  # the first line of text is this far down; a line is 1 high
    line = {"color": "black", "linewidth": 0.9, "clip_on": False}
    axes.set(xlim=(1 - 0.3 * count, count + 0.3 * count), ylim=(-below - half, 2.2))
    axes.axis("off")
    axes.plot([1, count], [0, 0], **line)
    for tick in range(1, count + 1):
        axes.plot([tick, tick], [0, 0.2], **line)
        axes.text(tick, 0.3, str(tick), ha="center", va="bottom", fontsize="small")
    end = min(1 + critical, 1.3 * count)
    axes.plot([1, end], [1.5, 1.5], **(line | {"linewidth": 2}))
    axes.text((1 + end) / 2, 1.6, f"critical difference {critical:.2f}", ha="center", va="bottom", fontsize="small")
    for number, (first, last) in enumerate(bars):
        height = -0.35 * (number + 1)
        axes.plot(
            [mean_ranks[first] - 0.06, mean_ranks[last] + 0.06], [height, height],
            color=VERMILLION, linewidth=3, solid_capstyle="butt", clip_on=False,
        )  # fmt: skip
    for place, (row, rank) in enumerate(zip(part["row"], mean_ranks, strict=True)):
        left = place < half
        height = -below - (place if left else count - 1 - place)
        edge, align = (0.8, "right") if left else (count + 0.2, "left")
        axes.plot([rank, rank, edge], [0, height, height], **line)
        text = f"{row}  {rank:.2f}" if left else f"{rank:.2f}  {row}"
        axes.text(edge + (-0.1 if left else 0.1), height, text, ha=align, va="center", fontsize="small")


if __name__ == "__main__":
    command(main, __doc__, "--sets '[fashion, houses]'")
