"""Writing the results of a benchmark, each file whole or not at all, and telling errors in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import runs  # noqa: F401 - makes tabular_image importable
from matplotlib.figure import Figure
from tabular_image.commands import run_command
from tabular_image.errors import InputError
from tabular_image.files import replacing
from tabular_image.style import DPI


def command(main: Callable[..., None], description: str | None, example: str, source: type[Any] | None = None) -> None:
    """Runs a command with the options that it was given, and ends the process where something stops the command.

    Args:
        main: its parameters are the options.
        description: the docstring of its module.
        example: a command line, without the script.
        source: a dataclass that `main` takes, and whose fields are the options.
    """
    if code := run_command(telling_errors()(main), sys.argv[0], description, example=example, source=source):
        sys.exit(code)


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


def write(table: pd.DataFrame, figure: Figure | None, path: Path, markdown: str = "") -> None:
    """Writes `path`.csv, `path`.png where there is a figure, and `path`.md where there is Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".csv")) as temporary:
        table.round(6).to_csv(temporary, index=False, lineterminator="\n")
    if figure is not None:
        save(figure, path.with_suffix(".png"))
    if markdown:
        with replacing(path.with_suffix(".md")) as temporary:
            temporary.write_text(markdown + "\n", encoding="utf-8")
    print(f"written: {path.with_suffix('.csv')}" + (f" and {path.with_suffix('.png')}" if figure is not None else ""))


def save(figure: Figure, path: Path) -> None:
    """Writes a picture."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
