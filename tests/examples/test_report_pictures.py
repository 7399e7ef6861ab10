"""What the pictures of a run's report show, by their labels and lines."""

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from tabular_image.report import conflict_picture, confusion_picture, curves
from tabular_image.style import COLOURS, styled

from gaal_surgery import AlignmentStats, ConflictMonitor


def names(count):
    return [f"kind {number}" for number in range(count)]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_confusion_matrix_names_its_classes_and_leaves_cells_without_rows_empty():
    target = torch.arange(30).repeat(2)
    predicted = target.clone()
    predicted[0] = 7
    (axes,) = confusion_picture(predicted, target, names(30)).axes
    assert labels(axes.xaxis) == labels(axes.yaxis) == names(30)
    shown = [text.get_text() for text in axes.texts if text.get_visible()]
    assert shown == ["1", "1", *["2"] * 29]


def test_more_classes_show_the_pairs_that_are_confused_most():
    target = torch.tensor([3, 3, 3, 30, 30, 9])
    predicted = torch.tensor([5, 5, 3, 2, 2, 1])
    figure = confusion_picture(predicted, target, names(31))
    (axes,) = figure.axes
    assert labels(axes.yaxis) == ["kind 3 → kind 5", "kind 30 → kind 2", "kind 9 → kind 1"]
    assert [text.get_text() for text in axes.texts] == ["2", "2", "1"]
    assert figure.get_suptitle().startswith("5 of 6 test rows are predicted wrongly")


def test_no_confusion_is_drawn_too():
    figure = confusion_picture(torch.arange(31), torch.arange(31), names(31))
    figure.canvas.draw()
    assert figure.get_suptitle().startswith("0 of 31 test rows")


@pytest.mark.parametrize(("epochs", "points"), [(1, "o"), (20, "o"), (200, "")])
def test_few_epochs_are_shown_as_points(epochs, points):
    history = pd.DataFrame({"epoch": range(epochs), "val_loss": 0.5, "val_accuracy": 0.75, "val_selection": 0.75})
    history[["train_loss_image", "val_accuracy_image"]] = 0.25
    loss, measure = curves(history, "accuracy").axes
    assert {line.get_marker() for line in (*loss.lines, *measure.lines[:-1])} == {points}


def test_a_turn_has_the_colour_of_its_modality_in_the_picture_of_conflicts():
    monitor, opposed = ConflictMonitor(), torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
    for modality in ("table", "image"):
        monitor.update(AlignmentStats(modality, ("other",), opposed, torch.tensor([1.0, 0.0])))
    (axes,) = conflict_picture(monitor).axes
    assert [line.get_color() for line in axes.lines[:2]] == [COLOURS["table"], COLOURS["image"]]


def test_pictures_are_light_whatever_the_settings_of_the_user():
    with mpl.rc_context({"figure.facecolor": "black", "axes.labelcolor": "white"}):
        with styled():
            figure = confusion_picture(torch.arange(31), torch.arange(31), names(31))
        assert mpl.rcParams["axes.labelcolor"] == "white"
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert figure.axes[0].xaxis.label.get_color() == "black"
