"""What is read, written or computed can fail: one sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from tabular_image import train
from tabular_image.command_line import parse
from tabular_image.methods import METHODS
from tabular_image.metrics import defined, measure
from tabular_image.report import summary
from test_train import ENVIRONMENT, SCRIPT, STATEFUL, TORCHRUN, assert_same_run, metrics, results, without_out

RESUME = "python examples/tabular_image/train.py --out {} --resume true"


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    """A finished run, to copy and damage; the folder that it was made in."""
    out = tmp_path_factory.mktemp("finished") / "run"
    words = ["--dataset", "csv", "--path", table, "--image_column", "picture", "--target_column", "kind"]
    words += ["--epochs", 4, "--learning_rate", 0.03, "--schedule", "none", "--seed", 1, "--accelerator", "cpu"]
    words += ["--batch_size", 16, "--image_size", 8, "--workers", 0, "--threads", 1, "--pictures", "false"]
    assert train.main([*map(str, words), "--out", str(out)]) == 0
    assert results(out)["best_epoch"] < len(metrics(out)) - 1  # else the last epoch could be lost unnoticed
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def told(capsys):
    """The one line on standard error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def half_written(folder):
    return [path.name for path in folder.rglob("*partial*")]


def resume(out, *words):
    return train.main(["--out", str(out), "--resume", "true", *words])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    """Alter one byte in the middle, where the weights are: torch reads such a file without a word."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


# The run folder.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/run", ["file is a file", "another --out"]),
        ("file", ["is a file", "another --out"]),
        ("n" * 300, ["name too long", "another --out"]),
        ("/proc/run", ["make the run folder", "another --out"]),
        ("/dev/null", ["/dev/null is a file", "another --out"]),
    ],
)
def test_a_run_folder_that_cannot_be_had(name, words, arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train.main(arguments(tmp_path / name)) == 2
    error = told(capsys)
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Files of options.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["does not exist"]),
        ("folder", ["not a file"]),
        (b"\x00\xff\xfe", ["decode"]),
        (b"epochs: [1", ["parsing"]),
        (b"epoch: 3", ["no option epoch;", "did you mean epochs?"]),
        (b"epochs: many", ["epochs", "many"]),
        (b"3", ["3"]),
        (b"", ["Unexpected"]),
    ],
)
def test_a_config_that_is_none(content, words, arguments, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    if content == "folder":
        config.mkdir()
    elif content is not None:
        config.write_bytes(content)
    assert train.main(["--config", str(config), *arguments(tmp_path / "run")]) == 2
    error = told(capsys)
    assert all(word in error for word in [*words, "mine.yaml", "config.yaml of a run"]), error
    assert not (tmp_path / "run").exists()


# A run that is resumed.


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("config.yaml", lambda path: path.write_bytes(b"\xff"), ["config.yaml", "restore it"]),
        ("config.yaml", lambda path: path.write_text("epochs: ["), ["config.yaml", "restore it"]),
        ("data.json", cut, ["data.json", "restore the file, or remove"]),
        ("data.json", lambda path: path.write_text("[]"), ["data.json", "restore the file, or remove"]),
        ("data.json", lambda path: path.write_text('{"digest": 1}'), ["data.json", "restore the file, or remove"]),
        ("data.json", lambda path: path.write_bytes(b"\xff\xfe"), ["data.json", "restore the file, or remove"]),
        ("best.ckpt", cut, ["best.ckpt", "remove best.ckpt and last.ckpt"]),
        ("best.ckpt", flip, ["best.ckpt", "damaged", "remove best.ckpt and last.ckpt"]),
        ("best.ckpt", Path.unlink, ["best.ckpt", "No such file", "remove best.ckpt and last.ckpt"]),
        ("best.ckpt", lambda path: torch.save({}, path), ["best.ckpt", "not a checkpoint of a run"]),
        ("best.ckpt", lambda path: path.write_text("x"), ["best.ckpt", "remove best.ckpt and last.ckpt"]),
        ("best.ckpt", replace_by_folder, ["best.ckpt", "remove best.ckpt and last.ckpt"]),
    ],
)
def test_a_damaged_file_of_a_run_is_told_before_any_training(name, damage, words, run, capsys):
    damage(run / name)
    (run / "metrics.csv").unlink()
    capsys.readouterr()
    assert resume(run) == 2
    error = told(capsys)
    assert all(word in error for word in words), error
    assert not (run / "metrics.csv").exists()


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_run_without_its_last_epoch_goes_on_from_its_best_one(damage, run, finished, capsys):
    damage(run / "last.ckpt")
    (run / "results.json").unlink()
    assert resume(run) == 0
    assert "last.ckpt" in capsys.readouterr().out
    assert_same_run(finished, run)


def test_a_run_whose_checkpoints_are_lost_begins_again_as_the_sentence_says(run, finished, capsys):
    for name in ("best", "last"):
        cut(run / f"{name}.ckpt")
    assert resume(run) == 2
    assert RESUME.format(run) in told(capsys)
    for name in ("best", "last"):
        (run / f"{name}.ckpt").unlink()
    assert resume(run) == 0
    assert_same_run(finished, run)


# What is written.


@pytest.mark.parametrize("name", ["results.json", "predictions.csv", "conflict.csv", "config.yaml", "data.json"])
def test_a_file_that_cannot_be_written(name, run, finished, capsys):
    """A folder in its place is what no privilege writes over."""
    words = ["--config", str(finished / "config.yaml"), "--out", str(run), "--resume", "true"]
    replace_by_folder(run / name)
    if name != "results.json":
        (run / "results.json").unlink()
    assert train.main(words) == 2
    assert f"cannot write {run / name} (Is a directory); make its folder writable and " in told(capsys)
    assert half_written(run) == []
    assert not (run / "results.json").is_file()
    (run / name).rmdir()
    assert train.main(words) == 0
    assert_same_run(finished, run)


@pytest.fixture
def limited():
    """Limits the size of files, as a quota or a full disk does."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize(
    ("size", "name", "left"),
    [(100, "config.yaml", []), (100_000, "best.ckpt", ["config.yaml", "data.json", "metrics.csv"])],
)
def test_a_run_without_room_leaves_nothing_half_written(size, name, left, arguments, limited, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train.main(arguments(whole)) == 0
    limited(size)
    assert train.main(arguments(out)) == 2
    limited(resource.RLIM_INFINITY)
    error = told(capsys)
    assert f"cannot write {out / name} (File too large); free some space and " in error
    assert sorted(path.name for path in out.iterdir()) == left
    assert (RESUME.format(out) in error) == bool(left)
    assert (resume(out) if left else train.main(arguments(out))) == 0
    assert_same_run(whole, out)


def test_a_reader_that_left_is_no_traceback(arguments, tmp_path):
    done = subprocess.run(
        f"{sys.executable} {SCRIPT} {' '.join(arguments(tmp_path / 'run'))} | head -n 1; exit ${{PIPESTATUS[0]}}",
        **{"shell": True, "executable": "/bin/bash", "env": ENVIRONMENT, "capture_output": True, "text": True},
    )
    assert done.returncode == 2
    assert done.stderr == ""


# Pictures.

NAMES = {
    "ant": "$5_$10",
    "bee": "$10_$20",
    "cat": "two\nlines, \N{SNOWMAN}\N{GRINNING FACE}\N{CJK UNIFIED IDEOGRAPH-732B}" + " long" * 60,
}


def test_any_class_name_can_be_drawn(table, arguments, tmp_path, capsys):
    """A warning would be an error here."""
    frame = pd.read_csv(table)
    frame["kind"] = frame["kind"].map(NAMES)
    frame.to_csv(tmp_path / "named.csv", index=False)
    out = tmp_path / "run"
    assert train.main(arguments(out, path=tmp_path / "named.csv", image_root=table.parent)) == 0
    assert "could not make confusion.png" not in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("*.png")) == ["conflict.png", "confusion.png", "curves.png"]
    assert set(pd.read_csv(out / "predictions.csv")["target"]) <= set(NAMES.values())


