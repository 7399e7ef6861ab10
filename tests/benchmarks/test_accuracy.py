"""The accuracy benchmarks: statistics, the results file, and whole commands on a small set."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import against
import capacity
import classical
import missing
import numpy as np
import pandas as pd
import pytest
import ranks
import table1
import tasks
import torch
import variance
from comparison import compare, corrected_interval, corrected_paired_test, detectable_difference
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from protocol import (
    CNN,
    FEATURES,
    RECIPES,
    ROWS,
    SETS,
    DataSet,
    Search,
    data_set,
    paper_figures,
    repeated,
    row_options,
)
from runs import COLUMNS, Machine, Results, Run, complete, figures_of, opened
from scipy.stats import ttest_1samp, ttest_rel
from sets import OWN, RESULTS, begun, home
from statsmodels.stats.power import TTestPower
from study import Study
from tabular_image.data import DATASETS
from tabular_image.data.module import TabularImageData
from tabular_image.methods import METHODS, SETTINGS
from tabular_image.options import Options
from tabular_image.run import build_data, read_samples

ACCURACY = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"

# Statistics


def test_without_shared_rows_the_test_is_the_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 6))
    assert corrected_paired_test(first - second, 0.0) == pytest.approx(ttest_rel(first, second).pvalue)


def test_shared_rows_make_differences_less_certain():
    differences = np.array([0.02, 0.03, 0.01, 0.02, 0.04])
    p = [corrected_paired_test(differences, share) for share in (0.0, 0.15, 0.5)]
    assert p == sorted(p)
    assert p[0] < 0.01 < p[2]


@pytest.mark.parametrize(("differences", "p"), [([0.0, 0.0, 0.0], 1.0), ([0.5, 0.5, 0.5], 0.0)])
def test_differences_without_spread(differences: list[float], p: float):
    assert corrected_paired_test(np.array(differences), 0.1) == p


def test_without_shared_rows_the_interval_is_that_of_the_paired_t_test():
    differences = np.random.default_rng(0).normal(size=6)
    expected = ttest_1samp(differences, 0).confidence_interval()
    assert corrected_interval(differences, 0.0) == pytest.approx((expected.low, expected.high))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=10).filter(lambda values: len(set(values)) > 1))
def test_the_interval_ends_where_the_test_would_be_at_its_level(values: list[int]):
    differences = np.array(values) / 1000
    low, high = corrected_interval(differences, 0.15)
    assert low < differences.mean() < high
    assert [corrected_paired_test(differences - end, 0.15) for end in (low, high)] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("n", [2, 3, 5, 10, 50])
def test_without_shared_rows_the_power_is_that_of_the_t_test(n: int):
    expected = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
    assert detectable_difference(0.02, n, 0.0) == pytest.approx(0.02 * expected, rel=1e-5)


def test_shared_rows_hide_larger_differences():
    found = [detectable_difference(0.02, 5, share) for share in (0.0, 0.15, 0.5)]
    assert found == sorted(found)
    assert found[2] / found[0] == pytest.approx(np.sqrt((0.2 + 0.5) / 0.2))
    assert np.isnan(detectable_difference(np.nan, 1, 0.15))


def test_a_single_run_has_no_interval():
    table = compare(lines(gaal=[0.9], mla=[0.8]), dict.fromkeys(["gaal", "mla"], "fused"), "gaal")
    assert table.loc["mla", "difference"] == pytest.approx(-0.1)
    assert table.loc["mla", ["low", "high", "p", "detectable"]].isna().all()


def lines(**accuracies: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"row": row, "seed": seed, "fold": 0, "fused": value, "train_rows": 80, "test_rows": 20}
            for row, values in accuracies.items()
            for seed, value in enumerate(values)
        ]
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (lambda: variance.main(seeds=1), "one seed has no spread; give --seeds 2 or more"),
        (lambda: capacity.main(recipe="adam 1"), "no recipe 'adam 1'; choose from adamw 0.003, "),
        (lambda: next(iter(Study(recipe="adam 1").completed({}))), "no recipe 'adam 1'; choose from adamw 0.003, "),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(command: Callable[[], object], words: str):
    with pytest.raises(SystemExit, match=rf"^error: .*{words}"):
        command()


def test_rows_are_ranked_and_tested_against_the_reference():
    runs = lines(
        gaal=[0.90, 0.92, 0.91, 0.93], good=[0.95, 0.96, 0.97, 0.97], same=[0.90, 0.92, 0.91, 0.93],
        bad=[0.5, 0.6, 0.4, 0.5], other=[0.1] * 4,
    )  # fmt: skip
    table = compare(runs, dict.fromkeys(["gaal", "good", "same", "bad"], "fused"), "gaal")
    assert list(table.index) == ["good", "gaal", "same", "bad"]
    assert table["rank"].tolist() == [1, 2.5, 2.5, 4]
    assert table.loc["good", "difference"] == pytest.approx(0.0475)
    assert np.isnan(table.loc["gaal", "p"])
    raw = table["p"].drop("gaal")
    smallest, middle, largest = raw.sort_values()
    assert table["p_holm"].drop("gaal").sort_values().tolist() == pytest.approx(
        [3 * smallest, max(3 * smallest, 2 * middle), max(2 * middle, largest)]
    )


def test_the_spread_of_training_is_told_from_the_spread_of_splitting():
    drawn = lines(gaal=[0.90, 0.92, 0.94], mla=[0.91, 0.95, 0.93])
    fixed = lines(gaal=[0.91, 0.91, 0.91], mla=[0.92, 0.93, 0.94])
    table = variance.summarise(drawn, fixed).set_index("row")
    assert list(table.index) == ["mla", "gaal"]
    assert table.loc["gaal", ["drawn_deviation", "fixed_deviation"]].tolist() == pytest.approx([0.02, 0])
    assert table.loc["mla", ["drawn_difference", "fixed_difference"]].tolist() == pytest.approx([0.01, 0.02])
    spreads = table.loc["mla", ["drawn_difference_deviation", "fixed_difference_deviation"]]
    assert spreads.tolist() == pytest.approx([np.std([0.01, 0.03, -0.01], ddof=1), 0.01])
    assert table.filter(like="difference").loc["gaal"].isna().all()
    assert len(variance.markdown(table.reset_index()).splitlines()) == 4


def test_a_row_is_compared_with_every_other_row_on_every_set():
    one = full_lines(gaal=[0.90, 0.92, 0.91], mla=[0.80, 0.83, 0.81], lfm=[0.9, 0.93, 0.91])
    two = full_lines(gaal=[0.90], mla=[0.95])
    tables = [against.differences(runs, "gaal").assign(set=name) for name, runs in (("one", one), ("two-cnn", two))]
    table = pd.concat(tables).set_index(["measure", "row", "set"])
    assert len(table) == 2 * 3
    line = table.loc["accuracy", "mla", "one"]
    expected = compare(one, dict.fromkeys(["gaal", "mla", "lfm"], "fused"), "gaal").loc["mla"]
    turned = -expected[["difference", "high", "low"]]
    assert line["difference"] == pytest.approx(0.0966667, abs=1e-6)
    assert line[["difference", "low", "high"]].tolist() == pytest.approx(turned.tolist())
    assert line["p_holm"] == expected["p_holm"]
    accuracy, balanced = against.markdown(table.reset_index()).replace(table1.SPACE, " ").split("\n\n**Balanced")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in accuracy.splitlines()[2:]]
    assert rows[0] == ["against", "one", "two"]
    assert rows[2] == ["MLA", "**+9.7 [+7.8, +11.6]**", "-5.0"]
    assert rows[3][::2] == ["LFM", "-"]
    assert len(balanced.splitlines()) == len(accuracy.splitlines())


def test_one_option_is_changed_at_a_time_from_the_protocols_choice():
    chosen = Options(image_size=64, epochs=60, augment=True)
    first, *others = capacity.neighbours(chosen, [32, 64], [0.5, 1, 2])
    assert first == chosen
    assert len(others) == 4
    names = ("image_size", "epochs", "augment")
    assert all(sum(getattr(one, name) != getattr(chosen, name) for name in names) == 1 for one in others)


def test_only_seeds_that_both_have_are_paired():
    table = compare(lines(gaal=[0.5, 0.7, 0.6], few=[0.4, 0.8]), dict.fromkeys(["gaal", "few"], "fused"), "gaal")
    assert table.loc["few", "runs"] == 2
    assert table.loc["few", "difference"] == pytest.approx(0.0)


def full_lines(**accuracies: list[float]) -> pd.DataFrame:
    """Lines as a results file has them: the balanced accuracy is a tenth below, and a little less for each seed."""
    runs = lines(**accuracies).reindex(columns=list(dict.fromkeys((*COLUMNS, "train_rows", "test_rows"))))
    runs["balanced_accuracy"] = runs["fused"] - 0.1 - runs["seed"] / 1000
    return runs.astype({name: float for name in runs if name not in ("row", "set", "configuration")})


def test_the_balanced_accuracy_is_compared_too():
    runs = full_lines(gaal=[0.90, 0.92, 0.91], mla=[0.80, 0.83, 0.81], lfm=[0.5, 0.6, 0.5])
    runs.loc[runs["row"] == "mla", "balanced_accuracy"] += 0.2
    summary = table1.summarise(runs)
    assert summary["balanced"].round(4).to_dict() == {"gaal": 0.809, "mla": 0.9123, "lfm": 0.4323}
    assert summary.loc["mla", "balanced_difference"] == pytest.approx(summary.loc["mla", "difference"] + 0.2)
    assert summary.loc["mla", "balanced_high"] == pytest.approx(summary.loc["mla", "high"] + 0.2)
    assert (summary["balanced_low"].dropna() < summary["balanced_difference"].dropna()).all()
    assert summary.drop("gaal")["balanced_p_holm"].between(0, 1).all()


def cells(text: str) -> list[list[str]]:
    """The cells of the header and the rows of all tables of a text."""
    rows = [
        line
        for line in text.replace("\N{NO-BREAK SPACE}", " ").splitlines()
        if line.startswith("|") and not line.startswith("|:")
    ]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows]


def test_the_table_for_people_has_intervals_and_what_it_could_have_shown():
    summary = table1.summarise(full_lines(gaal=[0.900, 0.921, 0.91], ogm_ge=[0.80, 0.82, 0.81], lfm=[0.5, 0.6, 0.5]))
    text = table1.markdown(summary)
    header, first, second, _ = cells(text)
    assert header == ["method", "accuracy", "balanced accuracy", "minus GAAL (paper) [95% interval]", "p (Holm)"]
    assert first == ["GAAL (paper)", "**0.910 ± 0.011**", "0.809", "-", "-"]
    low, high = summary.loc["ogm_ge", ["low", "high"]]
    assert second == ["OGM-GE", "0.810 ± 0.010", "0.709", f"-0.100 [{low:+.3f}, {high:+.3f}]", "<0.001"]
    assert "Runs of a row: 3." in text
    assert f"difference of {summary['detectable'].median():.3f} from GAAL (paper) would have been found" in text


def test_rows_that_are_not_significantly_worse_than_the_best_are_bold():
    close, far = [0.92, 0.90, 0.96, 0.91], [0.70, 0.72, 0.71, 0.73]
    runs = full_lines(gaal=far, mla=[0.93, 0.92, 0.94, 0.93], lfm=close, ogm_ge=[0.71, 0.71, 0.72, 0.72])
    summary = table1.summarise(runs)
    p = {row: corrected_paired_test(np.array(found) - [0.93, 0.92, 0.94, 0.93], 0.25) for row, found in
         (("lfm", close), ("gaal", far), ("ogm_ge", [0.71, 0.71, 0.72, 0.72]))}  # fmt: skip
    lowest, middle = sorted((p["gaal"], p["ogm_ge"]))
    assert summary["best_p_holm"].drop("mla").sort_values().tolist() == pytest.approx(
        [3 * lowest, max(3 * lowest, 2 * middle), p["lfm"]]
    )
    text = table1.markdown(summary)
    assert [row[0] for row in cells(text) if "**" in row[1]] == ["MLA", "LFM"]
    assert "Bold: the best accuracy of a table, and every accuracy that is not significantly worse" in text


def test_single_runs_have_bold_for_the_best_alone():
    text = table1.markdown(table1.summarise(full_lines(gaal=[0.9], mla=[0.9], lfm=[0.8])))
    header, *rows = cells(text)
    assert header == ["method", "accuracy", "balanced accuracy", "minus GAAL (paper)"]
    assert [row[1] for row in rows] == ["**0.900**", "**0.900**", "0.800"]
    assert text.endswith("Bold: the best accuracy of a table.")


def test_a_prediction_is_shown_beside_the_accuracy_where_it_differs():
    runs = full_lines(gaal=[0.9, 0.8], image=[0.7, 0.6], table=[0.5, 0.4], gaal_star=[0.6, 0.7])
    runs["image"] = runs["fused"] - 0.1 * (runs["row"] == "gaal")
    runs["table"] = runs["fused"].where(runs["row"] == "table")
    headers = [row for row in cells(table1.markdown(table1.summarise(runs))) if row[0] == "method"]
    assert headers == [
        ["method", "accuracy", "balanced accuracy"],
        ["method", "accuracy", "balanced accuracy", "image alone"],
        ["method", "accuracy", "balanced accuracy"],
    ]


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("table1-*.md")), ids=lambda path: path.stem)
def test_a_committed_table_is_made_of_its_details(path: Path):
    details = pd.read_csv(path.with_suffix(".csv"), index_col="row")
    assert path.read_text() == table1.markdown(details) + "\n"
    assert max(map(len, cells(path.read_text()))) <= 7


@pytest.mark.parametrize("which", tasks.SETS)
def test_the_committed_tables_of_other_tasks_are_made_of_their_lines(which: str):
    folder = RESULTS / "tasks"
    text = (folder / f"{which}.md").read_text()
    assert text == tasks.markdown(pd.read_csv(folder / f"{which}.csv")) + "\n"
    assert {"GAAL, calibrated", "Alternation, joint turn, product", "Maximum (MF)"} <= {row[0] for row in cells(text)}


def test_every_row_has_a_name_of_its_own():
    labels = [row.label for row in ROWS.values()]
    assert "" not in labels
    assert len(set(labels)) == len(labels)


# Ranks over sets


@pytest.mark.parametrize(("rows", "value"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_that_of_demsars_table(rows: int, value: float):
    sets = 6
    expected = value * np.sqrt(rows * (rows + 1) / (6 * sets))
    assert ranks.critical_difference(rows, sets) == pytest.approx(expected, rel=1e-3)


def test_rows_are_ranked_on_every_set_that_all_have(capsys: pytest.CaptureFixture[str]):
    first = pd.DataFrame({"accuracy": [0.9, 0.8, 0.7, 0.6], "balanced": [0.1, 0.2, 0.3, 0.4]}, index=list("abcd"))
    second = pd.DataFrame({"accuracy": [0.5, 0.5, 0.4], "balanced": [0.5, 0.6, 0.7]}, index=list("bac"))
    table = ranks.ranks({"one": first, "two": second})
    assert capsys.readouterr().out == "careful: not every set has d; they are left out\n"
    by_accuracy = table[table["measure"] == "accuracy"]
    assert by_accuracy["row"].tolist() == ["a", "b", "c"]
    assert by_accuracy["rank"].tolist() == [1.25, 1.75, 3]
    assert by_accuracy["two"].tolist() == [1.5, 1.5, 3]
    assert table.loc[table["measure"] == "balanced", "row"].tolist() == ["c", "a", "b"]
    with pytest.raises(SystemExit, match="the table of two has no fused row d; it has b, a, c"):
        ranks.ranks({"one": first, "two": second}, ["a", "b", "d"])


@given(st.lists(st.floats(1, 20), min_size=1, max_size=20).map(sorted), st.floats(0, 20))
def test_bars_join_the_rows_that_do_not_differ_and_no_others(mean_ranks: list[float], critical: float):
    bars = ranks.cliques(mean_ranks, critical)
    places = range(len(mean_ranks))
    joined = {(i, j) for first, last in bars for i in range(first, last + 1) for j in range(i + 1, last + 1)}
    assert joined == {(i, j) for i in places for j in places if i < j and mean_ranks[j] - mean_ranks[i] <= critical}
    assert all(not (a <= c and d <= b) for a, b in bars for c, d in bars if (a, b) != (c, d))


@pytest.mark.slow
def test_ranks_of_the_tables_of_two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, accuracies in (("one", [0.9, 0.8, 0.7]), ("two", [0.6, 0.5, 0.7])):
        table = {"row": ["gaal", "mla", "lfm"], "block": "fused", "accuracy": accuracies, "balanced": accuracies}
        pd.DataFrame(table).to_csv(tmp_path / f"table1-{name}.csv", index=False)
    words = ["ranks.py", "--sets", "[one, mine/two.yaml]", "--tables", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ACCURACY / "ranks.py"), run_name="__main__")
    assert pd.read_csv(tmp_path / "ranks.csv")["rank"].tolist() == [1.5, 2, 2.5] * 2
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    written = (tmp_path / "ranks.md").read_text()
    assert [line.split("|")[1].strip() for line in written.splitlines()[2:5]] == ["GAAL (paper)", "LFM", "MLA"]
    assert "p of 0.61 by accuracy and 0.61 by balanced accuracy" in written
    monkeypatch.setattr(sys, "argv", [*words[:2], "[one, three]", *words[3:]])
    with pytest.raises(SystemExit, match=r"table1-three.csv does not exist; run table1.py"):
        runpy.run_path(str(ACCURACY / "ranks.py"), run_name="__main__")


# Protocol


def test_every_method_has_a_row_and_every_row_a_method():
    assert {row.method for row in ROWS.values()} == METHODS.keys() | classical.MODELS.keys()


def test_every_row_has_a_label_of_its_own():
    labels = {row.label for row in ROWS.values()}
    assert len(labels) == len(ROWS)
    assert "" not in labels
    assert {"OGM-GE", "Table alone", "GAAL (paper)", "GAAL, calibrated"} <= labels


@pytest.mark.parametrize("method", ["tip", "mmcl"])
def test_pretrained_encoders_are_fine_tuned_and_probed(method: str):
    options = data_set("leaves100-texture").options
    settings = {name: row_options(options, row).settings for name, row in ROWS.items() if row.method == method}
    assert {name: own.encoder for name, own in settings.items()} == {method: "trainable", f"{method}-frozen": "frozen"}
    assert len({(own.pretraining_epochs, own.temperature, own.corruption) for own in settings.values()}) == 1


def test_the_papers_figures_belong_to_rows():
    figures = paper_figures()
    assert set(figures["row"]) == {row.paper for row in ROWS.values() if row.paper}
    assert figures["accuracy"].between(0, 1).all()
    gaal = figures.set_index(["row", "set", "prediction"])["accuracy"]
    assert gaal["GAAL", "dvm", "fused"] == 0.9917
    assert gaal["GAAL*", "celeba", "image"] == 0.8313


_TRAINED = [name for name, row in ROWS.items() if row.method in SETTINGS]


@pytest.mark.parametrize("row", _TRAINED)
def test_every_search_has_the_same_trials_and_starts_with_the_defaults(row: str):
    which = data_set("leaves100-texture")
    runs = Search(which, row, trials=4).runs
    recipes = [{"optimizer": run.options.optimizer, "learning_rate": run.options.learning_rate} for run in runs]
    assert recipes == [
        {name: recipe[name] for name in ("optimizer", "learning_rate")} for recipe in list(RECIPES.values())[:4]
    ]
    first = row_options(which.options, ROWS[row], **next(iter(RECIPES.values())))
    assert runs[0].key == Run(which.name, row, first, which.data).key
    assert len({run.key for run in runs}) == 4
    assert [run.key for run in Search(which, row, trials=4).runs] == [run.key for run in runs]


_SEARCHING = [name for name in _TRAINED if fields(SETTINGS[ROWS[name].method])]
# Without surgery the settings of guides train nothing.
_SEARCHING = [name for name in _SEARCHING if name != "concatenation" and not name.startswith("alternating")]


@pytest.mark.parametrize("row", _SEARCHING)
def test_every_row_searches_as_much_of_its_own_as_gaal_or_all_it_has(row: str):
    searched, settings = ROWS[row].searched, SETTINGS[ROWS[row].method]
    values = [len(set(values)) for values in searched.values()]
    choices = {name for name in searched if isinstance(getattr(settings(), name), str)}
    assert all(len(set(searched[name])) >= (2 if name in choices else 3) for name in searched)
    assert len(values) >= min(len(fields(settings)), len(ROWS["gaal"].searched))
    tried = [vars(run.options.settings) for run in Search(data_set("leaves100-texture"), row, trials=3).runs]
    assert {name: tried[0][name] for name in searched} == {name: choice[0] for name, choice in searched.items()}
    assert all(vars(settings())[name] == choice[0] for name, choice in searched.items())
    if values == [3, 3]:
        assert all({trial[name] for trial in tried} == set(choice) for name, choice in searched.items())


@pytest.mark.parametrize(("row", "name", "value"), [("kd", "temperature", 1.0), ("mla", "gate", "fixed")])
def test_three_trials_meet_what_a_default_costs(row: str, name: str, value: object):
    tried = [vars(run.options.settings) for run in Search(data_set("leaves100-texture"), row, trials=3).runs]
    assert value in [trial[name] for trial in tried[1:]]


def test_a_search_chooses_by_validation_accuracy_and_the_earlier_of_equals(tmp_path: Path):
    results = Results(tmp_path / "runs.csv")
    search = Search(data_set("leaves100-texture"), "gaal", trials=5)
    for run, accuracy in zip(search.runs, (np.nan, 0.9, 0.9, 0.7, np.nan), strict=True):
        results.add(run, {"val_accuracy": accuracy, "fused": 1 - accuracy})
    assert search.best(results) == search.runs[1].options


@pytest.mark.parametrize("row", classical.MODELS)
def test_a_classical_row_has_nothing_to_search_and_the_runs_of_the_others(row: str):
    which = data_set("houses")
    search = Search(which, row, trials=3)
    (trial,) = search.runs
    repetitions = repeated(which, row, search.best(mock.MagicMock()), seeds=2)
    others = repeated(which, "gaal", row_options(which.options, ROWS["gaal"]), seeds=2)
    assert repetitions[0].key == trial.key
    assert [(run.options.seed, run.options.fold) for run in repetitions] == [
        (run.options.seed, run.options.fold) for run in others
    ]
    assert len({run.key for run in repetitions}) == len(others)


def test_a_cross_validated_set_runs_every_fold_of_every_seed():
    which = data_set("houses")
    runs = repeated(which, "gaal", row_options(which.options, ROWS["gaal"]), seeds=2)
    assert [(run.options.seed, run.options.fold) for run in runs] == [(s, f) for s in range(2) for f in range(5)]


# The results file


@pytest.fixture
def run() -> Run:
    return digits_run()


def digits_run(data: str = "0" * 16, **changes: object) -> Run:
    return Run("digits", "gaal", row_options(data_set("digits").options, ROWS["gaal"], **changes), data)


def test_results_survive_in_their_file_and_are_found_by_configuration(tmp_path: Path, run: Run):
    path = tmp_path / "runs.csv"
    results = Results(path)
    assert run not in results
    results.add(run, {"fused": 0.5, "seed": 0})
    again = Results(path)
    assert run in again
    assert again[run]["fused"] == 0.5
    assert again.table([run])["row"].tolist() == ["gaal"]
    assert digits_run(margin=0.1) not in again
    assert digits_run(data="1" * 16) not in again
    assert digits_run(out="elsewhere", path="elsewhere", image_root="elsewhere", data_root="elsewhere") in again


def test_a_half_written_line_is_dropped_and_nothing_else(tmp_path: Path, run: Run):
    path = tmp_path / "runs.csv"
    Results(path).add(run, {"fused": 0.5})
    whole = path.read_bytes()
    torn = whole + b"2,digits,image,0,"
    path.write_bytes(torn)
    with opened(path, None) as results:  # who only reads leaves a line alone that another may be writing
        assert run in results
    assert path.read_bytes() == torn
    with opened(path, Machine(folder=str(tmp_path / "runs"))) as results:
        assert run in results
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version,set\n0,digits\n", "version 0.*version 3"),
        (",".join(COLUMNS) + "\n1" + "," * (len(COLUMNS) - 1) + "\n", "version 1.*version 3; keep the file"),
        (",".join(COLUMNS) + "\n2" + "," * (len(COLUMNS) - 1) + "\n", "version 2.*version 3"),
        ("name,age\nx,1\n", "version unknown"),
        ("a,b\n1,2,3\n1,2,3,4\n", "no results file"),
    ],
)
def test_a_file_of_another_version_is_refused_and_kept(tmp_path: Path, content: str, words: str):
    path = tmp_path / "runs.csv"
    path.write_text(content)
    with pytest.raises(SystemExit, match=words):
        Results(path)
    assert path.read_text() == content


def test_the_committed_results_have_todays_options_and_are_found(tmp_path: Path):
    stored = pd.read_csv(RESULTS / "runs.csv")
    for configuration in map(json.loads, stored["configuration"]):
        method = configuration["method"]
        today = Options(method=method, settings=SETTINGS[method]()).configuration()
        renamed = {"charms.interval"} if method == "charms" else set()
        # Later options are read with their defaults.
        later = {"task", "log_target", "class_weights", "select", "table_encoder", "split_seed"}
        assert configuration.keys() - renamed - later == today.keys() - {"charms.pairings"} - later | {"data"}
    trained_image_first = ("alternating", "gaal", "gaal_joint", "gaal_star")
    older = {name for name, row in ROWS.items() if row.method in trained_image_first}  # or not at all
    older |= classical.MODELS.keys()  # not trained yet
    older |= {"tip", "tip-frozen", "mmcl", "charms", "ogm_ge"}  # trained with other defaults, or by other code
    names = ["leaves100-texture", "fashion", "houses"]
    nowhere = Machine(data_root=str(tmp_path))
    with begun(names, str(RESULTS / "runs.csv"), str(tmp_path), nowhere, [], train=False) as (sets, finished):
        for which in sets:
            for row in ROWS.keys() & set(stored.loc[stored["set"] == which.name, "row"]) - older:
                runs = Search(which, row, trials=3).runs
                # What is searched has grown: only the defaults were tried before.
                assert all(run in finished for run in (runs[:1] if ROWS[row].searched else runs))


@pytest.mark.parametrize("name", [name for name in SETS if name.endswith((FEATURES, CNN))])
def test_the_committed_tables_are_made_of_the_committed_runs(name: str, tmp_path: Path):
    folder = home([name])
    committed = pd.read_csv(folder / f"table1-{name}.csv", index_col="row")
    nowhere = Machine(data_root=str(tmp_path))
    with begun([name], str(folder / "runs.csv"), str(tmp_path), nowhere, [], train=False) as ((which,), finished):
        runs = table1.chosen_runs(which, list(committed.index), 20, 3, finished, None)
        summary = table1.summarise(finished.table(runs))
    assert sorted(summary.index) == sorted(committed.index)
    figures = ["runs", "accuracy", "deviation", "balanced", "difference", "low", "high", "p_holm", "best_p_holm"]
    pd.testing.assert_frame_equal(summary.loc[committed.index, figures], committed[figures], atol=1e-6)


@pytest.mark.parametrize("ending", [FEATURES, CNN])
def test_the_committed_ranks_are_made_of_the_committed_tables(ending: str, tmp_path: Path):
    sets = [name for name in SETS if name.endswith(ending)]
    committed = pd.read_csv(home(sets) / "ranks.csv", index_col=["measure", "row"])
    ranks.main(sets, list(committed.index.unique("row")), out=str(tmp_path))
    made = pd.read_csv(tmp_path / "ranks.csv", index_col=["measure", "row"])
    pd.testing.assert_frame_equal(made, committed, check_like=True)  # rows of equal rank stand in any order


@pytest.mark.parametrize("ending", [FEATURES, CNN])
def test_the_committed_comparison_is_made_of_the_committed_runs(ending: str, tmp_path: Path):
    folder, of = RESULTS / ending.removeprefix("-"), "gaal-joint-own-encoders"
    committed = pd.read_csv(folder / f"against-{of}.csv")
    sets, rows = list(committed["set"].unique()), list(committed["row"].unique())
    stored = {"results": str(folder / "runs.csv"), "out": str(tmp_path), "data_root": str(tmp_path)}
    against.main(sets, of, rows, seeds=20, **stored)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"against-{of}.csv"), committed, atol=1e-6)


def test_figures_that_are_not_defined_stay_empty(tmp_path: Path):
    which = DataSet("mine", "mine.yaml", Options(), "0" * 16)
    results = Results(tmp_path / "runs.csv")
    undefined = {"accuracy": None, "balanced_accuracy": None, "auroc": None}
    for row, defined in (("gaal", True), ("mla", False)):
        for run in repeated(which, row, row_options(Options(), ROWS[row]), seeds=2):
            measured = {
                "split_sizes": {"train": 8, "val": 1, "test": 1}, "epochs": 1, "best_epoch": 1, "seconds": 0.1,
                "val_accuracy": None, "without_table": dict.fromkeys(("fused", "image", "table")),
                "test": {"fused": undefined | ({"accuracy": 0.5} if defined else {}), "image": undefined},
                "fusions": {"mean": {"val": None, "test": None}}, "fusion_measures": {"mean": {"test": undefined}},
                "conflict": [{"modality": "image", "conflict": None}],
            }  # fmt: skip
            (tmp_path / "results.json").write_text(json.dumps(measured))
            results.add(run, figures_of(run, tmp_path))
    runs = [run for row in ("gaal", "mla") for run in repeated(which, row, row_options(Options(), ROWS[row]), seeds=2)]
    for table in (results.table(runs), Results(results.path).table(runs)):
        summary = table1.summarise(table)
        assert summary.loc["gaal", "accuracy"] == 0.5
        assert summary.loc["mla", ["runs", "accuracy", "p"]].fillna(-1).tolist() == [0, -1, -1]
        assert ["MLA", "-"] in [row[:2] for row in cells(table1.markdown(summary))]
        assert "nan" not in table1.markdown(summary)
        assert missing.summarise(table)["with_table"].isna().tolist() == [False, True]
    assert ",,," in results.path.read_text().splitlines()[1]


# What one would try before a network


@pytest.fixture(scope="module")
def digits() -> TabularImageData:
    options = replace(Options(), workers=0)
    return build_data(options, read_samples(options))


@pytest.fixture(scope="module")
def inputs(digits: TabularImageData) -> classical.Inputs:
    """The digits with two columns for a picture: one that says whether it is above 4, and noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(digits.target), 2, generator=generator)
    told = noise + torch.stack([digits.target > 4, torch.zeros_like(digits.target)], dim=1) * 4
    return classical.prepared(digits, 0, features=told.numpy())


