from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from imports import run_with_imports
from PIL import Image
from tabular_image import train
from tabular_image.callbacks import EpochSeed
from tabular_image.data.module import TabularImageData
from tabular_image.methods import METHODS

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tabular_image" / "train.py"
WRITTEN = ["config.yaml", "data.json", "metrics.csv", "best.ckpt", "last.ckpt"]
WRITTEN += ["model.pt", "results.json", "predictions.csv"]
MONITORED = ("alternating", "gaal", "gaal_joint", "gaal_star")
IMAGE_ALONE = ("image", "kd", "mfh", "fmr", "mmcl", "charms", "gaal_star")
# Every state that a resumed run must find again: momentum, schedule, guides, calibration, augmentation, patience.
STATEFUL = {
    **{"optimizer": "sgd", "schedule": "cosine", "fusion": "calibrated"},
    **{"gaal.guidance": "cached", "gaal.align": "update", "augment": "true", "patience": 20, "epochs": 20},
}


def results(out):
    figures = json.loads((out / "results.json").read_text())
    assert figures.pop("seconds") > 0
    assert figures.pop("command").startswith("python examples/tabular_image/train.py ")
    return figures


def metrics(out):
    return pd.read_csv(out / "metrics.csv").drop(columns="seconds")


def weights(out, name):
    return torch.load(out / f"{name}.ckpt", weights_only=True)["state_dict"]


