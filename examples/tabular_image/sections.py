"""The sections of the page of a run that show the predictions, by task."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO

import torch
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multilabel_average_precision,
    multilabel_f1_score,
)

from .data.images import square_image
from .data.samples import Samples
from .errors import ImageError
from .report import confused, predicted_picture
from .style import BLUE
from .tasks import Task

MATRIX = 40  # classes whose confusion matrix still fits into a page
MISTAKES = 12
_PAIRS, _FEWER_PAIRS = 20, 5  # pairs without and with a matrix
_BINS = 10  # of the confidence
_DPI = 144  # of figures
_SIDE = 112  # pixels of a row's picture

Cell = str | int | float | None


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        source: A data URI.
        alt: What the picture shows, in words.
        wide: Whether the page should scroll the picture rather than make it narrow.
    """

    source: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table; a cell of None is a figure that is not defined.

    Attributes:
        header: The names of the columns.
        rows: The cells.
        caption: A line above the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix of C classes.

    Attributes:
        names: The classes.
        rows: A row for each true class, with a pair for each cell: the count, and the share of the true class.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Card:
    """One row of the data set.

    Attributes:
        name: The id of the row.
        facts: What the card says, as pairs of a word and a value.
        picture: The picture of the row; None where the picture cannot be read.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    picture: Picture | None


@dataclass(frozen=True)
class Section:
    """A part of the page, shown in the order of the attributes.

    Attributes:
        title: The heading.
        text: Paragraphs.
        matrix: A confusion matrix.
        pictures: Figures.
        cards: Rows of the data set.
        tables: Tables.
        listing: Lines to be shown as they are written.
    """

    title: str
    text: Sequence[str] = ()
    matrix: Matrix | None = None
    pictures: Sequence[Picture] = ()
    cards: Sequence[Card] = ()
    tables: Sequence[Table] = ()
    listing: str = ""


Build = partial[Section | None]


def classification_sections(
    samples: Samples, classes: Sequence[str], rows: Tensor, logits: Tensor, target: Tensor
) -> list[Build]:
    """The sections about predicted classes.

    Args:
        samples: The data set.
        classes: The names of the C classes.
        rows: Long (N,), the positions of the test rows in `samples`.
        logits: (N, C).
        target: Long (N,).
    """
    return [
        partial(confusion, classes, logits, target),
        partial(calibration, logits, target),
        partial(confident_mistakes, samples, classes, rows, logits, target),
    ]


def task_sections(task: Task, samples: Samples, rows: Tensor, outputs: Tensor, target: Tensor) -> list[Build]:
    """The sections about a prediction; the last section shows single rows.

    Args:
        task: What is predicted.
        samples: The data set.
        rows: Long (N,), the positions of the test rows in `samples`.
        outputs: (N, C) of the prediction.
        target: (N,) or (N, L).
    """
    match task.name:
        case "multilabel":
            return [
                partial(single_labels, task, outputs, target),
                partial(confident_label_mistakes, task, samples, rows, outputs, target),
            ]
        case "regression":
            return [
                partial(predicted_and_true, task, outputs, target),
                partial(largest_misses, task, samples, rows, outputs, target),
            ]
    return classification_sections(samples, task.target.names, rows, outputs, target)


def confusion(classes: Sequence[str], logits: Tensor, target: Tensor) -> Section:
    """The confusion matrix where it fits into a page, and the pairs of classes that are confused most."""
    predicted, sizes = logits.argmax(dim=1), target.bincount(minlength=len(classes))
    text = [
        f"{(predicted != target).sum():,} of {len(target):,} test rows are predicted wrongly. The largest class has "
        f"{sizes.max() / len(target):.1%} of the test rows: this share is right if every row gets that class."
    ]
    matrix = None
    if len(classes) <= MATRIX:
        counts = multiclass_confusion_matrix(logits, target, len(classes))
        shares = counts / sizes.clamp(min=1)[:, None]
        cells = [list(zip(*line, strict=True)) for line in zip(counts.tolist(), shares.tolist(), strict=True)]
        matrix = Matrix(classes, cells)
        text.append(
            "A line of the matrix is a true class, a column a predicted class. The shade is the share of the line."
        )
    pairs = [
        (classes[true], classes[other], count, f"{count / sizes[true]:.1%}")
        for true, other, count in confused(predicted, target)[: _FEWER_PAIRS if matrix else _PAIRS]
    ]
    header = ("true class", "predicted class", "rows", "share of the true class")
    tables = [Table(header, pairs, "Most confused pairs")] if pairs else []
    return Section("Confusion", text, matrix=matrix, tables=tables)


def calibration(logits: Tensor, target: Tensor) -> Section:
    """Whether predictions are right as often as their confidence says."""
    probabilities = logits.softmax(dim=1)
    confidence, right = probabilities.amax(dim=1), logits.argmax(dim=1) == target
    error = multiclass_calibration_error(probabilities, target, logits.shape[1], n_bins=_BINS)
    mean, share = confidence.mean(), right.double().mean()
    shares, confidences = calibration_curve(right.numpy(), confidence.numpy(), n_bins=_BINS)
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    curve.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    curve.plot(confidences, shares, "o-", color=BLUE, label="test rows")
    curve.set(ylabel="share of right predictions", xlim=(0, 1), ylim=(0, 1.02))
    curve.legend()
    histogram.hist(confidence.numpy(), bins=_BINS, range=(0, 1), color=BLUE)
    histogram.set(xlabel="probability of the predicted class", ylabel="rows")
    text = (
        f"The probability of the predicted class is off by {100 * error:.1f} percentage points on average (expected "
        f"calibration error, {_BINS} bins). The mean probability is {mean:.1%}, and {share:.1%} of the predictions are "
        f"right: on average the predictions are {'over' if mean > share else 'under'}-confident by "
        f"{100 * (mean - share).abs():.1f} points. Points below the diagonal are over-confident."
    )
    alt = "Reliability diagram: share of right predictions by the probability of the predicted class."
    return Section("Calibration", [text], pictures=[as_picture(figure, alt)])


def confident_mistakes(
    samples: Samples, classes: Sequence[str], rows: Tensor, logits: Tensor, target: Tensor
) -> Section:
    """The wrong predictions of the highest probability, with their pictures."""
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != target).nonzero().flatten()
    worst = wrong[probability[wrong].argsort(descending=True, stable=True)][:MISTAKES].tolist()
    if not worst:
        return Section("Confident mistakes", ["No test row is predicted wrongly."])
    cards = [
        _card(
            samples,
            int(rows[place]),
            ("true", classes[target[place]]),
            ("predicted", classes[predicted[place]]),
            ("probability", f"{probability[place]:.1%}"),
        )
        for place in worst
    ]
    text = f"Of {len(wrong):,} wrong predictions, the {len(worst)} of the highest probability."
    return Section("Confident mistakes", [text], cards=cards)


def single_labels(task: Task, outputs: Tensor, target: Tensor) -> Section:
    """How well each label is predicted, frequent labels first."""
    probabilities, labels = outputs.sigmoid(), target.long()
    precision = multilabel_average_precision(probabilities, labels, outputs.shape[1], average="none")
    score = multilabel_f1_score(probabilities, labels, outputs.shape[1], average="none")
    counts, predicted = labels.sum(dim=0), (outputs > 0).sum(dim=0)
    rows: list[tuple[Cell, ...]] = [
        (
            task.target.names[place],
            int(counts[place]),
            int(predicted[place]),
            score[place].item() if counts[place] else None,
            precision[place].item() if counts[place] else None,
        )
        for place in counts.argsort(descending=True, stable=True).tolist()
    ]
    text = f"{outputs.shape[1]} labels. A label is predicted where its probability is above one half."
    header = ("label", "test rows that have it", "predicted", "F1", "average precision")
    return Section("Labels", [text], tables=[Table(header, rows)])


def confident_label_mistakes(task: Task, samples: Samples, rows: Tensor, outputs: Tensor, target: Tensor) -> Section:
    """The rows with the surest wrong label, with their pictures."""
    probability = outputs.sigmoid()
    surest, label = torch.where((outputs > 0) == target.bool(), 0, (probability - 0.5).abs()).max(dim=1)
    worst = surest.argsort(descending=True, stable=True)[:MISTAKES].tolist()
    cards = [
        _card(
            samples,
            int(rows[place]),
            ("label", task.target.names[label[place]]),
            ("there", "yes" if target[place, label[place]] else "no"),
            ("probability", f"{probability[place, label[place]]:.1%}"),
        )
        for place in worst
        if surest[place] > 0
    ]
    text = f"The {len(cards)} rows with the surest wrong label." if cards else "No label is predicted wrongly."
    return Section("Confident mistakes", [text], cards=cards)


def predicted_and_true(task: Task, outputs: Tensor, target: Tensor) -> Section:
    """Predicted beside true numbers, and how often the interval holds the true number."""
    true, ends = task.truth(target), task.confidence(outputs)
    inside = ((true >= ends["low"]) & (true <= ends["high"])).mean()
    text = (
        f"The 90% interval of the prediction holds the true value of {inside:.1%} of {len(target):,} test rows. The "
        f"median width of the interval is {_number((ends['high'] - ends['low']).median())}."
    )
    alt = "Predicted values with intervals against true values, with the diagonal where both are equal."
    return Section(
        "Predicted and true values", [text], pictures=[as_picture(predicted_picture(task, outputs, target), alt)]
    )


def largest_misses(task: Task, samples: Samples, rows: Tensor, outputs: Tensor, target: Tensor) -> Section:
    """The predictions furthest from the true number, with their pictures."""
    true, predicted = task.truth(target), task.answers(outputs)
    missed = predicted - true
    worst = missed.abs().sort_values(ascending=False, kind="stable").index[:MISTAKES]
    cards = [
        _card(
            samples,
            int(rows[place]),
            ("true", _number(true[place])),
            ("predicted", _number(predicted[place])),
            ("difference", _number(missed[place], "+")),
        )
        for place in worst
    ]
    text = f"Of {len(target):,} predictions, the {len(worst)} that are furthest from the true value."
    return Section("Largest misses", [text], cards=cards)


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"


def as_picture(figure: Figure, alt: str) -> Picture:
    """A figure as a picture of the page; `alt` is as in `Picture`."""
    file = BytesIO()
    figure.savefig(file, dpi=_DPI)
    width, height = figure.get_size_inches()
    return replace(_picture(file, alt), wide=width > 1.5 * height)


def _picture(png: BytesIO, alt: str) -> Picture:
    return Picture(f"data:image/png;base64,{b64encode(png.getvalue()).decode()}", alt)


def _card(samples: Samples, row: int, *facts: tuple[str, str]) -> Card:
    """A row of the data set, with its picture if the picture can still be read."""
    name, file = f"{samples.ids.name or 'row'} {samples.ids.iloc[row]}", BytesIO()
    try:
        square_image(samples, row, _SIDE).save(file, "png")
    except ImageError:
        return Card(name, facts, None)
    return Card(name, facts, _picture(file, f"Picture of {name}"))