def test_classical_rows_have_the_rows_of_the_pipeline(digits: TabularImageData, inputs: classical.Inputs):
    for name, loader in (("val", digits.val_dataloader()), ("test", digits.test_dataloader())):
        batches = list(loader)
        rows = inputs.splits[name]
        assert rows.tolist() == torch.cat([batch["row"] for batch in batches]).tolist()
        table = torch.cat([batch["table"] for batch in batches])
        assert np.array_equal(inputs.cells[rows, : inputs.width], table.numpy())
        assert inputs.target[rows].tolist() == torch.cat([batch["target"] for batch in batches]).tolist()
    assert np.array_equal(inputs.cells[inputs.splits["train"], : inputs.width], digits.train_table.numpy())


@pytest.mark.parametrize("row", classical.MODELS)
def test_a_model_sees_its_own_modalities_and_the_training_rows(row: str, inputs: classical.Inputs):
    seen, build = classical.MODELS[row]
    inputs = replace(inputs, target=inputs.target % 2)  # two classes take a fifth of the trees
    train, test = inputs.splits["train"], inputs.splits["test"]
    model = build(inputs).fit(inputs.cells[train], inputs.target[train])
    before = model.predict_proba(inputs.cells[test])
    generator = np.random.default_rng(0)
    for part, columns in (("table", slice(0, inputs.width)), ("image", slice(inputs.width, None))):
        cells = inputs.cells[test].copy()
        cells[:, columns] = generator.permutation(cells[:, columns])
        assert (seen in (part, "fused")) == (not np.allclose(model.predict_proba(cells), before))


