"""Tasks other than classes: the price of a house as a number, and three columns of fashion as labels.

Every method trains with one recipe: AdamW at 0.003 for 20 epochs (fashion: 10) on fixed features of the pictures. The
epoch with the lowest validation loss is tested. Runs are kept, and an interrupted command continues when it is started
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import runs  # noqa: F401 - makes tabular_image importable
from output import command, write
from protocol import ROWS
from sklearn.ensemble import HistGradientBoostingRegressor
from tabular_image.methods import SETTINGS
from tabular_image.options import Options
from tabular_image.run import build_data, read_samples, run

RESULTS = Path(__file__).resolve().parent / "results" / "tasks"
_COMMON: dict[str, Any] = {"image_encoder": "features", "image_size": 64, "fusion": "calibrated", "pictures": False}
SETS: dict[str, dict[str, Any]] = {
    "houses": {
        **{"dataset": "houses", "task": "regression", "log_target": True, "epochs": 20, "folds": 5, "validation": 0.15},
    },
    "fashion": {
        **{"dataset": "fashion", "target_column": ["articleType", "baseColour", "season"], "epochs": 10},
    },
}
METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("image", "table", "concatenation", "maximum", "alternating", "gaal")},
    "gaal_joint": {"rule": "none"},
}
_NAMES = {name: ROWS[name].label for name in METHODS if name in ROWS} | {
    **{"gaal": "GAAL", "gaal_joint": "Alternation, joint turn", "boosting on the table": ROWS["boosting-table"].label},
    **{"macro_f1": "macro F1", "mean_average_precision": "mean average precision", "auroc": "AUROC"},
    **{"r2": "R²", "rmse": "RMSE", "mae": "MAE", "coverage": "coverage of the 90% interval"},
}


def main(
    which: Literal["houses", "fashion"] = "houses",
    data_root: str = "data",
    folder: str = "runs/tasks",
    out: Path = RESULTS,
) -> None:
    """Carry out the missing runs, then tabulate means and deviations over folds.

    Args:
        which: the data set.
        data_root: folder with one folder for each data set.
        folder: folder of the run folders.
        out: folder of the table.
    """
    lines: list[dict[str, Any]] = []
    folds = SETS[which].get("folds", 1)
    for fold in range(folds):
        given = _COMMON | SETS[which] | {"data_root": data_root, "fold": fold, "threads": 1}
        samples = read_samples(Options(**given))
        for method, settings in METHODS.items():
            place = Path(folder) / f"{which}-{method}-{fold}"
            options = Options(
                **given, method=method, settings=SETTINGS[method](**settings), out=str(place), resume=place.exists()
            )
            if not (place / "results.json").exists():
                run(options, samples)
            lines += [line | {"fold": fold} for line in figures(method, place)]
        if which == "houses":
            lines.append({"row": "boosting on the table", "fold": fold} | boosting(Options(**given)))
    table = pd.DataFrame(lines)
    write(table, None, out / which, markdown(table))
    print(markdown(table))


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown: the mean of each row and measure, with the deviation where there are several folds."""
    grouped = table.rename(columns=_NAMES).drop(columns="fold").groupby("row", sort=False)
    shown = grouped.mean().map("{:.3f}".format)
    if table["fold"].nunique() > 1:
        shown += " ± " + grouped.std().map("{:.3f}".format)
    methods = [", ".join(_NAMES.get(part, part) for part in str(row).split(", ")) for row in shown.index]
    shown.insert(0, "method", methods)
    return shown.to_markdown(index=False, disable_numparse=True)


def figures(method: str, folder: Path) -> list[dict[str, Any]]:
    """The lines of a run: one for each fusion of voices, or one for the main prediction of a method without fusion."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if not results["fusion"]:
        return [{"row": method} | next(iter(results["test"].values()))]
    fusions = results["fusion_measures"].items()
    return [{"row": f"{method}, {fusion}"} | by_split["test"] for fusion, by_split in fusions]


def boosting(options: Options) -> dict[str, Any]:
    """Gradient boosting on the encoded table, on the rows of a run. The interval assumes one variance for all rows."""
    from tabular_image.metrics import measure_numbers

    data = build_data(options, read_samples(options))
    train, test = data.splits["train"], data.splits["test"]
    values = data.task.mean + data.task.deviation * data.target.double()
    model = HistGradientBoostingRegressor(random_state=options.seed).fit(
        data.table[train].numpy(), values[train].numpy()
    )
    predicted = values.new_tensor(model.predict(data.table[test].numpy()))
    rest = data.splits["val"]
    deviation = (values[rest] - values.new_tensor(model.predict(data.table[rest].numpy()))).std()
    return measure_numbers(predicted, deviation.expand_as(predicted), values[test], 0.9)


if __name__ == "__main__":
    command(main, __doc__, "--which houses")
