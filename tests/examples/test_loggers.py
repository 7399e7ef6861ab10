"""What loggers keep of a run, whole or interrupted: the metrics of every epoch, once."""

from __future__ import annotations

import json
import struct
import sys

import pandas as pd
import pytest
from tabular_image import train
from tabular_image.callbacks import EpochTable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_borders import told
from test_train import SCRIPT, assert_same_run, kill_in_mid_training, metrics, results
from wandb.proto.wandb_internal_pb2 import Record

NAMES = ["val_accuracy", "val_loss", "val_accuracy_image", "train_loss_image", "train_loss_table"]
ALL = "[csv, tensorboard, wandb]"


def of_csv(out, name):
    """Value by epoch; every epoch once."""
    rows = pd.read_csv(out / "csv" / "metrics.csv").dropna(subset=[name])
    assert rows["epoch"].is_unique
    return dict(zip(rows["epoch"], rows[name], strict=True))


def of_tensorboard(out, name):
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    epochs = {event.step: int(event.value) for event in events.Scalars("epoch")}
    return {epochs[event.step]: event.value for event in events.Scalars(name)}


def of_wandb(out, name):
    """Value by epoch, of all runs that have the identity of the first."""
    runs = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({run.name for run in runs}) == 1
    values = {}
    for run in runs:
        for record in map(Record.FromString, records(run.read_bytes())):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if name in row:
                values[row["epoch"]] = row[name]
    return values


def records(log):
    """The records of a log in LevelDB's format, which wandb writes: in pieces, none across two blocks."""
    place, parts = 7, []  # after the magic bytes
    while place + 7 < len(log):
        if 32_768 - place % 32_768 < 7:  # no room for a header: the block is filled with zeros
            place += 32_768 - place % 32_768
        size, kind = struct.unpack_from("<HB", log, place + 4)
        parts.append(log[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield b"".join(parts)
            parts = []


READERS = {"csv": of_csv, "tensorboard": of_tensorboard, "wandb": of_wandb}


def assert_logged(out, loggers):
    """Each logger has what the run's own table has."""
    table = metrics(out)
    for name in NAMES:
        expected = dict(zip(table["epoch"], table[name], strict=True))
        for logger in loggers:
            assert READERS[logger](out, name) == pytest.approx(expected, abs=1e-6), (logger, name)


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path, monkeypatch):
    """W&B finds no account of the machine's user."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_a_logger_has_every_metric_of_every_epoch(logger, arguments, tmp_path):
    out = tmp_path / "run"
    assert train.main(arguments(out, epochs=3, logger=logger, pictures="false")) == 0
    assert len(metrics(out)) == 3
    assert_logged(out, [logger])
    assert "gaal.margin: 0.0" in (out / logger / "hparams.yaml").read_text()


@pytest.mark.slow
def test_several_loggers_change_nothing(arguments, tmp_path):
    plain, logged = tmp_path / "plain", tmp_path / "logged"
    assert train.main(arguments(plain, pictures="false")) == 0
    assert train.main(arguments(logged, pictures="false", logger=ALL)) == 0
    assert_same_run(plain, logged)
    assert_logged(logged, READERS)


def test_epochs_of_an_earlier_stage_are_logged_too(arguments, tmp_path):
    options = {"method": "di_mml", "di_mml.encoder_epochs": 2, "di_mml.contrast_start": 0}
    assert train.main(arguments(tmp_path, pictures="false", logger="csv", **options)) == 0
    rows = pd.read_csv(tmp_path / "csv" / "metrics.csv").groupby("epoch").first()
    assert rows["train_loss_image"].notna().any()
    assert rows["val_accuracy"].notna().tolist() == metrics(tmp_path)["val_accuracy"].notna().tolist()


class InterruptionError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("loggers", ["csv", ALL])
def test_an_interrupted_run_goes_on_in_the_same_log(loggers, arguments, tmp_path, monkeypatch):
    """The epoch in progress was logged and not saved: the resumed run repeats it."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = {"epochs": 5, "pictures": "false", "logger": loggers}
    assert train.main(arguments(whole, **options)) == 0
    original = EpochTable.on_train_epoch_end

    def interrupt(self, trainer, method):
        if trainer.current_epoch == 3:
            raise InterruptionError
        original(self, trainer, method)

    monkeypatch.setattr(EpochTable, "on_train_epoch_end", interrupt)
    with pytest.raises(InterruptionError):
        train.main(arguments(out, **options))
    monkeypatch.setattr(EpochTable, "on_train_epoch_end", original)
    assert pd.read_csv(out / "csv" / "metrics.csv")["epoch"].max() == 3
    assert train.main(["--out", str(out), "--resume", "true"]) == 0
    assert_same_run(whole, out)
    assert_logged(out, READERS if loggers == ALL else ["csv"])
    assert (out / "csv" / "metrics.csv").read_text() == (whole / "csv" / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_log(arguments, tmp_path):
    out = tmp_path / "run"
    options = {"epochs": 20, "pictures": "false", "logger": ALL}
    kill_in_mid_training([sys.executable, SCRIPT, *arguments(out, **options)], out)
    assert train.main(["--out", str(out), "--resume", "true"]) == 0
    table = metrics(out)
    expected = dict(zip(table["epoch"], table["val_accuracy"], strict=True))
    assert len(expected) == 20
    for logger in ("csv", "tensorboard"):
        assert READERS[logger](out, "val_accuracy") == pytest.approx(expected, abs=1e-6)


def test_a_finished_run_is_resumed_with_its_log_unchanged(arguments, tmp_path):
    assert train.main(arguments(tmp_path, pictures="false", logger="csv")) == 0
    before = (tmp_path / "csv" / "metrics.csv").read_text()
    (tmp_path / "results.json").unlink()
    assert train.main(["--out", str(tmp_path), "--resume", "true"]) == 0
    assert (tmp_path / "csv" / "metrics.csv").read_text() == before


@pytest.mark.slow
def test_a_resumed_run_may_have_another_logger(arguments, tmp_path):
    assert train.main(arguments(tmp_path, pictures="false")) == 0
    assert train.main(["--out", str(tmp_path), "--resume", "true", "--logger", "csv"]) == 0
    assert results(tmp_path)["epochs"] == 2


@pytest.mark.slow
def test_a_damaged_log_is_one_sentence(arguments, tmp_path, capsys):
    assert train.main(arguments(tmp_path, pictures="false", logger="csv")) == 0
    (tmp_path / "csv" / "metrics.csv").write_text("no table")
    assert train.main(["--out", str(tmp_path), "--resume", "true"]) == 2
    error = told(capsys)
    assert f"cannot read {tmp_path / 'csv' / 'metrics.csv'}" in error
    assert "remove the file and go on with" in error


@pytest.mark.parametrize(
    ("logger", "words"),
    [
        ("tensorbord", ["no logger 'tensorbord'", "did you mean 'tensorboard'?"]),
        ("[csv, foo]", ["no logger 'foo'; choose one of none, csv"]),
        ("tensorboard", ["pip install tensorboard"]),
        ("[csv, wandb]", ["pip install wandb"]),
    ],
)
def test_a_logger_that_cannot_be_had_is_told_before_the_data_are_read(
    logger, words, arguments, tmp_path, monkeypatch, capsys
):
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    assert train.main(arguments(tmp_path / "run", path="there is no such table", logger=logger)) == 2
    error = told(capsys)
    assert all(word in error for word in words), error
