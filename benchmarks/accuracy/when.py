"""When does surgery help? Gain of GAAL over alternation on made data with an adjustable amount of conflict.

Two modalities see a class through Gaussian noise. Each modality has an encoder of one hidden layer, and both modalities
share a linear head. A dial is a setting of the problem, and one dial is turned at a time: the number of classes, the
width of the features, label noise in the table's turns (the image's labels stay right), the learning rate, and whether
the encoders train at all.

Every seed draws data and weights anew. Every seed trains once with surgery (`HalfSpace`) and once without surgery, on
the same batches. The gain is the difference of the test accuracies of the fused prediction (mean of the logits). The
interval is Student's t interval over the seeds. Conflict is the share of alternation's steps whose gradient has a
negative cosine with the guide, the gradient of the other modality.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from output import command, write
from scipy import stats
from sets import RESULTS
from tabular_image.style import WIDTH, styled
from torch import nn

from gaal_surgery import ConflictMonitor, FreshFeatures, GradientAlignedAlternator, HalfSpace, fuse_logits

MODALITIES = ("table", "image")


@dataclass(frozen=True)
class Setting:
    """The setting of one training.

    Attributes:
        classes: number of classes.
        width: number of features that each encoder makes.
        noise: share of the training rows whose label is replaced by a random class in the table's turns.
        rate: learning rate of SGD with momentum 0.9.
        frozen: whether the encoders keep their random weights.
    """

    classes: int = 10
    width: int = 16
    noise: float = 0.0
    rate: float = 0.03
    frozen: bool = False


DIALS = {
    "classes": (4, 10, 30),
    "width": (4, 16, 64),
    "noise": (0.0, 0.25, 0.5, 0.75),
    "rate": (0.003, 0.01, 0.03, 0.1),
    "frozen": (False, True),
}
_ROWS, _TEST, _INPUTS, _EPOCHS, _BATCH = 1000, 4000, 20, 15, 50


def train(setting: Setting, seed: int, surgery: bool) -> tuple[float, float]:
    """Test accuracy of the fused prediction, and the share of steps in conflict."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    centres = {modality: torch.randn(setting.classes, _INPUTS) for modality in MODALITIES}
    target = torch.randint(setting.classes, (_ROWS + _TEST,))
    inputs = {modality: centres[modality][target] + 2 * torch.randn(len(target), _INPUTS) for modality in MODALITIES}
    noisy = torch.where(torch.rand(_ROWS) < setting.noise, torch.randint(setting.classes, (_ROWS,)), target[:_ROWS])
    targets = {"image": target[:_ROWS], "table": noisy}
    encoders = nn.ModuleDict(
        {
            modality: nn.Sequential(nn.Linear(_INPUTS, 64), nn.ReLU(), nn.Linear(64, setting.width))
            for modality in MODALITIES
        }
    ).requires_grad_(not setting.frozen)
    head = nn.Linear(setting.width, setting.classes)
    trained = [parameter for parameter in (*encoders.parameters(), *head.parameters()) if parameter.requires_grad]
    inner = torch.optim.SGD(trained, lr=setting.rate, momentum=0.9)
    rule = HalfSpace() if surgery else lambda gramian: torch.eye(len(gramian))[0]
    optimizer, monitor = GradientAlignedAlternator(inner, head, rule=rule), ConflictMonitor()
    for rows in itertools.chain.from_iterable(torch.randperm(_ROWS).split(_BATCH) for _ in range(_EPOCHS)):
        features = FreshFeatures(optimizer, encoders, {modality: inputs[modality][rows] for modality in MODALITIES})
        for turn in optimizer.turns(*MODALITIES):
            F.cross_entropy(head(features[turn.modality]), targets[turn.modality][rows]).backward()
            for guide in turn.guides:
                optimizer.guide(guide, features[guide], targets[guide][rows])
            optimizer.step()
            optimizer.zero_grad()
            monitor.update(optimizer.stats)
    with torch.no_grad():
        logits = fuse_logits([head(encoders[modality](inputs[modality][_ROWS:])) for modality in MODALITIES])
    accuracy = (logits.argmax(dim=1) == target[_ROWS:]).double().mean().item()
    return accuracy, float(np.mean(np.array(monitor.history()["cosine_before"]) < 0))


def measure(setting: Setting, seed: int) -> dict[str, float]:
    """Accuracy with and without surgery, and the conflict without surgery."""
    aligned, _ = train(setting, seed, surgery=True)
    plain, conflict = train(setting, seed, surgery=False)
    return {**asdict(setting), "seed": seed, "gaal": aligned, "alternating": plain, "conflict": conflict}


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One line for each dial and value: mean conflict, mean accuracies, mean gain, and the gain's 95% interval."""
    lines = []
    for dial, value in [(dial, value) for dial, values in DIALS.items() for value in values]:
        chosen = asdict(replace(Setting(), **{dial: value}))
        part = runs[(runs[list(chosen)] == pd.Series(chosen)).all(axis=1)]
        gain = part["gaal"] - part["alternating"]
        half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain) if len(gain) > 1 else float("nan")
        line = {"dial": dial, "value": value, **part[["conflict", "alternating", "gaal"]].mean()}
        lines.append(line | {"gain": gain.mean(), "low": gain.mean() - half, "high": gain.mean() + half})
    return pd.DataFrame(lines)


def main(seeds: PositiveInt = 20, jobs: PositiveInt = 2, out: str | None = None) -> None:
    """Train, tabulate and draw.

    Args:
        seeds: number of seeds. Each seed trains each setting with and without surgery.
        jobs: trainings at a time.
        out: folder of the table and the picture; None takes benchmarks/accuracy/results.
    """
    settings = {replace(Setting(), **{dial: value}): None for dial, values in DIALS.items() for value in values}
    pairs = [(setting, seed) for setting in settings for seed in range(seeds)]
    with ProcessPoolExecutor(jobs) as pool:
        runs = pd.DataFrame(pool.map(measure, *zip(*pairs, strict=True), chunksize=4))
    summary = summarise(runs)
    print(summary.round(4).to_string(index=False))
    write(runs, None, Path(out or RESULTS) / "when-runs")
    write(summary, draw(summary), Path(out or RESULTS) / "when")


@styled()
def draw(summary: pd.DataFrame) -> Figure:
    """Gain over conflict, one colour for each dial, each point with its value. All dials share the default setting."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    for dial, part in summary.groupby("dial", sort=False):
        line = part.sort_values("conflict")
        spread: Sequence[pd.Series] = [100 * (line["gain"] - line["low"]), 100 * (line["high"] - line["gain"])]
        axes.errorbar(100 * line["conflict"], 100 * line["gain"], yerr=spread, fmt="o-", capsize=3, label=str(dial))
        usual = str(getattr(Setting(), str(dial)))
        for _, point in line[line["value"].astype(str) != usual].iterrows():
            place = (100 * point["conflict"], 100 * point["gain"])
            height = -12 if dial == "rate" and point["gain"] < 0 else 6  # the labels of other dials lie above
            axes.annotate(
                f"{dial} {point['value']}",
                place,
                xytext=(5, height),
                textcoords="offset points",
                fontsize=8,
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="steps of alternation in conflict (%)", ylabel="gain of GAAL over alternation (points of accuracy)")
    axes.set_ylim(-0.6, 0.6)  # one unstable learning rate has an interval of two points to either side
    axes.legend(title="dial")
    return figure


if __name__ == "__main__":
    command(main, __doc__, "--seeds 5 --out runs/when")
