"""Predict new rows with a trained model: `python examples/tabular_image/predict.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from tabular_image.commands import run_command
from tabular_image.errors import border

_TOLD = 5  # sentences on single rows


def predict(
    run: str,
    path: str,
    out: str | None = None,
    image_root: str | None = None,
    separator: str = "",
    encoding: str = "",
    batch_size: PositiveInt | None = None,  # type: ignore[valid-type]
    workers: NonNegativeInt = 2,  # type: ignore[valid-type]
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Predict the rows of a table, with a line of output a row.

    Args:
        run: Folder of a run of train.py, or the model.pt in it.
        path: The table, as CSV and its kin, Excel or Parquet. The table has the columns that the model was trained
            with, but for the target. All columns of pictures may be absent, or all other columns.
        out: CSV file of the predictions. The default is standard output.
        image_root: Folder where relative paths of pictures start. The default is the folder of the table.
        separator: Sign between the cells. The sign is found where left out.
        encoding: Encoding of the text. The encoding is found where left out.
        batch_size: Rows in memory at a time. The default is the batch size of the training, with which figures repeat
            to the bit.
        workers: Reading processes. The processes read pictures.
        device: Where to predict.

    Raises:
        InputError: the model or the table cannot be used, or the file cannot be written.
    """
    import pandas as pd  # these take seconds

    from tabular_image.data.reading import read_table
    from tabular_image.files import writing
    from tabular_image.prediction import Predictor

    predictor = Predictor.load(run, device)
    predictor.batch_size = batch_size or predictor.batch_size
    table = read_table(Path(path), separator, encoding)
    root = Path(path).parent if image_root is None else Path(image_root)
    frame = table.frame.set_index(pd.Index(table.places))
    predicted = predictor.predict(frame, root, name=Path(path).name, workers=workers)
    for sentence in predictor.problems[:_TOLD]:
        print(f"careful: {sentence}", file=sys.stderr)
    if len(predictor.problems) > _TOLD:
        print(f"careful: {len(predictor.problems) - _TOLD} more of that kind", file=sys.stderr)
    seen = ", ".join(f"{count} from {what}" for what, count in predicted["seen"].value_counts().items())
    print(f"{len(predicted)} rows: {seen}", file=sys.stderr)
    if out is None:
        predicted.to_csv(sys.stdout)
        return
    with border("make the folder of", out, "give another --out"):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    with writing(Path(out), "start again") as temporary:
        predicted.to_csv(temporary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(
        predict,
        __file__,
        "Predict new rows with a model of train.py, and write a line of output a row.",
        arguments,
        example="--run runs/csv-gaal-seed0 --path new.csv --out predictions.csv",
    )


if __name__ == "__main__":
    sys.exit(main())