def test_a_picture_that_cannot_be_drawn_costs_a_sentence(arguments, run, finished, capsys):
    (run / "curves.png").mkdir()
    assert resume(run, "--pictures", "true") == 0
    printed = capsys.readouterr().out
    assert "\ncould not make curves.png: " in printed
    assert (run / "confusion.png").is_file()
    assert_same_run(finished, run)


# Numbers.


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_no_longer_finite_ends_the_run(method, arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(out, method=method, optimizer="sgd", learning_rate="1e18", epochs=5)) == 2
    error = told(capsys)
    assert "in epoch 0, batch" in error
    assert "lower --learning_rate (now 1e+18)" in error
    assert not (out / "last.ckpt").exists()


def test_a_loss_that_is_no_longer_finite_after_the_last_batch_ends_the_run(arguments, tmp_path, capsys):
    """One batch an epoch: its loss is finite, and its step leaves weights that give no numbers."""
    out = tmp_path / "run"
    words = arguments(out, optimizer="sgd", learning_rate="1e30", batch_size=64)
    assert train.main(words) == 2
    error = told(capsys)
    assert "validation rows are not finite in epoch 0" in error
    assert not (out / "last.ckpt").exists()


def refuse_number(name):
    raise AssertionError(f"{name} in JSON")


def test_what_is_not_defined_is_null_and_a_dash(table, arguments, tmp_path, capsys):
    frame = pd.read_csv(table)
    frame["part"] = ["train"] * 48 + ["val"] * 24
    frame.loc[frame.index[frame["kind"] == "ant"][:6], "part"] = "test"
    frame.to_csv(tmp_path / "parts.csv", index=False)
    out = tmp_path / "run"
    words = arguments(out, path=tmp_path / "parts.csv", image_root=table.parent, split_column="part")
    assert train.main(words) == 0
    figures = json.loads((out / "results.json").read_text(), parse_constant=refuse_number)
    for measured in (*figures["test"].values(), figures["fusion_measures"]["mean"]["test"]):
        assert measured["auroc"] is None
        assert 0 <= measured["accuracy"] == measured["balanced_accuracy"] <= 1
    assert figures["validation"]["image"]["auroc"] is not None
    last = capsys.readouterr().out.split("balanced_accuracy  auroc\n")[1].splitlines()[0]
    assert last.startswith("fused, mean (--fusion)")
    assert last.endswith(" -")


