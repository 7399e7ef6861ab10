"""What the commands of the figures share: their options, and the runs of some variants on some sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from output import RESULTS, write
from protocol import RECIPES, Row, base_options, repeated, row_options
from runs import Machine, Results, Run, complete


@dataclass(frozen=True)
class Study:
    """Options of the command."""

    sets: Sequence[str] = ("leaves100-texture",)
    """Names of the protocol, or YAML files with options of train.py."""
    seeds: PositiveInt = 5
    """Runs of each variant, times the folds where a set is cross-validated."""
    recipe: str = "adamw 0.003"
    """Optimizer and learning rate, as the protocol names them."""
    results: str = str(RESULTS / "runs.csv")
    """The file with one line a finished run."""
    out: str = str(RESULTS)
    """Folder of the tables and pictures."""
    machine: Machine = field(default_factory=Machine)
    """How the runs are carried out."""

    def completed(self, rows: Mapping[str, Row], needs: str = "") -> Iterator[tuple[str, list[Run], pd.DataFrame]]:
        """For each set its name, the runs of all rows, and their lines of the results file; trains what is missing.

        Args:
            rows: variants by name.
            needs: a file that every run's folder must hold too, such as `metrics.csv`.
        """
        if self.recipe not in RECIPES:
            raise SystemExit(f"error: there is no recipe {self.recipe!r}; choose from {', '.join(RECIPES)}")
        finished = Results(self.results)
        for set_name, base in dict(base_options(name) for name in self.sets).items():
            runs = [
                run
                for name, row in rows.items()
                for run in repeated(set_name, name, row_options(base, row, **RECIPES[self.recipe]), self.seeds)
            ]
            complete(runs, finished, self.machine, needs)
            yield set_name, runs, finished.table(runs)

    def write(self, table: pd.DataFrame, figure: Figure, name: str) -> None:
        """Write data and picture into the folder `out`."""
        write(table, figure, Path(self.out) / name)


def read_command_line(description: str | None) -> Study:
    """The options given to a command; `description` is its module's docstring."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description)
    parser.add_class_arguments(Study)
    return Study(**vars(parser.instantiate(parser.parse_args())))
