"""Statistics of repeated runs: means, ranks, and a paired test of every row against a reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests


def corrected_paired_test(differences: np.ndarray, test_share: float) -> float:
    """Two-sided p of the corrected resampled t test (Nadeau and Bengio, Machine Learning 52, 2003, eq. 9).

    Runs on resampled splits share rows, so their differences are not independent, and a plain paired t test finds
    effects that are not there. The variance of the mean is therefore (1 / n + test_share) times that of a difference.

    Args:
        differences: (n,) differences of paired runs.
        test_share: test rows by training rows of a split.

    Returns:
        p; 1 where all differences are 0, nan for fewer than two.
    """
    n = len(differences)
    if n < 2:
        return float("nan")
    if not np.any(differences):
        return 1.0
    deviation = differences.std(ddof=1)
    if deviation == 0:
        return 0.0
    t = differences.mean() / (deviation * np.sqrt(1 / n + test_share))
    return float(2 * stats.t.sf(abs(t), df=n - 1))


def compare(runs: pd.DataFrame, predictions: Mapping[str, str], reference: str) -> pd.DataFrame:
    """Rows of one block, best first.

    Args:
        runs: lines of a results file, of one set.
        predictions: by row, the column that it is judged by; these rows are compared.
        reference: the row that every other is tested against, over the seeds and folds that both have.

    Returns:
        By row: `runs` (whose accuracy is defined), `accuracy` (mean), `deviation` (standard deviation over runs),
        `rank` (1 is the best; equals share the mean of their ranks), `difference` (accuracy minus the reference's,
        paired), `p`, and `p_holm`, corrected for the number of rows (Holm).
    """
    paired = {
        row: group.set_index(["seed", "fold"])[predictions[row]]
        for row, group in runs[runs["row"].isin(list(predictions))].groupby("row", sort=False)
    }
    lines = []
    for row, accuracies in paired.items():
        line = {"row": row, "runs": accuracies.count(), "accuracy": accuracies.mean(), "deviation": accuracies.std()}
        if reference in paired and row != reference:
            differences = (accuracies - paired[reference]).dropna()
            share = (runs["test_rows"] / runs["train_rows"]).mean()
            line |= {
                "difference": differences.mean(),
                "p": corrected_paired_test(differences.to_numpy(), share),
            }
        lines.append(line)
    columns = ["row", "runs", "accuracy", "deviation", "difference", "p"]
    table = pd.DataFrame(lines, columns=columns).set_index("row")
    table["rank"] = table["accuracy"].rank(ascending=False)
    table["p_holm"] = np.nan
    tested = table["p"].notna()
    if tested.any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    return table.sort_values("rank", kind="stable")
