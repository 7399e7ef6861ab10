"""The controlled study: what its dials change, and what its table says."""

from __future__ import annotations

from dataclasses import asdict, replace

import pandas as pd
import pytest
import when
from scipy import stats
from when import DIALS, Setting, measure, summarise


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(when, "_ROWS", 200)
    monkeypatch.setattr(when, "_EPOCHS", 4)


def test_a_seed_repeats_and_dials_change_the_training(short):
    usual, again, noisy, frozen = (
        measure(setting, seed=0) for setting in (Setting(), Setting(), Setting(noise=0.75), Setting(frozen=True))
    )
    assert usual == again
    assert noisy["conflict"] > usual["conflict"]
    assert frozen["alternating"] < usual["alternating"]
    assert usual["gaal"] != usual["alternating"]
    assert measure(Setting(), seed=1) != usual


def test_the_table_has_every_dial_with_its_gain_and_interval():
    settings = {replace(Setting(), **{dial: value}) for dial, values in DIALS.items() for value in values}
    gains = [0.01, 0.03, 0.02]
    runs = pd.DataFrame(
        [
            {**asdict(setting), "seed": seed, "alternating": 0.5, "gaal": 0.5 + gain * setting.width, "conflict": 0.25}
            for setting in settings
            for seed, gain in enumerate(gains)
        ]
    )
    table = summarise(runs)
    assert list(zip(table["dial"], table["value"], strict=True)) == [(d, value) for d in DIALS for value in DIALS[d]]
    line = table[(table["dial"] == "width") & (table["value"] == 4)].iloc[0]
    interval = stats.ttest_1samp([4 * gain for gain in gains], 0).confidence_interval()
    assert line[["gain", "low", "high"]].tolist() == pytest.approx([0.08, interval.low, interval.high])
    assert table["conflict"].eq(0.25).all()
