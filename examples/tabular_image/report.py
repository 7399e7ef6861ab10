"""What a finished run leaves: figures, predictions, pictures and a small table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

from gaal_surgery import ConflictMonitor

from .data.module import TabularImageData
from .files import replacing
from .methods.base import Method
from .metrics import accuracy, measure
from .options import Options

_LEGIBLE = 20  # classes whose names and counts still fit into the confusion matrix
_COLOURS = {"fused": "black", "image": "tab:blue", "table": "tab:orange"}


def report(
    folder: Path,
    options: Options,
    data: TabularImageData,
    method: Method,
    outputs: dict[str, dict[str, Any]],
    epochs: pd.DataFrame,
) -> None:
    """Writes results, predictions and pictures into the run folder, and prints the test figures.

    Args:
        folder: the run folder.
        options: of the run.
        data: class names and ids.
        method: with the weights of the best epoch.
        outputs: collated outputs of `Method.predict_step` for "val", "test" and "without_table".
        epochs: one row an epoch, as in `metrics.csv`.
    """
    logits, target, rows = (outputs["test"][name] for name in ("logits", "target", "row"))
    predictions = method.predictions(logits)
    monitor = getattr(method, "monitor", None)
    best = _best(epochs)
    results = {
        "dataset": options.dataset,
        "method": options.method,
        "seed": options.seed,
        "split_sizes": data.split_sizes,
        "epochs": len(epochs),
        "best_epoch": int(best["epoch"]),
        "val_accuracy": best["val_accuracy"],
        "seconds": round(epochs["seconds"].sum(), 3),
        "test": {name: measure(values, target) for name, values in predictions.items()},
        "without_table": {
            name: _accuracy(values, target)
            for name, values in method.predictions(outputs["without_table"]["logits"]).items()
        },
        "fusion": options.fusion if "fused" in predictions and "fused" not in logits else None,
        "fusions": _compare_fusions(method, outputs),
        "conflict": monitor.summary() if monitor else None,
    }
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    with replacing(folder / "predictions.csv") as temporary:
        _tabulate(data, predictions, target, rows).to_csv(temporary, index=False)

    if monitor:
        with replacing(folder / "conflict.csv") as temporary:
            pd.DataFrame(monitor.history()).to_csv(temporary, index=False)
    if options.pictures:
        _save(_curves(epochs), folder / "curves.png")
        _save(_confusion(next(iter(predictions.values())), target, data.classes), folder / "confusion.png")
        if monitor:
            _save(_conflict(monitor), folder / "conflict.png")

    print(f"\nTest after epoch {results['best_epoch']}, the best of {results['epochs']} ({results['seconds']:.0f} s)")
    print(pd.DataFrame(results["test"]).T.to_string(float_format="{:.4f}".format))
    print(f"Figures, predictions and pictures: {folder}/")


def _best(epochs: pd.DataFrame) -> pd.Series[float]:
    """The row of the epoch whose weights were kept."""
    return epochs.loc[epochs["val_selection"].idxmax()]


def _compare_fusions(method: Method, outputs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy of each fusion by split."""
    fused = {split: method.fusions(outputs[split]["logits"]) for split in ("val", "test")}
    return {
        name: {split: _accuracy(fused[split][name], outputs[split]["target"]) for split in fused}
        for name in fused["test"]
    }


def _accuracy(logits: Tensor, target: Tensor) -> float:
    return round(accuracy(logits, target).item(), 6)


def _tabulate(data: TabularImageData, predictions: dict[str, Tensor], target: Tensor, rows: Tensor) -> pd.DataFrame:
    """One line a test row: its id, its target, what each prediction says, and how probable the first says it is."""
    ids = data.samples.ids
    main, logits = next(iter(predictions.items()))
    names = pd.Series(data.classes)
    columns = {ids.name or "id": ids.iloc[rows.numpy()].to_numpy(), "target": names[target.numpy()].to_numpy()}
    columns |= {name: names[values.argmax(dim=1).numpy()].to_numpy() for name, values in predictions.items()}
    columns[f"{main}_probability"] = logits.softmax(dim=1).amax(dim=1).numpy().round(6)
    return pd.DataFrame(columns)


def _curves(epochs: pd.DataFrame) -> Figure:
    """Loss and accuracy by epoch, the best epoch marked."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    best = _best(epochs)
    for name, colour in _COLOURS.items():
        if f"train_loss_{name}" in epochs:
            loss.plot(epochs["epoch"], epochs[f"train_loss_{name}"], color=colour, label=f"training, {name}")
        if f"val_accuracy_{name}" in epochs:
            accuracy.plot(epochs["epoch"], epochs[f"val_accuracy_{name}"], color=colour, label=name)
    loss.plot(epochs["epoch"], epochs["val_loss"], color="black", linestyle="--", label="validation")
    if "val_accuracy_image" not in epochs or "val_accuracy_table" in epochs:
        accuracy.plot(epochs["epoch"], epochs["val_accuracy"], color="black", label="fused")
    accuracy.plot(best["epoch"], best["val_accuracy"], "o", color="black", label="best epoch, tested")
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy", ylim=(None, 1.005))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _confusion(logits: Tensor, target: Tensor, classes: list[str]) -> Figure:
    """The confusion matrix: counts where they can be read, else the share of each true class."""
    legible = len(classes) <= _LEGIBLE
    side = min(10, 3.5 + 0.45 * len(classes)) if legible else 8
    figure = Figure(figsize=(side + 1.2 * (not legible), side), layout="constrained")  # room for a colour bar
    axes = figure.subplots()
    display = ConfusionMatrixDisplay.from_predictions(
        target.numpy(),
        logits.argmax(dim=1).numpy(),
        labels=range(len(classes)),
        display_labels=classes if legible else None,
        normalize=None if legible else "true",
        include_values=legible,
        cmap="Blues",
        colorbar=False,
        xticks_rotation="vertical" if legible and max(map(len, classes)) > 3 else "horizontal",
        ax=axes,
    )
    axes.set(xlabel="predicted class", ylabel="true class")
    if not legible:
        ticks = range(0, len(classes), 10)
        axes.set(xticks=ticks, yticks=ticks, xticklabels=ticks, yticklabels=ticks)
        figure.colorbar(display.im_, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def _conflict(monitor: ConflictMonitor) -> Figure:
    """The cosine between the gradients over training."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = monitor.plot(figure.subplots())
    axes.autoscale(axis="y")  # cosines of single batches are small
    axes.legend(frameon=False)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
