"""Pictures of benchmarks: what they show, and that they are drawn again from the tables beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import timing

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def ratios(largest: float) -> pd.DataFrame:
    lines = [(way, size, head) for head in ("small", "large") for way in ("plain", "fresh") for size in (32, 128)]
    return pd.DataFrame(lines, columns=["way", "batch", "head"]).assign(ratio=[1, 1, 1.5, 1.5, 1, 1, 1.5, largest])


@pytest.mark.parametrize(("largest", "scale"), [(2.0, "linear"), (50.0, "log")])
def test_a_picture_of_ratios_names_ways_and_sizes_and_has_a_line_at_one(largest: float, scale: str):
    figure = timing.dots(ratios(largest), "batch", "head", "ratio", "ratio to plain")
    assert [axes.get_title() for axes in figure.axes] == ["small", "large"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["plain", "fresh"]
    for axes in figure.axes:
        assert [1, 1] in [list(line.get_xdata()) for line in axes.lines]
        assert axes.get_xscale() == scale
        assert axes.get_xlabel() == "ratio to plain"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["32", "128"]
    *_, marks, _ = figure.axes[1].lines
    assert list(marks.get_xdata()) == [1, largest]


@pytest.mark.parametrize(
    "name",
    ["accuracy/results/conflict-leaves100-texture", "accuracy/results/when", "cost/results/resnet18/step-surgery"],
)
def test_a_picture_is_drawn_again_from_its_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import redraw

    table = BENCHMARKS / f"{name}.csv"
    shutil.copy(table, tmp_path)
    picture = tmp_path / f"{table.stem}.png"
    picture.touch()
    redraw.main(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
