"""What is predicted: reading, inference and encoding of targets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tabular_image.data.csv import csv
from tabular_image.data.splits import split_rows
from tabular_image.data.targets import encode_target, read_target, strata
from tabular_image.errors import InputError
from test_data import make_samples

ALL = np.arange(40)


def read(*columns, task=""):
    cells = pd.DataFrame({f"column {place}": list(map(str, column)) for place, column in enumerate(columns)})
    return read_target(cells, task, ",", lambda row: f"row {row}")


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        (["cat", "dog"] * 20, "classification"),
        ([0, 1, 2, 3] * 10, "classification"),
        ([f"{number}.0" for number in range(4)] * 10, "classification"),
        (list(range(100)) * 16, "classification"),  # numbers of species, sixteen leaves each
        ([f"breed {number}" for number in range(40)], "classification"),
        (np.linspace(0, 1, 40), "regression"),
        ([f"$ {1000 * number},50" for number in range(1, 41)], "regression"),
        (range(100_000, 140_000, 1000), "regression"),
        (["cat|dog", "cat", "dog", "bird|dog", "bird"] * 8, "multilabel"),
        (["['cat', 'dog']", "['dog']", "[]", "['cat']"] * 10, "multilabel"),
        (["red; round", "red", "round", "", "blue; round"] * 8, "multilabel"),
        (["a;b", "c;d"] * 20, "classification"),  # the parts are never met in other company
    ],
)
def test_the_task_is_inferred_from_the_cells(cells, task):
    assert read(cells)[0] == task


def test_the_user_decides_over_the_inference():
    assert read(range(100_000, 140_000, 1000), task="classification")[0] == "classification"
    kind, target, why = read([1, 2, 3, 4] * 10, task="regression")
    assert (kind, target.tolist()[:4]) == ("regression", [1.0, 2.0, 3.0, 4.0])
    assert why == "a number, 4 different; numbers"
    kind, labels, _ = read(["cat, dog", "dog", "", "cat"], task="multilabel")
    assert kind == "multilabel"
    assert labels.astype(int).to_dict("list") == {"cat": [1, 0, 0, 1], "dog": [1, 1, 0, 0]}


def test_several_columns_are_labels():
    kind, labels, why = read(["yes", "no", "no"], ["red", "blue", ""], [1, 0, 1])
    assert (kind, why) == ("multilabel", "4 labels")
    assert labels.astype(int).to_dict("list") == {
        "column 0": [1, 0, 0],
        "column 1: blue": [0, 1, 0],
        "column 1: red": [1, 0, 0],
        "column 2": [1, 0, 1],
    }
    with pytest.raises(InputError, match="--task regression takes one target column, not 2; give --task multilabel"):
        read([1, 2], [3, 4], task="regression")


def test_a_number_that_is_none_is_told_with_its_row():
    with pytest.raises(InputError, match="row 2: the target 'column 0' is a number but holds 'cheap'"):
        read([*range(100, 102), "cheap", *range(102, 140)], task="regression")


def test_a_number_is_standardised_on_the_training_rows():
    prices = pd.Series(np.exp(np.linspace(0, 8, 40)), name="price")
    samples = make_samples(40, target=prices, task="regression")
    train = np.arange(30)
    task, values = encode_target(samples, train, log=True)
    assert (task.names, task.rows, task.log) == (("price",), 30, True)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[train].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(values[train].std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(values * task.deviation + task.mean, torch.from_numpy(np.log(prices.to_numpy())).float())


def test_what_no_number_can_be_learned_of_is_told():
    same = make_samples(40, target=pd.Series([5.0] * 40), task="regression")
    with pytest.raises(InputError, match="every training row has the same target, 5"):
        encode_target(same, ALL)
    negative = make_samples(40, target=pd.Series([-1.0, 2.0] * 20), task="regression")
    with pytest.raises(InputError, match=r"the target -1 has no logarithm; leave out --log_target"):
        encode_target(negative, ALL, log=True)
    with pytest.raises(InputError, match=r"--log_target is for a number, and the task of .* is classification"):
        encode_target(make_samples(40), ALL, log=True)


def test_labels_are_counted_on_the_training_rows():
    labels = pd.DataFrame({"a": [True, False] * 20, "b": [True] * 10 + [False] * 30})
    task, values = encode_target(make_samples(40, target=labels, task="multilabel"), np.arange(20))
    assert (task.names, task.counts, task.rows) == (("a", "b"), (10, 10), 20)
    assert values.shape == (40, 2)


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_splits_hold_equal_shares_of_every_stratum(task):
    generator = np.random.default_rng(0)
    target = (
        pd.Series(generator.normal(size=400))
        if task == "regression"
        else pd.DataFrame(generator.random((400, 6)) < [0.5, 0.4, 0.3, 0.2, 0.1, 0.01])
    )
    samples = make_samples(400, target=target, task=task)
    labels = pd.Series(strata(samples))
    splits = split_rows(samples, validation=0.1, test=0.2, seed=0)
    for rows, share in ((splits["test"], 0.2), (splits["val"], 0.1)):
        counts = labels.value_counts()
        there = labels[rows].value_counts().reindex(counts.index, fill_value=0)
        assert ((there - share * counts).abs() <= 1).all()
    assert sorted(np.concatenate(list(splits.values()))) == list(range(400))


def test_labels_in_a_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    rows = "".join(f"a.png,{number % 7},{labels}\n" for number, labels in enumerate(["x|y", "x", "", "y", "z|x"] * 8))
    (tmp_path / "pets.csv").write_text(f"image,size,labels\n{rows}")
    samples = csv(tmp_path / "pets.csv", image_column="image", target_column="labels")
    assert samples.task == "multilabel"
    assert list(samples.target) == ["x", "y", "z"]
    assert "3 labels, from lists" in samples.note


def test_a_class_of_one_row_that_is_a_number_is_told_of_regression():
    target = pd.Series([str(number) for number in range(40)])
    with pytest.raises(InputError, match=r"has a single sample.*or give --task regression"):
        split_rows(make_samples(40, target=target))
