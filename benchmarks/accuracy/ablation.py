"""Table II, the ablation: alternation without surgery, and surgery guided by all, by uncertain or by random samples.

All variants have the same optimizer, splits and initial weights. In "surgery" all samples of the batch guide (fraction
1). In "surgery, uncertain" the half with the highest entropy guides. In "surgery, random", which the paper does not
show, a random half guides.
"""

from __future__ import annotations

import pandas as pd
from comparison import compare
from matplotlib.figure import Figure
from output import command
from protocol import Row
from study import Study
from tabular_image.style import WIDTH, styled

_HALF = {"image_fraction": 0.5, "table_fraction": 0.5}
VARIANTS = {
    "alternating": Row("alternating"),
    "surgery": Row("gaal", settings={"image_fraction": 1.0, "table_fraction": 1.0}),
    "surgery, uncertain": Row("gaal", settings=_HALF),
    "surgery, random": Row("gaal", settings={**_HALF, "uncertainty": "random"}),
}
PREDICTIONS = ("fused", "image", "table")


def main(study: Study) -> None:
    """Carry out the missing runs, then tabulate and draw."""
    for set_name, _, runs in study.completed(VARIANTS):
        table = summarise(runs)
        print(f"\n{set_name}, differences from alternating\n{table.to_string(index=False)}")
        study.write(table, draw(table, set_name), f"ablation-{set_name}")


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One line for each variant and prediction: the accuracy, and the paired test against alternation."""
    parts = []
    for prediction in PREDICTIONS:
        compared = compare(runs, dict.fromkeys(VARIANTS, prediction), "alternating").loc[list(VARIANTS)].reset_index()
        compared.insert(0, "prediction", prediction)
        parts.append(compared)
    return pd.concat(parts, ignore_index=True)


@styled()
def draw(table: pd.DataFrame, title: str) -> Figure:
    """A panel for each prediction, a point for each variant."""
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    for axes, (prediction, part) in zip(
        figure.subplots(1, len(PREDICTIONS)), table.groupby("prediction", sort=False), strict=True
    ):
        axes.errorbar(part["accuracy"], part["row"], xerr=part["deviation"], fmt="o", color="black", capsize=3)
        axes.set(title=prediction, xlabel="test accuracy")
        axes.set_ylim(len(part) - 0.6, -0.4)
        axes.tick_params(axis="y", labelleft=prediction == PREDICTIONS[0])
    figure.suptitle(f"{title}, mean ± deviation over seeds")
    return figure


if __name__ == "__main__":
    command(main, __doc__, "--sets '[leaves100-texture]' --seeds 1", Study)
