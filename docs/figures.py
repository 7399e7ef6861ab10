"""Draws the pictures of these pages: `python docs/figures.py` draws all, `python docs/figures.py branches` one.

Each public function draws one picture. `conflict` runs the code of the tutorial. `digits_conflict` runs a training of
the pipeline (half a minute on a free core). Every other picture takes less than a second. The pipeline and the
benchmarks must be installed.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon
from tabular_image.style import BLUE, COLOURS, DPI, GREEN, ORANGE, PURPLE, VERMILLION, WIDTH, styled

from gaal_surgery import HalfSpace, align, entropy, select_uncertain

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "docs" / "_static"
RESULTS = ROOT / "benchmarks"
IMAGE, TABLE = COLOURS["image"], COLOURS["table"]
IDLE = "#9A9A9A"


def branches() -> Figure:
    """Test accuracy of each branch and of the fused prediction, after joint training and after alternation."""
    runs = _repeated_runs(RESULTS / "accuracy" / "results" / "features" / "runs.csv")
    sets = {
        "leaves100-texture": "leaves, texture (99 species)",
        "leaves100-margin": "leaves, margin (100 species)",
        "fashion": "fashion (30 article types)",
        "houses": "houses (4 price classes)",
    }
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (name, title) in zip(panels.flat, sets.items(), strict=True):
        part = runs[runs["set"] == f"{name}-features"].set_index("row")
        for height, prediction in enumerate(("image", "table")):
            alone = part.loc[prediction, prediction]
            axes.errorbar(
                alone.mean(), height, xerr=alone.std(), fmt="|", color="black", markersize=22, markeredgewidth=2,
                elinewidth=1, label="the branch trained alone",
            )  # fmt: skip
        for row, colour, symbol, shift, label in (
            ("concatenation", VERMILLION, "o", -0.2, "joint training (concatenation)"),
            ("alternating-calibrated", BLUE, "D", 0, "alternation, calibrated fusion"),
            ("gaal-joint-own-encoders", GREEN, "s", 0.2, "GAAL with a joint turn, calibrated (recommended)"),
        ):
            figures = part.loc[row, ["image", "table", "fused"]]
            heights = [height + shift for height in range(3)]
            axes.errorbar(
                figures.mean(), heights, xerr=figures.std(), fmt=symbol, color=colour, markersize=6, elinewidth=1,
                label=label,
            )  # fmt: skip
        mean = part.loc["alternating-calibrated", "test_mean"].mean()
        axes.plot(mean, 2, "D", color=BLUE, fillstyle="none", markersize=6, label="alternation, mean of the logits")
        axes.set(title=title, xlim=(0.25, 1), ylim=(2.5, -0.5))
        axes.set_yticks(range(3), ["image branch", "table branch", "both, fused"])
        axes.tick_params(labelbottom=True)
    for axes in panels[1]:
        axes.set_xlabel("test accuracy, mean ± deviation over runs")
    title = "Joint training leaves each branch weaker than training it alone; alternation does not"
    figure.suptitle(title, fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2, labelspacing=1)
    return figure


def gradients() -> Figure:
    """Which modules get which gradient: in a joint step, and in the two turns of alternation."""
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    joint, first, second = figure.subplots(1, 3)
    _model(joint, "joint training: one step", "one loss for both", dict.fromkeys(("image", "table"), "black"))
    for axes, own, guide in ((first, "image", "table"), (second, "table", "image")):
        _model(axes, f"alternation: the {own}'s turn", f"loss of the {own}", {own: COLOURS[own]}, guide)
    return figure


def _model(axes: Axes, title: str, loss: str, trained: dict[str, str], guide: str | None = None) -> None:
    """A loss above a head above two encoders. Arrows downward are gradients."""
    axes.set(xlim=(0, 10), ylim=(0, 10.4), title=title)
    axes.axis("off")
    head_colour = next(iter(trained.values()))
    _box(axes, 5, 9.2, 5.6, 1.4, loss, head_colour)
    _box(axes, 5, 5.7, 8.6, 1.5, "shared head", head_colour)
    _arrow(axes, (5, 8.5), (5, 6.5), head_colour)
    axes.text(5.35, 7.5, "gradient" if guide is None else "gradient $g$", color=head_colour, va="center")
    for modality, x in (("image", 2.4), ("table", 7.6)):
        colour = trained.get(modality, IDLE)
        _box(axes, x, 1.6, 4.2, 1.7, f"{modality}\nencoder", colour)
        if modality in trained:
            _arrow(axes, (x, 4.9), (x, 2.5), colour)
            axes.text(x + 0.35, 3.7, "gradient", color=colour, va="center")
        else:
            _arrow(axes, (x, 2.5), (x, 4.9), IDLE, style="--")
            axes.text(x, 3.7, "guide $g_p$", color=COLOURS[modality], va="center", ha="center", backgroundcolor="white")
            axes.text(x, 0.2, "does not move", color="#5A5A5A", ha="center")


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.1", ec=colour, fc="white", lw=1.8))
    axes.text(x, y, text, ha="center", va="center")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-") -> None:
    look = {"arrowstyle": "-|>", "color": colour, "lw": 1.8, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=look, zorder=2)


def rounds() -> Figure:
    """Two rounds of two turns on a time line: which module works, and which features the guide takes."""
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    fresh, cached = figure.subplots(2)
    _time_line(fresh, "fresh guides: from the same batch, with the weights of now")
    _time_line(cached, "cached guides: kept from the other modality's last turn", cached=True)
    return figure


def _time_line(axes: Axes, title: str, *, cached: bool = False) -> None:
    """Three lanes: the encoders and the head; an arrow is a guide."""
    lanes = {"table": 0, "image": 1, "head": 2}
    turns = ["table", "image", "table", "image"]
    for turn, own in enumerate(turns):
        guide = "image" if own == "table" else "table"
        start, colour = 3.0 * turn, COLOURS[own]
        passed = not cached and own == "image"  # the forward pass of the turn before serves again
        _work(axes, start, 1.4, lanes[own], "backward" if passed else "forward,\nbackward", colour)
        _work(axes, start + 2.1, 0.75, lanes[own], "step", colour, filled=True)
        _work(axes, start + 2.1, 0.75, lanes["head"], "step", colour, filled=True)
        if not cached:
            _work(axes, start + 0.15, 1.1, lanes[guide], "forward", COLOURS[guide])
            origin = (start + 1.25, lanes[guide])
        else:
            origin = (start - 3.0 + 1.4, lanes[guide])
        if cached and turn == 0:
            axes.text(start + 1.6, 2, "no guide yet", color="#5A5A5A", ha="right", va="center", fontsize=8.5)
        else:
            _arrow(axes, origin, (start + 2.1, lanes["head"]), COLOURS[guide], style="--" if cached else "-")
        axes.text(start + 1.45, -0.75, f"{own}'s turn", ha="center", fontsize=8.5, color=colour)
        axes.axvline(start - 0.07, color="black" if turn % 2 == 0 else IDLE, linewidth=1.2 if turn % 2 == 0 else 0.6)
    for number in range(2):
        axes.text(6.0 * number + 2.95, -1.15, f"round {number + 1}", ha="center", fontweight="bold", fontsize=9)
    axes.set_title(title, pad=12)
    axes.spines[:].set_visible(False)
    axes.set(xlim=(-0.1, 12), ylim=(2.55, -1.35))
    axes.set_yticks(range(3), ["table encoder", "image encoder", "shared head"])
    axes.set_xticks([])
    axes.set_xlabel("time")
    axes.grid(visible=False)


def _work(axes: Axes, start: float, width: float, lane: int, text: str, colour: str, *, filled: bool = False) -> None:
    fill, ink = (colour, "white") if filled else ("white", "black")
    axes.barh(lane, width, left=start, height=0.68, color=fill, edgecolor=colour, linewidth=1.4, zorder=3)
    axes.text(start + width / 2, lane, text, ha="center", va="center", fontsize=8, color=ink, zorder=4)


def uncertain() -> Figure:
    """Predictions for eight samples, the entropies of the predictions, and the half of the samples that guides."""
    logits = torch.tensor([
        [3.0, 0.0, -0.5], [0.4, 0.1, 0.0], [0.5, 2.6, 0.0], [1.0, 0.9, -2.0],
        [-1.0, 0.0, 3.5], [0.2, -0.4, 0.3], [0.0, 3.0, 1.2], [0.9, -0.3, 0.8],
    ])  # fmt: skip
    uncertainty = entropy(logits)
    selected = select_uncertain(uncertainty, 0.5).tolist()
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    left = torch.zeros(len(logits))
    for name, share, colour in zip("ABC", logits.softmax(dim=1).unbind(dim=1), (BLUE, ORANGE, PURPLE), strict=True):
        upper.bar(range(len(logits)), share, bottom=left, width=0.7, color=colour, label=f"class {name}")
        left = left + share
    upper.set(ylabel="probability", ylim=(0, 1), title="What the other modality predicts for the samples of the batch")
    upper.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    colours = [GREEN if sample in selected else IDLE for sample in range(len(logits))]
    lower.bar(range(len(logits)), uncertainty, width=0.7, color=colours)
    lower.set(ylabel="entropy", xlabel="sample", ylim=(0, 1.35))
    for sample in selected:
        lower.text(sample, uncertainty[sample] + 0.04, "guides", ha="center", color=GREEN)
    lower.set_xticks(range(len(logits)), [str(sample + 1) for sample in range(len(logits))])
    for axes in (upper, lower):
        axes.grid(visible=False, axis="x")
    return figure


def projection() -> Figure:
    """A gradient and its guide in the plane: no conflict, conflict, conflict with a margin."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    guide = torch.tensor([0.25, 0.95])
    cases = (
        ("no conflict: $g$ stays", torch.tensor([1.0, 0.4]), 0.0),
        ("conflict: projected", torch.tensor([1.05, -0.75]), 0.0),
        ("conflict, with a margin", torch.tensor([1.05, -0.75]), 0.3),
    )
    for axes, (title, gradient, margin) in zip(figure.subplots(1, 3), cases, strict=True):
        rule = HalfSpace(margin, relative=True)
        offset = margin * gradient.norm() * guide.norm() / guide.norm() ** 2
        along = torch.stack([guide[1], -guide[0]])
        edge = [offset * guide + 4 * along, offset * guide - 4 * along]
        corners = [*edge, edge[1] + 4 * guide, edge[0] + 4 * guide]
        axes.add_patch(Polygon([corner.tolist() for corner in corners], color=GREEN, alpha=0.13, linewidth=0))
        axes.plot(*torch.stack(edge).T, color=GREEN, linewidth=1)
        aligned = align(gradient, [guide], rule)
        if not torch.equal(aligned, gradient):
            axes.plot(*torch.stack([gradient, aligned]).T, color=IDLE, linestyle=":", linewidth=1.4)
            _vector(axes, aligned, r"$\tilde g$", GREEN, (8, 4))
        _vector(axes, gradient, "$g$", "black", (8, -4))
        _vector(axes, guide, "$g_p$", VERMILLION, (-16, 4))
        axes.set(title=title, xlim=(-0.55, 1.6), ylim=(-1.05, 1.35), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.text(1.55, 1.22, "allowed", color=GREEN, ha="right", va="center", fontsize=8.5)
    return figure


def _vector(axes: Axes, vector: torch.Tensor, name: str, colour: str, shift: tuple[float, float]) -> None:
    end = (vector[0].item(), vector[1].item())
    _arrow(axes, (0, 0), end, colour)
    axes.annotate(name, end, shift, textcoords="offset points", color=colour, fontsize=12, va="center")


def conflict() -> Figure:
    """The monitor of the tutorial's last training, drawn by the tutorial's code."""
    torch.set_num_threads(1)
    matplotlib.rcParams["axes.prop_cycle"] = cycler(color=[COLOURS["table"], COLOURS["image"]])  # in the order of turns
    namespace: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL | re.MULTILINE)
    for code in blocks:
        if not code.startswith(">>>"):
            exec(code, namespace)
    return namespace["ax"].figure


