"""Draws the pictures of finished benchmarks again, from the tables beside the pictures. Nothing is trained or timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "accuracy"), str(HERE / "cost")]

import ablation  # noqa: E402 - found by the path above
import conflict  # noqa: E402
import convergence  # noqa: E402
import guide  # noqa: E402
import missing  # noqa: E402
import output  # noqa: E402
import projection  # noqa: E402
import scaling  # noqa: E402
import sensitivity  # noqa: E402
import step  # noqa: E402
import timing  # noqa: E402
import when  # noqa: E402

STUDIES = {study.__name__: study.draw for study in (ablation, conflict, convergence, missing, sensitivity)}
COSTS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "guide": guide.draw,
    "projection": projection.draw,
    "projection-torchjd": projection.draw_torchjd,
    "scaling": scaling.draw,
    "step": step.draw,
    "step-surgery": step.draw_surgery,
}


def redraw(picture: Path) -> None:
    """Draws one picture again. Pictures of `ranks.py` are left out: that command trains nothing and can be run again.

    Args:
        picture: the file STUDY-SET.png of a study, `when.png`, or the picture of a cost. The table is beside the
            picture.
    """
    study, _, set_name = picture.stem.partition("-")
    if study == "ranks":
        return
    table = pd.read_csv(picture.with_suffix(".csv"))
    if picture.stem in COSTS:
        timing.save(COSTS[picture.stem](table), table["machine"].iloc[0], picture)
    else:
        output.save(when.draw(table) if study == "when" else STUDIES[study](table, set_name), picture)
    print(f"drawn: {picture}")


def main(folder: Path = HERE) -> None:
    """Draw all pictures of a folder again.

    Args:
        folder: folder with the pictures, at any depth.
    """
    for picture in sorted(folder.rglob("*.png")):
        redraw(picture)


if __name__ == "__main__":
    output.command(main, __doc__, example="")