def test_folds_of_stacking_keep_groups_together_and_to_the_training_rows(inputs: classical.Inputs):
    grouped = replace(inputs, groups=np.arange(len(inputs.target)) // 3)
    train = grouped.splits["train"]
    predicted = []
    for fitted, left in classical._folds(grouped):
        assert not set(grouped.groups[train[fitted]]) & set(grouped.groups[train[left]])
        predicted += left.tolist()
    assert sorted(predicted) == list(range(len(train)))


# The sets of a command


def pets(folder: Path, seed: int = 0) -> Path:
    """A YAML file of 60 rows with pictures of 8 pixels; the seed decides the content and nothing else."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(60):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    table = {"picture": [f"{number}.png" for number in range(60)], "weight": generator.normal(size=60).round(3)}
    pd.DataFrame(table | {"kind": generator.permutation(["cat", "dog"] * 30)}).to_csv(folder / "pets.csv", index=False)
    path = folder / "mine.yaml"
    path.write_text(
        "dataset: csv\npath: pets.csv\nimage_column: picture\ntarget_column: kind\nepochs: 1\nimage_size: 8\n"
    )
    return path


def read(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[DataSet, Results]:
    """The set `mine.yaml` of a folder, as a command in that folder knows it, and its results."""
    monkeypatch.chdir(folder)
    given: dict[str, object] = {"results": None, "out": None, "machine": Machine(), "recipes": []} | options
    with begun(["mine.yaml"], **given) as ((which,), finished):
        return which, finished


def test_a_set_is_its_content_and_not_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pets(tmp_path / "a")
    pets(tmp_path / "b", seed=1)
    first, _ = read(tmp_path / "a", monkeypatch)
    second, _ = read(tmp_path / "b", monkeypatch)
    assert first.options.configuration() == second.options.configuration()
    assert first.data != second.data
    (tmp_path / "a").rename(tmp_path / "moved")
    assert read(tmp_path / "moved", monkeypatch)[0].data == first.data
    Image.new("RGB", (8, 8)).save(tmp_path / "moved" / "7.png")
    assert read(tmp_path / "moved", monkeypatch)[0].data != first.data


def test_without_data_finished_runs_are_shown_only_where_all_have_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pets(tmp_path / "a")
    pets(tmp_path / "b", seed=1)
    shared = {"results": str(tmp_path / "runs.csv")}

    def finish(folder: str) -> DataSet:
        which, finished = read(tmp_path / folder, monkeypatch, **shared)
        options = row_options(which.options, ROWS["table"])
        finished.add(Run(which.name, "table", options, which.data), {"val_accuracy": 0.5})
        return which

    first = finish("a")
    assert read(tmp_path / "b", monkeypatch, train=False, **shared)[0].data != first.data
    assert "not checked" not in capsys.readouterr().out
    (tmp_path / "b" / "pets.csv").rename(tmp_path / "pets.csv")
    assert read(tmp_path / "b", monkeypatch, train=False, **shared)[0].data == first.data
    assert capsys.readouterr().out.startswith("careful: mine: the data were not checked")
    with pytest.raises(SystemExit, match=r"^error: mine.yaml: .*pets.csv does not exist"):
        read(tmp_path / "b", monkeypatch, **shared)
    (tmp_path / "pets.csv").rename(tmp_path / "b" / "pets.csv")
    finish("b")
    (tmp_path / "b" / "pets.csv").unlink()
    with pytest.raises(SystemExit, match="holds runs on 2 different data sets for mine"):
        read(tmp_path / "b", monkeypatch, train=False, **shared)


@pytest.mark.parametrize("names", [["a/mine.yaml", "b/mine.yaml"], ["digits", "digits"], ["digits", "a/digits.yaml"]])
def test_two_sets_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]):
    for folder in ("a", "b"):
        pets(tmp_path / folder)
        (tmp_path / folder / "digits.yaml").write_text("dataset: digits\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: {names[0]} and {names[1]} are both called .* rename"):
        list(Study(sets=names).completed({}))
    assert not (tmp_path / "runs").exists()


def test_settings_that_the_protocol_overrides_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine.yaml").write_text(
        "dataset: digits\noptimizer: adam\nlearning_rate: 5e-4\nweight_decay: 1e-2\nmethod: mla\nseed: 3\nout: here\n"
        "resume: true\nepochs: 1\ngaal:\n  margin: 0.1\n  relative: false\n"
    )
    monkeypatch.chdir(tmp_path)
    list(Study(sets=["mine.yaml"], recipe="sgd 0.05").completed({}))
    assert capsys.readouterr().out == (
        "careful: mine.yaml: the protocol overrides method mla (by the method of each row), optimizer adam, "
        "learning_rate 0.0005 (by the recipe sgd 0.05), seed 3 (by every seed and fold), out here, resume True (by "
        "--machine), gaal.margin 0.1 (by the settings of each row)\n"
    )
    (tmp_path / "plain.yaml").write_text("dataset: digits\nepochs: 1\nlearning_rate: 3e-3\ngaal:\n  margin: 0\n")
    list(Study(sets=["plain.yaml", "digits"]).completed({}))
    assert capsys.readouterr().out == ""


def test_results_of_ones_own_sets_stay_out_of_the_checkout():
    assert home(["fashion", "digits"]) == RESULTS
    assert home(["mine.yaml"]) == home(["fashion", "mine.yaml"]) == OWN
    assert not OWN.is_absolute()


@pytest.mark.slow
def test_a_second_benchmark_at_one_place_is_refused_until_the_first_is_dead(tmp_path: Path):
    results, folder = tmp_path / "runs.csv", tmp_path / "runs"
    hold = (
        "import sys; from runs import Machine, opened\n"
        f"with opened({str(results)!r}, Machine(folder={str(folder)!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ACCURACY), os.environ.get("PYTHONPATH", "")])},
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        for path, place, option in (
            (results, "elsewhere", "--results"),
            (tmp_path / "other.csv", "runs", "--machine.folder"),
        ):
            options = {"sets": "[digits]", "rows": "[table]", "results": path, "machine.folder": tmp_path / place}
            refused = execute("table1.py", "digits", tmp_path, **options)
            assert refused.returncode == 1
            assert f"another benchmark is at work on {path if option == '--results' else folder};" in refused.stderr
            assert f"give another {option}" in refused.stderr
        shown = execute("table1.py", "digits", tmp_path, train="false", out=tmp_path / "tables")
        assert shown.returncode == 0, shown.stderr
        other.kill()
    with opened(results, Machine(folder=str(folder))):
        pass


# Commands


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "small.yaml"
    path.write_text("dataset: digits\nepochs: 1\nimage_size: 8\n")
    return path


def command(script: str, small_set: Path | str, out: Path, /, **options: object) -> list[str]:
    given: dict[str, object] = {"sets": f"[{small_set}]", "seeds": 2, "results": out / "runs.csv", "out": out}
    given |= {"machine.folder": out / "runs", "machine.progress": "false", "machine.jobs": 1} | options
    arguments = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [sys.executable, str(ACCURACY / script), *arguments]


def execute(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported everything; its workers are processes of their own."""
    _, script, *words = command(*arguments, **options)
    output, printed, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [script, *words]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = 1 if isinstance(end.code, str) else end.code or 0
            print(end.code if isinstance(end.code, str) else "", file=output)
    return subprocess.CompletedProcess(words, code, stdout=printed.getvalue(), stderr=output.getvalue())


@pytest.mark.slow
def test_table1_trains_what_is_missing_and_nothing_twice(small_set: Path, tmp_path: Path):
    options = {"rows": "[image, gaal]", "trials": 2}
    first = execute("table1.py", small_set, tmp_path, **options)
    assert first.returncode == 0, first.stderr
    runs = (tmp_path / "runs.csv").read_text()
    assert len(runs.splitlines()) == 1 + 2 * 3  # two trials, and the second seed
    table = pd.read_csv(tmp_path / "table1-small.csv", index_col="row")
    assert set(table.index) == {"image", "gaal"}
    assert table["accuracy"].between(0.1, 1).all()
    assert "GAAL (paper)" in (tmp_path / "table1-small.md").read_text()
    assert "6 runs" not in first.stderr

    second = execute("table1.py", small_set, tmp_path, **options)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "runs.csv").read_text() == runs
    shown = execute("missing.py", small_set, tmp_path, train="false", **options)
    assert shown.returncode == 0, shown.stderr
    missing = pd.read_csv(tmp_path / "missing-small.csv", index_col="row")
    assert missing.loc["image", "with_table"] == missing.loc["image", "without_table"]
    assert (tmp_path / "missing-small.png").stat().st_size > 10_000

    spread = execute("variance.py", small_set, tmp_path, rows="[concatenation]", trials=1)
    assert spread.returncode == 0, spread.stderr
    table = pd.read_csv(tmp_path / "variance-small.csv", index_col="row")
    assert set(table.index) == {"gaal", "concatenation"}
    # The digits say which rows are the test, so that another seed of the split changes nothing.
    assert (table["drawn_deviation"] == table["fixed_deviation"]).all()
    stored = pd.read_csv(tmp_path / "runs.csv").set_index("set")["configuration"].map(json.loads)
    assert [line["seed"] for line in stored["small, split of seed 0"]] == [1, 1]
    assert all(line["split_seed"] == 0 for line in stored["small, split of seed 0"])
    assert all(line["split_seed"] is None for line in stored["small"])


