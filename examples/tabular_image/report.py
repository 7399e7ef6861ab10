"""What a finished run leaves: figures, predictions, pictures and a small table."""

from __future__ import annotations

import json
import platform
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping
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
from .tasks import Task

_LONGEST = 30  # characters of a class name in a picture
_LEGIBLE = 20  # classes whose names and counts still fit into the confusion matrix
_COLOURS = {"fused": "black", "image": "tab:blue", "table": "tab:orange", "joint": "tab:green"}


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
    is told and left out.

    Args:
        folder: the run folder.
        options: of the run.
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
            _draw(lambda: _confusion(main, target, data.classes), folder / "confusion.png", mathematics=False)
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
    """The test figures as a table with a line a prediction, and a line where another fusion was better in validation.

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
    """What a device is called."""
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
    """One line a test row: its id, its target, what each prediction says, and how sure the first is."""
    ids = data.samples.ids
    main, outputs = next(iter(predictions.items()))
    columns = {ids.name or "id": ids.iloc[rows.numpy()].to_numpy(), "target": task.truth(target)}
    columns |= {name: task.answers(values) for name, values in predictions.items()}
    return pd.DataFrame(columns).join(task.confidence(outputs).round(6).add_prefix(f"{main}_"))


def curves(epochs: pd.DataFrame, shown: str) -> Figure:
    """Loss and the shown measure by epoch, the best epoch marked."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, measure = figure.subplots(1, 2)
    name_of = f"val_{shown}"
    best = _best(epochs)
    for name, colour in _COLOURS.items():
        if f"train_loss_{name}" in epochs:
            loss.plot(epochs["epoch"], epochs[f"train_loss_{name}"], color=colour, label=f"training, {name}")
        if f"{name_of}_{name}" in epochs:
            measure.plot(epochs["epoch"], epochs[f"{name_of}_{name}"], color=colour, label=name)
    loss.plot(epochs["epoch"], epochs["val_loss"], color="black", linestyle="--", label="validation")
    if f"{name_of}_image" not in epochs or f"{name_of}_table" in epochs:
        measure.plot(epochs["epoch"], epochs[name_of], color="black", label="fused")
    measure.plot(best["epoch"], best[name_of], "o", color="black", label="best epoch, tested")
    # The likelihood of a number may be negative.
    positive = (epochs.filter(regex="^(train_loss|val_loss)").min() > 0).all()
    loss.set(xlabel="epoch", ylabel="loss", yscale="log" if positive else "linear")
    lowest = epochs.filter(regex=f"^{name_of}").min().min()
    measure.set(xlabel="epoch", ylabel=f"validation {words(shown)}", ylim=(max(lowest, -1) - 0.02, 1.005))
    for axes in (loss, measure):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _confusion(logits: Tensor, target: Tensor, classes: list[str]) -> Figure:
    """The confusion matrix: counts where they can be read, else the share of each true class."""
    legible = len(classes) <= _LEGIBLE
    names = [textwrap.shorten(name, _LONGEST, placeholder="…") or name[:_LONGEST] for name in classes]
    side = min(10, 3.5 + 0.45 * len(classes)) if legible else 8
    figure = Figure(figsize=(side + 1.2 * (not legible), side), layout="constrained")  # room for a colour bar
    axes = figure.subplots()
    display = ConfusionMatrixDisplay.from_predictions(
        target.numpy(),
        logits.argmax(dim=1).numpy(),
        labels=range(len(classes)),
        display_labels=names if legible else None,
        normalize=None if legible else "true",
        include_values=legible,
        cmap="Blues",
        colorbar=False,
        xticks_rotation="vertical" if legible and max(map(len, names)) > 3 else "horizontal",
        ax=axes,
    )
    axes.set(xlabel="predicted class", ylabel="true class")
    if not legible:
        ticks = range(0, len(classes), 10)
        axes.set(xticks=ticks, yticks=ticks, xticklabels=ticks, yticklabels=ticks)
        figure.colorbar(display.im_, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def predicted_picture(task: Task, outputs: Tensor, target: Tensor) -> Figure:
    """Predicted beside true numbers, with the ends of their intervals."""
    figure = Figure(figsize=(6, 6), layout="constrained")
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
    """What a measure is called."""
    return {"r2": "R²", "rmse": "RMSE", "mae": "MAE", "auroc": "AUROC"}.get(figure, figure.replace("_", " "))


def conflict_picture(monitor: ConflictMonitor) -> Figure:
    """The cosine between the gradients over training."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = monitor.plot(figure.subplots())
    axes.autoscale(axis="y")  # cosines of single batches are small
    axes.legend(frameon=False)
    return figure


def _draw(build: Callable[[], Figure], path: Path, *, mathematics: bool = True) -> None:
    """Builds and saves a picture; without mathematics a `$` is a letter, as in the names of classes."""
    try:
        with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": mathematics}):
            warnings.simplefilter("ignore")  # such as letters that the font lacks, drawn as boxes
            figure = build()
            with writing(path) as temporary:
                figure.savefig(temporary, dpi=120)
    except Exception as error:
        print(f"no {path.name}: {reason(error)}")
