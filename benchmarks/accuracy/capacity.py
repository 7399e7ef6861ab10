"""Size of the pictures, length and augmentation of the training: what the image alone reaches on the validation rows.

The protocol of the small CNN that is trained for longer takes these three options from this table. The validation rows
alone decide, before any fused row is trained, and all rows of the protocol share the choice. The command changes one
option at a time from the protocol's choice. The table therefore also shows whether larger pictures or a longer training
would still gain. The test accuracy stands beside the validation accuracy, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from jsonargparse.typing import PositiveInt
from output import command, write
from protocol import CNN, ROWS, SETS, known_recipe, repeated, row_options
from runs import Machine, complete
from sets import begun, home
from tabular_image.options import Options


def main(
    sets: Sequence[str] = tuple(name for name in SETS if name.endswith(CNN)),
    sizes: Sequence[PositiveInt] = (32, 64),
    lengths: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    seeds: PositiveInt = 3,
    recipe: str = "adamw 0.003",
    results: str | None = None,
    out: str | None = None,
    machine: Machine = Machine(),  # noqa: B008
) -> None:
    """Carry out the missing runs, then tabulate.

    Args:
        sets: sets of the protocol, or YAML files with options of train.py.
        sizes: sides of the pictures in pixels.
        lengths: lengths of the training, as multiples of the set's epochs.
        seeds: number of seeds, as for table1.
        recipe: optimizer and learning rate, a recipe of the protocol.
        results: the file with one line for each finished run; None takes runs.csv in the default of --out.
        out: folder of the tables; None takes the folder of the sets' results.
        machine: how the runs are carried out.
    """
    how = known_recipe(recipe)
    with begun(sets, results, out, machine, [recipe]) as (chosen, finished):
        for which in chosen:
            options = row_options(which.options, ROWS["image"], **how)
            candidates = [(one, repeated(which, "image", one, seeds)) for one in neighbours(options, sizes, lengths)]
            complete([run for _, runs in candidates for run in runs], finished, machine)
            table = pd.DataFrame(
                {
                    "image_size": one.image_size,
                    "epochs": one.epochs,
                    "augment": one.augment,
                    "runs": len(lines),
                    **lines[["val_accuracy", "image", "balanced_accuracy", "best_epoch", "seconds"]].mean(),
                    "deviation": lines["image"].std(),
                }
                for one, runs in candidates
                for lines in [finished.table(runs)]
            )
            write(table, None, Path(out or home(sets)) / f"capacity-{which.name}", markdown(table))
            print(f"\n{which.name}\n{markdown(table)}\n")


def neighbours(options: Options, sizes: Sequence[int], lengths: Sequence[float]) -> list[Options]:
    """The given options, then these options with another size, another length, or the other augmentation."""
    changes: list[dict[str, int | bool]] = [{"image_size": size} for size in sizes]
    changes += [{"epochs": max(1, round(length * options.epochs))} for length in lengths]
    changes += [{"augment": not options.augment}]
    others = [replace(options, **change) for change in changes]
    return [options, *(other for other in others if other != options)]


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, the protocol's choice first."""
    columns = {
        "pixels": table["image_size"].astype(str),
        "epochs": table["epochs"].astype(str),
        "augmentation": table["augment"].map({True: "yes", False: "no"}),
        "validation accuracy": table["val_accuracy"].map("{:.3f}".format),
        "test accuracy": table["image"].map("{:.3f}".format),
        "best epoch": table["best_epoch"].map("{:.0f}".format),
    }
    return pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    command(main, __doc__, "--sets '[leaves100-texture-cnn]' --seeds 1")