def assert_same_run(first, second):
    assert results(first) == results(second)
    pd.testing.assert_frame_equal(metrics(first), metrics(second), check_exact=True)
    assert (first / "predictions.csv").read_bytes() == (second / "predictions.csv").read_bytes()
    for name in ("best", "last"):
        tensors, others = weights(first, name), weights(second, name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_everything_in_its_folder(method, arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(out, method=method)) == 0
    pictures = ["curves.png", "confusion.png", *(["conflict.png"] if method in MONITORED else [])]
    history = ["conflict.csv"] if method in MONITORED else []
    assert sorted(path.name for path in out.iterdir()) == sorted([*WRITTEN, "report.html", *pictures, *history])
    for picture in pictures:
        with Image.open(out / picture) as opened:
            assert min(opened.size) > 300

    figures = results(out)
    expected = list(figures["test"])
    assert expected[0] == ("table" if method == "table" else "image" if method in IMAGE_ALONE else "fused")
    # Without a table the joint method has no other voice than the image.
    assert list(figures["without_table"]) == (["fused", "image"] if method == "gaal_joint" else expected)
    assert set(figures["test"][expected[0]]) == {"accuracy", "balanced_accuracy", "auroc"}
    both = {"image", "table"} <= set(expected)
    assert set(figures["fusions"]) == ({"mean", "product", "calibrated"} if both else set())
    assert figures["epochs"] == len(metrics(out))

    predictions = pd.read_csv(out / "predictions.csv")
    assert list(predictions) == ["line", "target", *expected, f"{expected[0]}_probability"]
    assert len(predictions) == figures["split_sizes"]["test"]
    share = (predictions[expected[0]] == predictions["target"]).mean()
    assert share == pytest.approx(figures["test"][expected[0]]["accuracy"], abs=1e-6)

    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "balanced_accuracy" in printed


def test_the_epochs_of_all_stages_are_in_the_table_and_those_of_the_last_are_tested(arguments, tmp_path):
    options = {"method": "di_mml", "di_mml.encoder_epochs": 3, "di_mml.contrast_start": 0}
    assert train.main(arguments(tmp_path, pictures="false", **options)) == 0
    epochs = metrics(tmp_path)
    assert epochs["epoch"].tolist() == list(range(5))
    assert epochs["val_accuracy"].notna().tolist() == [False] * 3 + [True] * 2
    assert epochs["train_loss_contrast"].notna().tolist() == [True] * 3 + [False] * 2
    assert epochs["learning_rate"][3] == epochs["learning_rate"][0] > epochs["learning_rate"][2]
    assert results(tmp_path)["best_epoch"] >= 3


def test_the_written_config_repeats_the_run(arguments, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(arguments(first, pictures="false", **{"gaal.margin": 0.1, "gaal.relative": "true"})) == 0
    assert train.main(["--config", str(first / "config.yaml"), "--out", str(second)]) == 0
    assert_same_run(first, second)


def test_the_lowest_loss_among_the_best_epochs_is_tested(arguments, tmp_path):
    assert train.main(arguments(tmp_path, method="image", epochs=10, pictures="false")) == 0
    epochs = metrics(tmp_path)
    best = epochs[epochs["val_accuracy"] == epochs["val_accuracy"].max()]
    chosen = best["val_loss"].idxmin()
    assert chosen != best.index[0]  # else the run cannot tell the lowest loss from the first
    assert results(tmp_path)["best_epoch"] == chosen
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == chosen


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def without_out(words):
    place = words.index("--out")
    return [*words[:place], *words[place + 2 :]]


def kill_in_mid_training(command, out):
    """Starts a run, and kills it with all its processes after the third epoch or a later one."""
    process = subprocess.Popen(
        command,
        **{"env": ENVIRONMENT, "cwd": out.parent, "text": True, "start_new_session": True},
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE},
    )
    while not ((out / "last.ckpt").exists() and len(metrics(out)) >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "results.json").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(arguments, tmp_path):
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    assert train.main(arguments(whole, **STATEFUL)) == 0
    kill_in_mid_training([sys.executable, SCRIPT, *arguments(killed, **STATEFUL)], killed)
    shutil.move(killed, moved)
    assert train.main(["--out", str(moved), "--resume", "true"]) == 0
    assert_same_run(whole, moved)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_by_torchrun_end_as_two_uninterrupted_ones(arguments, tmp_path):
    """Guides are fresh: of cached ones a checkpoint holds those of the first process."""
    whole, killed = tmp_path / "runs" / "csv-gaal-seed0", tmp_path / "killed"
    options = {"batch_size": 8, "epochs": 12, "optimizer": "sgd", "fusion": "calibrated", "augment": "true"}
    words = without_out(arguments("left-out", **options))  # the processes agree on a folder
    subprocess.run([*TORCHRUN, SCRIPT, *words], env=ENVIRONMENT, cwd=tmp_path, check=True)
    kill_in_mid_training([sys.executable, SCRIPT, *arguments(killed, devices=2, **options)], killed)
    subprocess.run([*TORCHRUN, SCRIPT, "--out", str(killed), "--resume", "true"], env=ENVIRONMENT, check=True)
    assert_same_run(whole, killed)


def test_an_epoch_draws_the_same_whatever_happened_before():
    def draws(seed, epoch, before):
        for _ in range(before):
            torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        EpochSeed(seed).on_train_epoch_start(SimpleNamespace(current_epoch=epoch), None)
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    assert draws(3, 5, before=0) == draws(3, 5, before=2)
    assert not set(draws(3, 5, before=0)) & {*draws(3, 6, before=0), *draws(4, 5, before=0)}


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(arguments, tmp_path):
    whole, started = tmp_path / "whole", tmp_path / "started"
    assert train.main(arguments(whole, pictures="false")) == 0
    started.mkdir()
    shutil.copy(whole / "config.yaml", started)
    assert train.main(arguments(started, resume="true", pictures="false")) == 0
    assert_same_run(whole, started)


@pytest.mark.parametrize("options", [{}, {"patience": 1, "epochs": 30}])
def test_resuming_a_finished_run_rewrites_its_report_alone(options, arguments, tmp_path):
    out = tmp_path / "run"
    assert train.main(arguments(out, **options)) == 0
    assert len(metrics(out)) < 30
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "results.json").unlink()
    assert train.main(["--out", str(out), "--resume", "true"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_folder_is_never_overwritten(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    assert train.main(arguments(out)) == 2
    assert "--resume true" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_run_is_not_resumed_with_other_options(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(out, pictures="false")) == 0
    assert train.main(["--out", str(out), "--resume", "true", "--gaal.margin", "0.5"]) == 2
    assert "--gaal.margin 0.0" in capsys.readouterr().err
    assert train.main(["--out", str(out), "--resume", "true", "--threads", "2"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "missing.csv"}, ["missing.csv", "does not exist"]),
        ({"target_column": "kid"}, ["'kid'", "did you mean 'kind'?"]),
        ({"method": "mla", "devices": 2}, ["mla", "--devices 1", "gaal"]),
        ({"table": "margin"}, ["table"]),
        ({"method": "gal"}, ["'gal'", "did you mean 'gaal'?"]),
        ({"dataset": "flowers"}, ["'flowers'", "leaves100"]),
        ({"image_encoder": "small", "pretrained": "true"}, ["resnet18"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(options, words, arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(out, **options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not out.exists()


@pytest.fixture
def from_files(monkeypatch):
    """Pictures are read when they are needed, as those of a large set are."""
    monkeypatch.setitem(TabularImageData.__init__.__kwdefaults__, "cache", 0)


def test_a_picture_found_damaged_in_training_is_one_sentence_and_the_run_resumes(
    arguments, table, from_files, tmp_path, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main(arguments(whole, pictures="false")) == 0
    row = pd.read_csv(whole / "predictions.csv")["line"][0] - 2  # met after the training
    picture = table.parent / f"{row}.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:-30])
    capsys.readouterr()
    try:
        assert train.main(arguments(stopped, pictures="false")) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: table.csv, line {row + 2}: cannot read image {picture} (")
        assert error.count("\n") == 1
        skipped = tmp_path / "skipped"
        assert train.main(arguments(skipped, skip_corrupt="true", pictures="false")) == 0
    finally:
        picture.write_bytes(content)
    assert (pd.read_csv(skipped / "predictions.csv")["line"].tolist()) == pd.read_csv(whole / "predictions.csv")[
        "line"
    ].tolist()[1:]
    assert train.main(["--out", str(stopped), "--resume", "true"]) == 0
    assert_same_run(whole, stopped)


HEAVY = {
    *("torch", "lightning", "torchvision", "torchmetrics", "torchjd", "ot", "rtdl_revisiting_models"),
    *("sklearn", "scipy", "pandas", "matplotlib", "PIL"),
}


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        (["--help"], 0, "--gaal.margin"),
        (["--gaal.margni", "3"], 2, "--gaal.margni"),
        (["--method", "gal"], 2, "did you mean 'gaal'?"),
        (["--dataset", "digit"], 2, "did you mean 'digits'?"),
    ],
)
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(words, code, answer):
    done, names = run_with_imports(SCRIPT, *words)
    assert done.returncode == code
    assert answer in done.stdout + done.stderr
    assert names & HEAVY == set()


@pytest.mark.parametrize(
    "words", [["--gaal.image_fraction", "0"], ["--epochs", "0"], ["--nonsense", "1"], ["--epoch", "1"]]
)
def test_an_invalid_option_is_refused_with_exit_code_2(words, capsys):
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert words[0].strip("-") in error
    assert "--help" in error
    assert error.count("\n") == 1