def test_figures_that_are_not_defined():
    nothing = {"accuracy": None, "balanced_accuracy": None, "auroc": None}
    assert measure(torch.randn(0, 3), torch.zeros(0, dtype=torch.long)) == nothing
    assert measure(torch.full((4, 3), math.nan), torch.tensor([0, 1, 2, 0])) == nothing
    assert measure(torch.eye(3), torch.tensor([0, 1, 2])) == {"accuracy": 1, "balanced_accuracy": 1, "auroc": 1}
    one = measure(torch.eye(3), torch.tensor([0, 0, 0]))
    assert one == {"accuracy": pytest.approx(1 / 3, abs=1e-6), "balanced_accuracy": one["accuracy"], "auroc": None}
    assert defined({"a": [1.5, math.nan, {"b": -math.inf}], "c": "nan"}) == {"a": [1.5, None, {"b": None}], "c": "nan"}


# The beginning and the end.


def figures(accuracy):
    return {"accuracy": accuracy, "balanced_accuracy": accuracy, "auroc": None}


def test_a_fusion_that_was_better_in_validation_is_told():
    measured = {
        "fusion": "mean",
        "figure": "accuracy",
        "test": {"fused": figures(0.733), "image": figures(0.742)},
        "without_table_measures": {"fused": figures(0.5)},
        "fusion_measures": {
            "mean": {"val": figures(0.742), "test": figures(0.733)},
            "product": {"val": figures(0.750), "test": figures(0.9)},
            "calibrated": {"val": figures(0.780), "test": figures(0.760)},
        },
    }
    *lines, hint = summary(measured).splitlines()
    names = ["fused, mean (--fusion)", "fused, product", "fused, calibrated", "image", "fused, without the table"]
    assert [line.split("  ")[0] for line in lines[1:]] == names
    assert hint.startswith("--fusion calibrated: accuracy 0.780 on the validation rows")
    assert hint.endswith("mean: 0.742")
    assert summary(measured | {"fusion": "calibrated"}).splitlines()[-1].startswith("fused, without the table")