@pytest.mark.slow
def test_capacity_shows_what_the_image_reaches_with_other_options(small_set: Path, tmp_path: Path):
    shown = execute("capacity.py", small_set, tmp_path, sizes="[8]", lengths="[2]", seeds=1)
    assert shown.returncode == 0, shown.stderr
    table = pd.read_csv(tmp_path / "capacity-small.csv")
    assert table["epochs"].nunique() == 2
    assert table["augment"].nunique() == 2
    assert table[["val_accuracy", "image"]].gt(0).all(axis=None)


@pytest.mark.slow
def test_classical_rows_stand_in_the_table_and_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine = pets(tmp_path / "set")
    monkeypatch.chdir(mine.parent)
    options = {"rows": f"[table, gaal, {', '.join(classical.MODELS)}]", "trials": 1, "seeds": 1}
    first = execute("table1.py", mine, tmp_path, **options)
    assert first.returncode == 0, first.stderr
    stored = pd.read_csv(tmp_path / "runs.csv")
    assert len(stored) == 2 + len(classical.MODELS)
    assert stored[["train_rows", "test_rows"]].nunique().eq(1).all()
    table = pd.read_csv(tmp_path / "table1-mine.csv", index_col="row")
    assert table["block"].to_dict() == {name: ROWS[name].block for name in table.index}
    assert set(table.index) == {"table", "gaal", *classical.MODELS}
    assert table["balanced"].between(0, 1).all()
    assert table.loc["boosting-stacked", ["image", "table", "without_table"]].notna().all()
    assert table.loc["boosting-stacked", "image"] == table.loc["logistic-image", "accuracy"]
    assert table.loc["boosting-stacked", "table"] == table.loc["boosting-table", "accuracy"]
    assert "Stacked boosting and regression" in (tmp_path / "table1-mine.md").read_text()
    lines_before = (tmp_path / "runs.csv").read_text()
    assert execute("table1.py", mine, tmp_path, **options).returncode == 0
    assert (tmp_path / "runs.csv").read_text() == lines_before


