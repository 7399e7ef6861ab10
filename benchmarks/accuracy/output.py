"""Writing the results of a benchmark, each file whole or not at all, and telling errors in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import runs  # noqa: F401 - makes tabular_image importable
from matplotlib.figure import Figure
from tabular_image.errors import InputError
from tabular_image.files import replacing
from tabular_image.style import DPI


@contextmanager
def telling_errors() -> Iterator[None]:
    """Ends the command with one sentence where data, a file or the user stops it."""
    try:
        yield
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}; finished runs are kept, start again to continue") from error
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, start again to continue", file=sys.stderr)
        raise SystemExit(130) from None


def write(table: pd.DataFrame, figure: Figure | None, path: Path) -> None:
    """Writes `path`.csv, and `path`.png where there is a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".csv")) as temporary:
        table.round(6).to_csv(temporary, index=False, lineterminator="\n")
    if figure is not None:
        save(figure, path.with_suffix(".png"))
    print(f"written: {path.with_suffix('.csv')}" + (f" and {path.with_suffix('.png')}" if figure is not None else ""))


def save(figure: Figure, path: Path) -> None:
    """Writes a picture."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
