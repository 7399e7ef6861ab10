"""Statistics of repeated runs: means, ranks, and the paired difference of every row from a reference row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests


def corrected_paired_test(differences: np.ndarray, test_share: float) -> float:
    """Two-sided p of the corrected resampled t test (Nadeau and Bengio, Machine Learning 52, 2003, eq. 9).

    Runs on resampled splits share rows. The differences therefore depend on one another, and a plain paired t test
    would find effects where none exist. The test corrects this: the variance of the mean difference is
    (1 / n + test_share) times the variance of one difference.

    Args:
        differences: (n,) differences of paired runs.
        test_share: number of test rows divided by the number of training rows of a split.

    Returns:
        p. 1 where all differences are 0, nan for fewer than two differences.
    """
    n = len(differences)
    if n < 2:
        return float("nan")
    if not np.any(differences):
        return 1.0
    error = _standard_error(differences.std(ddof=1), n, test_share)
    if error == 0:
        return 0.0
    return float(2 * stats.t.sf(abs(differences.mean() / error), df=n - 1))


def corrected_interval(differences: np.ndarray, test_share: float, level: float = 0.05) -> tuple[float, float]:
    """Confidence interval of the true difference: the values that `corrected_paired_test` accepts at `level`.

    Args:
        differences: (n,) differences of paired runs.
        test_share: number of test rows divided by the number of training rows of a split.
        level: level of the two-sided test; 0.05 gives the 95% interval.

    Returns:
        The ends of the interval; nan for fewer than two differences.
    """
    n = len(differences)
    if n < 2:
        return float("nan"), float("nan")
    half = stats.t.isf(level / 2, df=n - 1) * _standard_error(differences.std(ddof=1), n, test_share)
    return float(differences.mean() - half), float(differences.mean() + half)


def detectable_difference(
    deviation: float, n: int, test_share: float, power: float = 0.8, level: float = 0.05
) -> float:
    """The smallest true difference that `corrected_paired_test` finds with a given power.

    The t of the test follows the noncentral t distribution. The noncentrality is the true difference in standard
    errors.

    Args:
        deviation: standard deviation of the differences of paired runs.
        n: number of pairs.
        test_share: number of test rows divided by the number of training rows of a split.
        power: probability of finding the difference.
        level: level of the two-sided test, before any correction for the number of tests.

    Returns:
        The difference; nan for fewer than two pairs.
    """
    if n < 2 or np.isnan(deviation):
        return float("nan")
    critical = stats.t.isf(level / 2, df=n - 1)

    def excess(effect: float) -> float:
        # scipy gives NaN where the far tail has almost no probability left.
        far = np.nan_to_num(stats.nct.cdf(-critical, n - 1, effect))
        return float(stats.nct.sf(critical, n - 1, effect) + far - power)

    highest = 1.0
    while excess(highest) < 0:
        highest *= 2
    return float(brentq(excess, 0, highest) * _standard_error(deviation, n, test_share))


def _standard_error(deviation: float, n: int, test_share: float) -> float:
    """The standard error of the mean difference of n runs whose splits share rows."""
    return float(deviation * np.sqrt(1 / n + test_share))


def compare(runs: pd.DataFrame, predictions: Mapping[str, str], reference: str) -> pd.DataFrame:
    """Rows of one block, best first.

    Args:
        runs: lines of a results file, of one set.
        predictions: the rows to compare; for each, the column by which the row is judged.
        reference: the row against which every other row is tested, over the seeds and folds that both rows have.

    Returns:
        By row: `runs` (number of runs whose accuracy is defined), `accuracy` (mean), `deviation` (standard deviation
        over runs) and `rank` (1 is the best; equals share the mean of their ranks). `difference` is the paired
        difference from the reference, `low` to `high` is the 95% interval of the difference, and `p` the p value.
        `p_holm` is p corrected for the number of rows (Holm). `detectable` is the true difference that the test would
        find with 80% power at the 5% level, uncorrected.
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
            low, high = corrected_interval(differences.to_numpy(), share)
            line |= {
                "difference": differences.mean(),
                "low": low,
                "high": high,
                "p": corrected_paired_test(differences.to_numpy(), share),
                "detectable": detectable_difference(differences.std(), len(differences), share),
            }
        lines.append(line)
    columns = ["row", "runs", "accuracy", "deviation", "difference", "low", "high", "p", "detectable"]
    table = pd.DataFrame(lines, columns=columns).set_index("row")
    table["rank"] = table["accuracy"].rank(ascending=False)
    table["p_holm"] = np.nan
    tested = table["p"].notna()
    if tested.any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    return table.sort_values("rank", kind="stable")