def children(process: int, command: str = "") -> list[int]:
    found = subprocess.run(
        ["pgrep", "--parent", str(process), "--full", command], capture_output=True, text=True, check=True
    )
    return [int(child) for child in found.stdout.split()]


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_that_was_finished(small_set: Path, tmp_path: Path):
    options = {"rows": "[table, image, gaal]", "trials": 1}
    process = subprocess.Popen(
        command("table1.py", small_set, tmp_path, **options), stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path = tmp_path / "runs.csv"
    while not path.exists() or len(path.read_text().splitlines()) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    (server,) = children(process.pid, "forkserver")
    for worker in children(server):
        os.kill(worker, signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "was killed" in error
    assert "Traceback" not in error
    kept = path.read_text().splitlines()
    assert len(kept) >= 2

    finished = execute("table1.py", small_set, tmp_path, **options)
    assert finished.returncode == 0, finished.stderr
    lines_now = path.read_text().splitlines()
    assert lines_now[: len(kept)] == kept
    assert len(lines_now) == 1 + 3 * 2


@pytest.mark.slow
def test_a_failing_run_is_named_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine = pets(tmp_path / "set")
    (mine.parent / "7.png").write_bytes(b"no picture")
    monkeypatch.chdir(mine.parent)
    failed = execute("table1.py", mine, tmp_path, rows="[image]", trials=1)
    assert failed.returncode == 1
    assert "error: mine image (seed 0) of 1 runs failed, see" in failed.stderr
    (log,) = (tmp_path / "runs").glob("*.log")
    assert "7.png" in log.read_text()


@pytest.mark.slow
def test_the_same_command_on_other_data_trains_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shared = {"sets": "[mine.yaml]", "rows": "[table]", "trials": 1, "seeds": 1, "results": tmp_path / "runs.csv"}
    printed = []
    for seed, folder in enumerate(("a", "b")):
        pets(tmp_path / folder, seed)
        monkeypatch.chdir(tmp_path / folder)
        done = execute("table1.py", "", Path("runs/accuracy"), **shared)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
        assert len(Results(tmp_path / "runs.csv").digests({})) == seed + 1
        assert (tmp_path / folder / "runs" / "accuracy" / "table1-mine.csv").exists()
    stored = (tmp_path / "runs.csv").read_text()
    monkeypatch.chdir(tmp_path / "a")
    assert execute("table1.py", "", Path("runs/accuracy"), **shared).stdout == printed[0]
    assert (tmp_path / "runs.csv").read_text() == stored


@pytest.mark.slow
def test_results_and_tables_of_ones_own_set_lie_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pets(tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    words = ["table1.py", "--sets", "[mine.yaml]", "--rows", "[table]", "--seeds", "1", "--trials", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--machine.progress", "false", "--machine.jobs", "1"])
    runpy.run_path(str(ACCURACY / "table1.py"), run_name="__main__")
    assert {"runs.csv", "table1-mine.csv", "table1-mine.md"} <= {path.name for path in Path("runs/accuracy").iterdir()}
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before


@pytest.mark.slow
def test_data_that_change_while_the_benchmark_is_at_work_are_refused(tmp_path: Path):
    machine = Machine(folder=str(tmp_path / "runs"), jobs=1, progress=False)
    with pytest.raises(SystemExit, match="of 1 runs failed"):
        complete([digits_run(data="0" * 16)], Results(tmp_path / "runs.csv"), machine)
    (log,) = (tmp_path / "runs").glob("*.log")
    assert "the data of digits changed while the benchmark was at work" in log.read_text()
    assert not (tmp_path / "runs.csv").exists()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(small_set: Path, tmp_path: Path):
    process = subprocess.Popen(
        command("table1.py", small_set, tmp_path, rows="[table, image, gaal]", trials=1, **{"machine.jobs": 2}),
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    path = tmp_path / "runs.csv"
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error == f"interrupted; finished runs are in {path}, start again to continue\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sets": "[gone.yaml]"}, "cannot use the options in gone.yaml ("),
        ({"sets": "[folder.yaml]"}, "cannot use the options in folder.yaml ("),
        ({"sets": "[binary.yaml]"}, "cannot use the options in binary.yaml ("),
        ({"sets": "[unknown.yaml]"}, "unknown.yaml (there is no option colour; --help lists the options); give"),
        ({"results": "folder.yaml"}, "folder.yaml cannot be read (Is a directory); give another --results"),
        ({"results": "file/runs.csv"}, "cannot be written"),
        ({"out": "file/tables"}, "file/tables cannot be a folder (Not a directory); give another --out"),
        ({"out": "file"}, "file cannot be a folder (File exists); give another --out"),
        ({"machine.folder": "file"}, "give another --machine.folder"),
    ],
)
def test_files_and_folders_that_cannot_be_used_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], words: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xa5\x00\xff")
    (tmp_path / "unknown.yaml").write_text("dataset: digits\ncolour: red\n")
    (tmp_path / "file").write_text("")
    refused = execute("table1.py", "digits", tmp_path, **({"sets": "[digits]"} | options))
    assert refused.returncode == 1
    assert words in refused.stderr
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": "[gall]"}, "no row 'gall'; choose from image, table"),
        ({"sets": "[flowers]"}, "no data set 'flowers'; choose from leaves100-texture"),
        ({"sets": "[csv]"}, "csv alone needs its options in a YAML file"),
    ],
)
def test_unknown_names_are_refused(small_set: Path, tmp_path: Path, options: dict[str, str], words: str):
    refused = execute("table1.py", small_set, tmp_path, **options)
    assert refused.returncode == 1
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "runs.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ablation", "sensitivity", "convergence", "conflict"])
def test_every_figure_has_data_and_a_picture(script: str, small_set: Path, tmp_path: Path):
    drawn = execute(f"{script}.py", small_set, tmp_path, seeds=1)
    assert drawn.returncode == 0, drawn.stderr
    assert len(pd.read_csv(tmp_path / f"{script}-small.csv")) > 2
    assert (tmp_path / f"{script}-small.png").stat().st_size > 10_000


def test_protocol_sets_are_complete():
    assert {options["dataset"] for options in SETS.values()} == DATASETS.keys() - {"csv"}
    assert {"leaves100-texture", "leaves100-margin", "dvm"} <= set(SETS)