def digits_conflict() -> Figure:
    """The picture of conflicts from a run of the pipeline with default options, on the digits."""
    from tabular_image.report import conflict_picture

    from gaal_surgery import ConflictMonitor

    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "examples" / "tabular_image" / "train.py"
        words = ["--threads", "1", "--accelerator", "cpu", "--out", f"{folder}/run"]
        subprocess.run([sys.executable, script, *words], check=True)
        rows = pd.read_csv(f"{folder}/run/conflict.csv").to_dict("records")
    monitor = ConflictMonitor()
    monitor.load_state_dict({"steps": len(rows), "rows": rows})
    return conflict_picture(monitor)


def _repeated_runs(path: Path) -> pd.DataFrame:
    """The runs of each set and method with the options that the search chose. Only these options were repeated."""
    runs = pd.read_csv(path)
    options = [{**json.loads(text), "seed": None, "fold": None} for text in runs["configuration"]]
    runs["options"] = [json.dumps(each, sort_keys=True) for each in options]
    counts = runs.groupby(["set", "row", "options"])["seed"].transform("size")
    return runs[counts == counts.groupby([runs["set"], runs["row"]]).transform("max")]


COPIES = {"cost-step": "cost/results/resnet18/step.png", "cost-scaling": "cost/results/scaling.png"}
PICTURES = {
    picture.__name__.replace("_", "-"): picture
    for picture in (branches, gradients, rounds, uncertain, projection, conflict, digits_conflict)
}


def main(*names: str) -> None:
    """Draws the pictures of these names, or all."""
    matplotlib.use("Agg")
    for name in names or (*PICTURES, *COPIES):
        path = STATIC / f"{name}.png"
        if name in COPIES:
            shutil.copyfile(RESULTS / COPIES[name], path)
        else:
            with styled():
                PICTURES[name]().savefig(path, dpi=DPI)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
