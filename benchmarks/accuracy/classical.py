"""Models to try before a network: gradient boosting on the table, logistic regression on features of the picture.

The splits, the encoded table and the figures are the pipeline's. `data.features` computes the features of the pictures.
Nothing is searched: every model has scikit-learn's defaults, except where this list says otherwise.

- `boosting-table`: histogram gradient boosting on the encoded table, 100 iterations and no early stopping. An iteration
  grows a tree for each class, so sets of more than 50 classes have 30 iterations.
- `logistic-image`: multinomial logistic regression on the standardised features, C = 0.1.
- `boosting-both`: boosting on the table's columns and the first 64 principal components of the features. There are
  some 2,000 features, and the time of boosting grows with the number of columns.
- `boosting-stacked`: a logistic regression on the log odds of boosting-table and logistic-image, both by five-fold
  cross-validation on the training rows (Wolpert, Neural Networks 5, 1992). Another way to stack is boosting on the
  table beside the class probabilities of logistic-image. This other way was right on 0.88 of the validation rows of
  leaves100-texture, against 0.95, and on 0.61 of the validation rows of houses, against 0.68 (seed 0).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from tabular_image.data import Samples
from tabular_image.data.features import with_features
from tabular_image.data.module import TabularImageData
from tabular_image.files import writing
from tabular_image.metrics import defined, measure
from tabular_image.options import Options
from tabular_image.run import build_data
from threadpoolctl import threadpool_limits

_ITERATIONS, _ITERATIONS_OF_MANY, _MANY = 100, 30, 50
_COMPONENTS = 64
_FOLDS = 5
_SMALLEST = 16  # least side of a picture, in pixels, that the features need
_LEAST = 1e-6  # least probability, which keeps logarithms finite


@dataclass(frozen=True)
class Inputs:
    """A data set in the form that the models take.

    Attributes:
        cells: (N, D + F), the D columns of the encoded table, then the F features of the pictures.
        width: number D of the encoded table's columns.
        target: (N,), the class of each row.
        splits: row positions under "train", "val" and "test".
        classes: number of classes.
        groups: (N,). Rows of one group are never in two folds. None where each row is a group of its own.
        seed: the seed of the folds and the principal components.
    """

    cells: np.ndarray
    width: int
    target: np.ndarray
    splits: Mapping[str, np.ndarray]
    classes: int
    groups: np.ndarray | None
    seed: int


def boosting_table(inputs: Inputs) -> ClassifierMixin:
    """Boosting on the table."""
    return make_pipeline(_columns(inputs, table="passthrough"), _boosting(inputs))


def logistic_image(inputs: Inputs) -> ClassifierMixin:
    """Logistic regression on the features of the picture."""
    return make_pipeline(_columns(inputs, image=StandardScaler()), LogisticRegression(C=0.1, max_iter=1000))


def boosting_both(inputs: Inputs) -> ClassifierMixin:
    """Boosting on the table and on principal components of the features."""
    most = min(_COMPONENTS, len(inputs.splits["train"]), inputs.cells.shape[1] - inputs.width)
    components = make_pipeline(StandardScaler(), PCA(most, random_state=inputs.seed))
    return make_pipeline(_columns(inputs, table="passthrough", image=components), _boosting(inputs))


def boosting_stacked(inputs: Inputs) -> ClassifierMixin:
    """Logistic regression on the predictions of both modalities' models for rows outside the models' training folds."""
    return StackingClassifier(
        [("image", logistic_image(inputs)), ("table", boosting_table(inputs))],
        make_pipeline(FunctionTransformer(_log_odds), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
        cv=_folds(inputs),
        stack_method="predict_proba",
    )


MODELS: dict[str, tuple[str, Callable[[Inputs], ClassifierMixin]]] = {
    "boosting-table": ("table", boosting_table),
    "logistic-image": ("image", logistic_image),
    "boosting-both": ("fused", boosting_both),
    "boosting-stacked": ("fused", boosting_stacked),
}


def run(options: Options, samples: Samples) -> None:
    """Fits the model with the name `options.method`, and writes the `results.json` of a run into `options.folder`."""
    prediction, build = MODELS[options.method]
    with threadpool_limits(options.threads), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class|Number of classes in training fold")
        data = build_data(options, samples)
        inputs = prepared(data, options.seed, features=_features(samples, data))
        started = time.perf_counter()
        train = inputs.splits["train"]
        model = build(inputs).fit(inputs.cells[train], inputs.target[train])
        seconds = time.perf_counter() - started
        models = {prediction: model} | getattr(model, "named_estimators_", {})
        test = {name: _measured(one, inputs, "test") for name, one in models.items()}
        without_table = {name: _measured(one, inputs, "test", table=False) for name, one in models.items()}
        validation = _measured(model, inputs, "val")
    results = {
        "dataset": options.dataset,
        "method": options.method,
        "seed": options.seed,
        "split_sizes": data.split_sizes,
        "epochs": 0,
        "best_epoch": 0,
        "val_accuracy": validation["accuracy"],
        "seconds": round(seconds, 3),
        "test": test,
        "without_table": {name: figures["accuracy"] for name, figures in without_table.items()},
        "fusions": {},
        "fusion_measures": {},
        "conflict": None,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    with writing(options.folder / "results.json") as temporary:
        temporary.write_text(json.dumps(defined(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def prepared(data: TabularImageData, seed: int, features: np.ndarray) -> Inputs:
    """The rows of a data set with the features (N, F) of their pictures, split as the pipeline splits them."""
    groups = data.samples.groups
    return Inputs(
        cells=np.concatenate([data.table.numpy(), features], axis=1),
        width=data.table_width,
        target=data.target.numpy(),
        splits=data.splits,
        classes=len(data.classes),
        groups=None if groups is None else groups.to_numpy(),
        seed=seed,
    )


_DESCRIBED: list[tuple[Samples, int, np.ndarray]] = []  # features of the last data set, for the set's next run


def _features(samples: Samples, data: TabularImageData) -> np.ndarray:
    """Features (N, F) of the pictures of `data`, which was made of `samples`."""
    size = max(data.image_size, _SMALLEST)
    if not any(known is samples and side == size for known, side, _ in _DESCRIBED):
        features = with_features(data.samples, size, skip=False).features
        assert features is not None
        _DESCRIBED[:] = [(samples, size, features)]
    return _DESCRIBED[0][2]


def _boosting(inputs: Inputs) -> HistGradientBoostingClassifier:
    iterations = _ITERATIONS_OF_MANY if inputs.classes > _MANY else _ITERATIONS
    return HistGradientBoostingClassifier(max_iter=iterations, early_stopping=False, random_state=inputs.seed)


def _columns(inputs: Inputs, table: Any = "drop", image: Any = "drop") -> ColumnTransformer:
    """The treatment of the table's columns and of the picture's features."""
    places = {"table": slice(0, inputs.width), "image": slice(inputs.width, None)}
    return ColumnTransformer([("table", table, places["table"]), ("image", image, places["image"])])


def _folds(inputs: Inputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each fold, positions in the training rows: the rows to fit, and the rows to predict."""
    train = inputs.splits["train"]
    target = inputs.target[train]
    groups = None if inputs.groups is None else inputs.groups[train]
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = min(_FOLDS, int(np.bincount(target).max()))  # scikit-learn refuses more folds than this
    return list(splitter(folds, shuffle=True, random_state=inputs.seed).split(train, target, groups))


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    inside = probabilities.clip(_LEAST, 1 - _LEAST)
    return np.log(inside) - np.log1p(-inside)


def _measured(model: ClassifierMixin, inputs: Inputs, split: str, table: bool = True) -> dict[str, float | None]:
    """Figures of one split. With `table` false the table is zeros, the mean of the training rows."""
    rows = inputs.splits[split]
    cells = inputs.cells[rows]
    if not table:
        cells = cells.copy()
        cells[:, : inputs.width] = 0
    logits = np.log(model.predict_proba(cells).clip(_LEAST))
    return measure(torch.from_numpy(logits), torch.from_numpy(inputs.target[rows]))