def test_a_pipe_gets_a_line_an_epoch_and_no_bar(arguments, tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", epochs=3)) == 0
    printed = capsys.readouterr().out
    start, end = printed.index("epoch 0/2; "), printed.index("Test after epoch")
    assert f"run folder: {tmp_path / 'run'}" in printed[:start]
    assert "trainable parameters, on " in printed[:start]
    assert [line.split(";")[0] for line in printed[start:end].split("\n") if line] == [
        "epoch 0/2",
        "epoch 1/2",
        "epoch 2/2",
    ]
    assert "\r" not in printed


@pytest.mark.slow
def test_a_terminal_gets_one_bar(arguments, tmp_path):
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    words = [sys.executable, str(SCRIPT), *arguments(tmp_path / "run", epochs=3)]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdin=its, stdout=its, stderr=its)
    os.close(its)
    printed = ""
    with contextlib.suppress(OSError):  # the terminal is closed
        while piece := os.read(ours, 4096):
            printed += piece.decode(errors="replace")
    os.close(ours)
    assert process.wait() == 0
    assert re.search(r"\rEpoch 2: .*it/s", printed)
    assert "Validation" not in printed
    assert "epoch 0/2" not in printed
    assert "\x1b[A" not in printed  # the cursor goes up to a second bar


def test_the_record_of_a_run(run):
    record = json.loads((run / "results.json").read_text())
    assert record["command"].startswith("python examples/tabular_image/train.py --dataset csv --path /")
    assert record["data"] == json.loads((run / "data.json").read_text())["digest"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["parameters"] > 1000
    assert record["device"]
    assert set(record["fusion_measures"]["product"]) == {"val", "test"}


def test_a_second_run_gets_a_folder_with_a_number(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = without_out(arguments("left-out"))
    for expected in ("csv-gaal-seed0", "csv-gaal-seed0-2", "csv-gaal-seed0-3"):
        assert train.main(words) == 0
        assert f"run folder: runs/{expected}\n" in capsys.readouterr().out
    assert_same_run(*(tmp_path / "runs" / name for name in ("csv-gaal-seed0", "csv-gaal-seed0-3")))
    (tmp_path / "runs" / "csv-gaal-seed0-extra").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    newest = tmp_path / "runs" / "csv-gaal-seed0-3" / "results.json"
    newest.unlink()
    assert train.main([*words, "--resume", "true"]) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert parse(["--config", str(newest.parent / "config.yaml")]).out == "runs/csv-gaal-seed0-4"


# Several processes.


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], TORCHRUN])
def test_processes_agree_on_a_folder(launcher, arguments, finished, tmp_path):
    first, second = (tmp_path / "runs" / name for name in ("csv-gaal-seed0", "csv-gaal-seed0-2"))
    shutil.copytree(finished, first)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    done = subprocess.run(
        [*launcher, str(SCRIPT), *without_out(arguments("left-out", devices=2, batch_size=8))],
        **{"env": ENVIRONMENT, "cwd": tmp_path, "capture_output": True, "text": True},
    )
    if launcher is TORCHRUN:
        assert done.returncode != 0
        assert (
            "runs/csv-gaal-seed0 already holds a run; give --resume true to continue it, or another --out"
            in done.stderr
        )
        assert not second.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert "test" in results(second)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


# Signals.


def begin(words, cwd):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        **{"env": ENVIRONMENT, "cwd": cwd, "text": True, "start_new_session": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def ends(process):
    """Exit code and what was said."""
    _, error = process.communicate()
    return process.returncode, error


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 3), (signal.SIGTERM, 1)])
def test_an_interrupted_run_says_how_to_go_on(number, times, arguments, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train.main(arguments(whole, **STATEFUL)) == 0
    process = begin(arguments(out, **STATEFUL), tmp_path)
    wait_for(process, lambda: (out / "last.ckpt").exists() and len(metrics(out)) >= 3)
    for _ in range(times):
        os.killpg(process.pid, number)
    sentence = f"interrupted; the finished epochs are saved; go on with {RESUME.format(out)}\n"
    assert ends(process) == (128 + number, sentence)
    assert resume(out) == 0
    assert_same_run(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["yaml", "libtorch_python", "lightning"])
def test_ctrl_c_while_the_run_is_starting(library, arguments, tmp_path):
    process = begin(arguments(tmp_path / "run"), tmp_path)
    if library == "lightning":
        wait_for(process, (tmp_path / "run" / "config.yaml").exists)
    else:
        wait_for(process, lambda: library in Path(f"/proc/{process.pid}/maps").read_text())
    os.killpg(process.pid, signal.SIGINT)
    code, error = ends(process)
    assert code == 128 + signal.SIGINT
    if library == "lightning":
        assert error.endswith(f"go on with {RESUME.format(tmp_path / 'run')}\n")
        assert resume(tmp_path / "run") == 0
    else:
        assert error == "interrupted before the training; run the same command to start again\n"
        assert not (tmp_path / "run").exists()
