"""Writing what a benchmark found: data and picture, complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import runs  # noqa: F401 - makes tabular_image importable
from matplotlib.figure import Figure
from tabular_image.files import replacing

RESULTS = Path(__file__).resolve().parent / "results"


def write(table: pd.DataFrame, figure: Figure | None, path: Path) -> None:
    """Writes `path`.csv, and `path`.png where there is a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".csv")) as temporary:
        table.round(6).to_csv(temporary, index=False, lineterminator="\n")
    if figure is not None:
        with replacing(path.with_suffix(".png")) as temporary:
            figure.savefig(temporary, dpi=120)
    print(f"written: {path.with_suffix('.csv')}" + (f" and {path.with_suffix('.png')}" if figure is not None else ""))
