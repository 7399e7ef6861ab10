"""The accuracy benchmarks: statistics, the results file, and whole commands on a small set."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from comparison import compare, corrected_paired_test
from protocol import RECIPES, ROWS, SETS, Search, base_options, paper_figures, repeated, row_options
from runs import COLUMNS, Results, Run
from scipy.stats import ttest_rel
from tabular_image.methods import METHODS

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


def lines(**accuracies: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"row": row, "seed": seed, "fold": 0, "fused": value, "train_rows": 80, "test_rows": 20}
            for row, values in accuracies.items()
            for seed, value in enumerate(values)
        ]
    )


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


def test_only_seeds_that_both_have_are_paired():
    table = compare(lines(gaal=[0.5, 0.7, 0.6], few=[0.4, 0.8]), dict.fromkeys(["gaal", "few"], "fused"), "gaal")
    assert table.loc["few", "runs"] == 2
    assert table.loc["few", "difference"] == pytest.approx(0.0)


# Protocol


def test_every_method_has_a_row_and_every_row_a_method():
    assert {row.method for row in ROWS.values()} == set(METHODS)


def test_the_papers_figures_belong_to_rows():
    figures = paper_figures()
    assert set(figures["row"]) == {row.paper for row in ROWS.values() if row.paper}
    assert figures["accuracy"].between(0, 1).all()
    gaal = figures.set_index(["row", "set", "prediction"])["accuracy"]
    assert gaal["GAAL", "dvm", "fused"] == 0.9917
    assert gaal["GAAL*", "celeba", "image"] == 0.8313


@pytest.mark.parametrize("row", ROWS)
def test_every_search_has_the_same_trials_and_starts_with_the_defaults(row: str):
    name, base = base_options("leaves100-texture")
    runs = Search(name, row, base, trials=4).runs
    recipes = [{"optimizer": run.options.optimizer, "learning_rate": run.options.learning_rate} for run in runs]
    assert recipes == [
        {name: recipe[name] for name in ("optimizer", "learning_rate")} for recipe in list(RECIPES.values())[:4]
    ]
    assert runs[0].key == Run(name, row, row_options(base, ROWS[row], **next(iter(RECIPES.values())))).key
    assert len({run.key for run in runs}) == 4
    assert [run.key for run in Search(name, row, base, trials=4).runs] == [run.key for run in runs]


def test_a_search_chooses_by_validation_accuracy_and_the_earlier_of_equals(tmp_path: Path):
    name, base = base_options("leaves100-texture")
    results = Results(tmp_path / "runs.csv")
    search = Search(name, "gaal", base, trials=4)
    for run, accuracy in zip(search.runs, (0.8, 0.9, 0.9, 0.7), strict=True):
        results.add(run, {"val_accuracy": accuracy, "fused": 1 - accuracy})
    assert search.best(results) == search.runs[1].options


def test_a_cross_validated_set_runs_every_fold_of_every_seed():
    _, base = base_options("houses")
    runs = repeated("houses", "gaal", row_options(base, ROWS["gaal"]), seeds=2)
    assert [(run.options.seed, run.options.fold) for run in runs] == [(s, f) for s in range(2) for f in range(5)]


# The results file


@pytest.fixture
def run() -> Run:
    _, base = base_options("digits")
    return Run("digits", "gaal", row_options(base, ROWS["gaal"]))


def test_results_survive_in_their_file_and_are_found_by_configuration(tmp_path: Path, run: Run):
    path = tmp_path / "runs.csv"
    results = Results(path)
    assert run not in results
    results.add(run, {"fused": 0.5, "seed": 0})
    again = Results(path)
    assert run in again
    assert again[run]["fused"] == 0.5
    assert again.table([run])["row"].tolist() == ["gaal"]
    _, base = base_options("digits")
    assert Run("digits", "gaal", row_options(base, ROWS["gaal"], margin=0.1)) not in again
    assert Run("digits", "gaal", row_options(base, ROWS["gaal"], out="elsewhere")) in again


def test_a_half_written_line_is_dropped_and_nothing_else(tmp_path: Path, run: Run):
    path = tmp_path / "runs.csv"
    Results(path).add(run, {"fused": 0.5})
    whole = path.read_bytes()
    path.write_bytes(whole + b"1,digits,image,0,")
    assert run in Results(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version,set\n0,digits\n", "version 0.*version 1"),
        (",".join(COLUMNS) + "\n2" + "," * (len(COLUMNS) - 1) + "\n", "version 2.*version 1"),
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


# Commands


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "small.yaml"
    path.write_text("dataset: digits\nepochs: 1\nimage_size: 8\n")
    return path


def command(script: str, small_set: Path, out: Path, **options: object) -> list[str]:
    given: dict[str, object] = {"sets": f"[{small_set}]", "seeds": 2, "results": out / "runs.csv", "out": out}
    given |= {"machine.folder": out / "runs", "machine.progress": "false", "machine.jobs": 1} | options
    arguments = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [sys.executable, str(ACCURACY / script), *arguments]


def execute(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported everything; its workers are processes of their own."""
    _, script, *words = command(*arguments, **options)
    output, code = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [script, *words]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = 1 if isinstance(end.code, str) else end.code or 0
            print(end.code if isinstance(end.code, str) else "", file=output)
    return subprocess.CompletedProcess(words, code, stderr=output.getvalue())


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
    assert "gaal" in (tmp_path / "table1-small.md").read_text()
    assert "6 runs" not in first.stderr

    second = execute("table1.py", small_set, tmp_path, **options)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "runs.csv").read_text() == runs
    shown = execute("missing.py", small_set, tmp_path, train="false", **options)
    assert shown.returncode == 0, shown.stderr
    missing = pd.read_csv(tmp_path / "missing-small.csv", index_col="row")
    assert missing.loc["image", "with_table"] == missing.loc["image", "without_table"]
    assert (tmp_path / "missing-small.png").stat().st_size > 10_000


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
def test_a_failing_run_is_named_and_the_others_are_kept(tmp_path: Path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("dataset: csv\npath: nowhere.csv\nimage_column: a\ntarget_column: b\n")
    failed = execute("table1.py", broken, tmp_path, rows="[image]", trials=1)
    assert failed.returncode == 1
    assert "error: broken image (seed 0) of 1 runs failed, see" in failed.stderr
    (log,) = (tmp_path / "runs").glob("*.log")
    assert "nowhere.csv does not exist" in log.read_text()


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
    assert {"leaves100-texture", "leaves100-margin", "fashion", "houses", "dvm", "celeba", "sun"} <= set(SETS)
