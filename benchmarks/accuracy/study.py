"""Shared by the commands of the figures: the options, and the runs of some variants on some sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from output import write
from protocol import Row, known_recipe, repeated, row_options
from runs import Machine, Run, complete
from sets import begun, home


@dataclass(frozen=True)
class Study:
    """Options of the command."""

    sets: Sequence[str] = ("leaves100-texture",)
    """Sets of the protocol, or YAML files with options of train.py."""
    seeds: PositiveInt = 5
    """Number of seeds. A variant has one run for each seed, or for each seed and fold of a cross-validated set."""
    recipe: str = "adamw 0.003"
    """Optimizer and learning rate, a recipe of the protocol."""
    results: str | None = None
    """The file with one line for each finished run; None takes runs.csv in the default of --out."""
    out: str | None = None
    """Folder of the tables and pictures. None takes benchmarks/accuracy/results for the protocol's sets, and
    runs/accuracy below the current folder where one of the sets is a YAML file."""
    machine: Machine = field(default_factory=Machine)
    """How the runs are carried out."""

    def completed(self, rows: Mapping[str, Row], needs: str = "") -> Iterator[tuple[str, list[Run], pd.DataFrame]]:
        """For each set, the name, the runs of all rows, and the runs' lines of the results file. Trains missing runs.

        Args:
            rows: variants by name.
            needs: a file that every run's folder must also hold, such as `metrics.csv`.
        """
        how = known_recipe(self.recipe)
        with begun(self.sets, self.results, self.out, self.machine, [self.recipe]) as (chosen, finished):
            for which in chosen:
                runs = [
                    run
                    for name, row in rows.items()
                    for run in repeated(which, name, row_options(which.options, row, **how), self.seeds)
                ]
                complete(runs, finished, self.machine, needs)
                yield which.name, runs, finished.table(runs)

    def write(self, table: pd.DataFrame, figure: Figure, name: str) -> None:
        """Write data and picture into the folder `out`."""
        write(table, figure, Path(self.out or home(self.sets)) / name)
