"""What a finished run leaves: figures, predictions, pictures and a small table."""

from __future__ import annotations

import json
import platform
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

from gaal_surgery import ConflictMonitor

from . import artifact
from .data.module import TabularImageData
from .errors import reason
from .files import writing
from .methods.base import Method
from .metrics import defined
from .options import Options
from .style import BLUE, COLOURS, PURPLE, WIDTH, marker, styled
from .tasks import Task

_LONGEST = 30  # characters of a class name in a picture
_LEGIBLE = 30  # classes whose names and counts still fit into the confusion matrix
_PAIRS = 20  # of the most confused classes, where the matrix does not fit


def report(
    folder: Path,
    options: Options,
    data: TabularImageData,
    method: Method,
    outputs: dict[str, dict[str, Any]],
    epochs: pd.DataFrame,
    origin: Mapping[str, Any],
) -> None:
    """Writes results, predictions and pictures into the run folder, and prints the test figures.

    The results are written after the tables, so that a run that has results is complete. A picture that cannot be drawn
    is reported and left out.

    Args:
        folder: the run folder.
        options: the options of the run.
        data: class names and ids.
        method: with the weights of the best epoch.
        outputs: collated outputs of `Method.predict_step` for "val", "test" and "without_table".
        epochs: one row an epoch, as in `metrics.csv`.
        origin: where the run comes from: its command, device, number of parameters and data.

    Raises:
        InputError: a file cannot be written.
    """
    logits, target, rows = (outputs["test"][name] for name in ("logits", "target", "row"))
    predictions = method.predictions(logits)
    monitor = getattr(method, "monitor", None)
    best = _best(epochs)
    fusions = _measure_fusions(method, outputs)
    task, figure = method.task, method.task.figure
    test, validation, without_table = (
        {name: task.measure(values, outputs[split]["target"]) for name, values in predicted.items()}
        for split, predicted in (
            (split, method.predictions(outputs[split]["logits"])) for split in ("test", "val", "without_table")
        )
    )
    results = {
        "dataset": options.dataset,
        "method": options.method,
        "task": task.name,
        "figure": figure,
        "seed": options.seed,
        "split_sizes": data.split_sizes,
        "epochs": len(epochs),
        "best_epoch": int(best["epoch"]),
        f"val_{figure}": best[f"val_{figure}"],
        "seconds": round(epochs["seconds"].sum(), 3),
        "test": test,
        "validation": validation,
        "without_table": {name: figures[figure] for name, figures in without_table.items()},
        "without_table_measures": without_table,
        "fusion": method.fusion if "fused" in predictions and "fused" not in logits else None,
        "fusions": {
            name: {split: figures[figure] for split, figures in by_split.items()} for name, by_split in fusions.items()
        },
        "fusion_measures": fusions,
        "conflict": monitor.summary() if monitor else None,
        **origin,
        "versions": artifact.versions(),
    }
    artifact.save(folder, options, data, method, origin["data"])
    with writing(folder / "predictions.csv") as temporary:
        _tabulate(data, task, predictions, target, rows).to_csv(temporary, index=False)
    if monitor:
        with writing(folder / "conflict.csv") as temporary:
            pd.DataFrame(monitor.history()).to_csv(temporary, index=False)
    with writing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(defined(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if options.pictures:
        main = next(iter(predictions.values()))
        _draw(lambda: curves(epochs, figure), folder / "curves.png")
        if task.name == "classification":
            picture = partial(confusion_picture, main.argmax(dim=1), target, data.classes)
            _draw(picture, folder / "confusion.png", mathematics=False)
        if task.name == "regression":
            _draw(lambda: predicted_picture(task, main, target), folder / "predicted.png", mathematics=False)
        if monitor:
            _draw(lambda: conflict_picture(monitor), folder / "conflict.png")
        from .page import write_page  # which draws with the figures below

        write_page(folder, results=results, options=options, data=data, method=method, outputs=outputs, epochs=epochs)

    print(f"\nTest after epoch {results['best_epoch']}, the best of {results['epochs']} ({results['seconds']:.0f} s)")
    print(summary(results))
    print(f"Figures, predictions and pictures: {folder}/")


def summary(results: Mapping[str, Any]) -> str:
    """The test figures, a line for each prediction. A last line names a fusion that was better in validation.

    Args:
        results: as in `results.json`.
    """
    chosen, fusions = results["fusion"], results["fusion_measures"]
    table = pd.DataFrame(final_lines(results), dtype=float).T.to_string(float_format="{:.4f}".format, na_rep="-")
    if not chosen:
        return table
    figure = results["figure"]
    values = {name: figures["val"][figure] for name, figures in fusions.items() if figures["val"][figure] is not None}
    best = max(values, key=lambda name: values[name], default=chosen)
    if chosen not in values or values[best] <= values[chosen]:
        return table
    fitted = ", on which its weights were fitted" if best == "calibrated" else ""
    return (
        f"{table}\n--fusion {best}: {figure.replace('_', ' ')} {values[best]:.3f} on the validation rows{fitted}; "
        f"{chosen}: {values[chosen]:.3f}"
    )


def final_lines(results: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    """Test figures by prediction: each fusion, the others, and the main one without the table.

    Args:
        results: as in `results.json`.
    """
    chosen, (main, without) = results["fusion"], next(iter(results["without_table_measures"].items()))
    fusions = results["fusion_measures"].items() if chosen else ()
    lines = {f"fused, {name}{' (--fusion)' if name == chosen else ''}": by_split["test"] for name, by_split in fusions}
    lines |= {name: figures for name, figures in results["test"].items() if not (chosen and name == "fused")}
    return lines if main == "table" else lines | {f"{main}, without the table": without}


def device_name(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _best(epochs: pd.DataFrame) -> pd.Series[float]:
    """The row of the epoch whose weights were kept."""
    return epochs.loc[epochs["val_selection"].idxmax()]


def _measure_fusions(method: Method, outputs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures of each fusion by split."""
    fused = {split: method.fusions(outputs[split]["logits"]) for split in ("val", "test")}
    return {
        name: {split: method.task.measure(fused[split][name], outputs[split]["target"]) for split in fused}
        for name in fused["test"]
    }


def _tabulate(
    data: TabularImageData, task: Task, predictions: dict[str, Tensor], target: Tensor, rows: Tensor
) -> pd.DataFrame:
    """One line for each test row: id, target, the answer of each prediction, and how sure the first prediction is."""
    ids = data.samples.ids
    main, outputs = next(iter(predictions.items()))
    columns = {ids.name or "id": ids.iloc[rows.numpy()].to_numpy(), "target": task.truth(target)}
    columns |= {name: task.answers(values) for name, values in predictions.items()}
    return pd.DataFrame(columns).join(task.confidence(outputs).round(6).add_prefix(f"{main}_"))


def curves(epochs: pd.DataFrame, shown: str) -> Figure:
    """Loss and the shown measure by epoch, the best epoch marked."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    loss, measure = figure.subplots(1, 2)
    name_of, points = f"val_{shown}", marker(len(epochs))
    best = _best(epochs)
    for name, colour in COLOURS.items():
        if f"train_loss_{name}" in epochs:
            label = f"training, {name}"
            loss.plot(epochs["epoch"], epochs[f"train_loss_{name}"], color=colour, marker=points, label=label)
        if f"{name_of}_{name}" in epochs:
            measure.plot(epochs["epoch"], epochs[f"{name_of}_{name}"], color=colour, marker=points, label=name)
    loss.plot(epochs["epoch"], epochs["val_loss"], color="grey", linestyle="--", marker=points, label="validation")
    if f"{name_of}_image" not in epochs or f"{name_of}_table" in epochs:
        measure.plot(epochs["epoch"], epochs[name_of], color=COLOURS["fused"], marker=points, label="fused")
    circle = {"marker": "o", "markersize": 10, "fillstyle": "none", "linestyle": "none"}
    measure.plot(best["epoch"], best[name_of], **circle, color="black", label="best epoch, tested")
    # The likelihood of a number may be negative.
    positive = (epochs.filter(regex="^(train_loss|val_loss)").min() > 0).all()
    loss.set(xlabel="epoch", ylabel="loss", yscale="log" if positive else "linear")
    lowest = epochs.filter(regex=f"^{name_of}").min().min()
    measure.set(xlabel="epoch", ylabel=f"validation {words(shown)}", ylim=(max(lowest, -1) - 0.02, 1.01))
    for axes in (loss, measure):
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def confused(predicted: Tensor, target: Tensor) -> list[tuple[int, int, int]]:
    """True class, predicted class and number of rows of every pair that is confused, the most frequent first.

    Args:
        predicted: long (N,).
        target: long (N,).
    """
    wrong = predicted != target
    pairs, counts = torch.stack([target, predicted], dim=1)[wrong].unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [
        (true, other, count) for (true, other), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


def confusion_picture(predicted: Tensor, target: Tensor, classes: Sequence[str]) -> Figure:
    """The confusion matrix of named classes, or the most confused pairs where the classes are too many for a matrix.

    Args:
        predicted: long (N,).
        target: long (N,).
        classes: the names of the C classes.
    """
    names = [textwrap.shorten(name, _LONGEST, placeholder="…") or name[:_LONGEST] for name in classes]
    return (_matrix if len(names) <= _LEGIBLE else _pairs)(predicted, target, names)


def _matrix(predicted: Tensor, target: Tensor, names: Sequence[str]) -> Figure:
    """Counts by true and predicted class; a cell without a row stays empty."""
    side = min(WIDTH, 3 + 0.3 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay.from_predictions(
        target.numpy(),
        predicted.numpy(),
        labels=range(len(names)),
        display_labels=names,
        cmap="Blues",
        colorbar=False,
        xticks_rotation="vertical" if max(map(len, names)) > 3 else "horizontal",
        text_kw={"fontsize": 9 if len(names) <= 15 else 6.5},
        ax=axes,
    )
    for text in display.text_.flat:
        text.set_visible(text.get_text() != "0")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(visible=False)
    if len(names) > 15:
        axes.tick_params(labelsize=7.5)
    return figure


def _pairs(predicted: Tensor, target: Tensor, names: Sequence[str]) -> Figure:
    """The most confused pairs of classes, by name and number of rows."""
    worst = confused(predicted, target)[:_PAIRS]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.24 * max(1, len(worst))), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(worst)), [count for *_, count in worst], color=BLUE)
    axes.bar_label(bars, padding=3)
    axes.set_yticks(range(len(worst)), [f"{names[true]} → {names[other]}" for true, other, _ in worst])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("test rows")
    axes.xaxis.get_major_locator().set_params(integer=True)
    wrong = f"{(predicted != target).sum():,} of {len(target):,} test rows are predicted wrongly"
    figure.suptitle(f"{wrong}; the most frequent pairs, true → predicted")
    return figure


def predicted_picture(task: Task, outputs: Tensor, target: Tensor) -> Figure:
    """Predicted beside true numbers, with the ends of their intervals."""
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.subplots()
    true, predicted, ends = task.truth(target), task.answers(outputs), task.confidence(outputs)
    errors = [(predicted - ends["low"]).clip(lower=0), (ends["high"] - predicted).clip(lower=0)]
    axes.errorbar(true, predicted, errors, fmt="o", markersize=3, elinewidth=0.5, alpha=0.5)
    both = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(both, both, color="black", linewidth=1)
    axes.set(xlabel=f"true {task.target.names[0]}", ylabel=f"predicted {task.target.names[0]}, 90% interval")
    if task.target.log:
        axes.set(xscale="log", yscale="log")
    return figure


def words(figure: str) -> str:
    """The name of a measure for readers."""
    return {"r2": "R²", "rmse": "RMSE", "mae": "MAE", "auroc": "AUROC"}.get(figure, figure.replace("_", " "))


def conflict_picture(monitor: ConflictMonitor) -> Figure:
    """The cosine between the gradients over training."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=[COLOURS.get(row["modality"], PURPLE) for row in monitor.summary()])
    monitor.plot(axes)
    return figure


def _draw(build: Callable[[], Figure], path: Path, *, mathematics: bool = True) -> None:
    """Builds and saves a picture. Without mathematics `$` is a plain letter, as in the names of classes."""
    try:
        with warnings.catch_warnings(), styled(), matplotlib.rc_context({"text.parse_math": mathematics}):
            warnings.simplefilter("ignore")  # such as warnings of letters that the font lacks, drawn as boxes
            figure = build()
            with writing(path) as temporary:
                figure.savefig(temporary, dpi=120)
    except Exception as error:
        print(f"could not make {path.name}: {reason(error)}")
