"""The protocol of the benchmark: data sets, methods, the hyper-parameter search, and the paper's figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
from classical import MODELS
from runs import Results, Run
from tabular_image.command_line import as_written
from tabular_image.data import DATASETS
from tabular_image.errors import InputError
from tabular_image.methods import METHODS, SETTINGS
from tabular_image.methods.settings import MethodSettings
from tabular_image.options import Options

# Endings of the sets under the protocols of fixed features, of the small CNN trained for longer, and of a ResNet.
ENDINGS = FEATURES, CNN, RESNET = "-features", "-cnn", "-resnet18"

# One protocol for every method: the small CNN and the MLP, 32 pixels, light augmentation, a cosine schedule, and the
# epoch with the best validation accuracy. Epochs are few, so that a table takes two cores an hour, not a day.
_COMMON: dict[str, Any] = {"image_size": 32, "augment": True, "schedule": "cosine", "batch_size": 64}
# 16 leaves a species: 80% of the rows train, and every species still has a row in validation and test.
_LEAVES = {"dataset": "leaves100", "epochs": 20, "validation": 0.08, "test": 0.12}
SETS: dict[str, dict[str, Any]] = {
    "leaves100-texture": {**_LEAVES, "table": "texture"},
    "leaves100-margin": {**_LEAVES, "table": "margin"},
    "fashion": {"dataset": "fashion", "epochs": 5},
    "houses": {"dataset": "houses", "epochs": 10, "folds": 5, "validation": 0.15},
}
# All other data sets, with their own options. csv has no data of its own.
_TAKEN = {options["dataset"] for options in SETS.values()}
_OTHERS = [name for name, entry in DATASETS.entries.items() if name not in _TAKEN and entry.origin != "your own"]
SETS |= {name: {"dataset": name, "epochs": 15, "image_size": None} for name in _OTHERS}
# These sets with another image encoder, an MLP on fixed features of the pictures: a run takes seconds.
_FEATURES: dict[str, Any] = {"image_encoder": "features", "image_size": 64, "augment": False}
_LONGER = {"fashion": 10, "houses": 20}
SETS |= {
    f"{name}{FEATURES}": SETS[name] | _FEATURES | ({"epochs": _LONGER[name]} if name in _LONGER else {})
    for name in ("leaves100-texture", "leaves100-margin", "fashion", "houses")
}
# The small CNN with larger pictures and a longer training. `capacity.py` shows what the options reach on the validation
# rows of the image alone.
_EPOCHS_CNN = {"leaves100-texture": 60, "leaves100-margin": 60, "fashion": 15, "houses": 60}
SETS |= {f"{name}{CNN}": SETS[name] | {"image_size": 64, "epochs": epochs} for name, epochs in _EPOCHS_CNN.items()}
# Three sets with a ResNet-18 from random weights, for a GPU: on a CPU a run takes hours.
_RESNET: dict[str, Any] = {"image_encoder": "resnet18", "image_size": 64}
SETS |= {
    f"{name}{RESNET}": SETS[name] | _RESNET | {"epochs": 20} for name in ("leaves100-texture", "fashion", "houses")
}

Block = Literal["one modality", "fused", "image alone at test time"]


@dataclass(frozen=True)
class Row:
    """A row of the table: a method with its settings.

    Attributes:
        method: a name of `train.py --method`, or a key of `classical.MODELS`.
        block: the group of rows that are compared with one another, by the prediction of the block.
        settings: settings of the method, or options of train.py, that differ from the defaults.
        paper: the row of the paper's Table I.
        searched: values of the method's own settings that the hyper-parameter search may choose.
        stages: settings that are lengths of stages before the last one, as multiples of the set's epochs.
        label: the name in printed tables, as in the literature; rows of figures have no label.
    """

    method: str
    block: Block = "fused"
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str | None = None
    searched: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    label: str = ""

    @property
    def prediction(self) -> str:
        """The prediction by which the row is judged."""
        if self.method in MODELS:
            return MODELS[self.method][0]
        return self.method if self.block == "one modality" else "fused" if self.block == "fused" else "image"


def _row(method: str, label: str, **settings: Any) -> Row:
    """A row of a registered method with `settings`. The class of the method's settings says what is searched."""
    family, own = METHODS.entries[method].family, SETTINGS[method]
    block: Block = "fused" if family in ("joint", "alternating") else family
    return Row(method, block, settings, searched=own.searched, stages=own.stages, label=label)


def _joint(label: str, **settings: Any) -> Row:
    """A row of `gaal_joint`: shared head, gradient in the joint network alone, calibrated fusion, then `settings`."""
    return _row("gaal_joint", label, **{"head": "shared", "gradient": "joint", **_CALIBRATED} | settings)


def _without_surgery(row: Row) -> Row:
    """The row without surgery. Guides then change no step, so that nothing is searched."""
    return replace(row, settings=row.settings | {"rule": "none"}, searched={})


_CALIBRATED = {"fusion": "calibrated"}
_BALANCED = {"class_weights": "balanced", "select": "balanced_accuracy"}
_JOINT = "GAAL, joint turn"
_JOINT_ALONE = "Alternation, joint turn"

# Every method has a row with the method's defaults. These variants follow the row of their method.
_VARIANTS: dict[str, dict[str, Row]] = {
    "table": {
        "boosting-table": Row("boosting-table", "one modality", label="Gradient boosting (table)"),
        "logistic-image": Row("logistic-image", "one modality", label="Logistic regression (image features)"),
        "boosting-both": Row("boosting-both", label="Gradient boosting (both)"),
        "boosting-stacked": Row("boosting-stacked", label="Stacked boosting and regression"),
    },
    "tip": {"tip-frozen": _row("tip", "TIP, frozen encoder", encoder="frozen")},
    "gaal": {
        "gaal-dualfloor": _row("gaal", "GAAL, released rule", rule="dualfloor"),
        "gaal-update": _row("gaal", "GAAL, update alignment", align="update"),
        "alternating-calibrated": _row("alternating", "Alternation, calibrated", **_CALIBRATED),
        "alternating-balanced": _row(
            "alternating", "Alternation, calibrated, class weights", **_CALIBRATED, **_BALANCED
        ),
        "gaal-calibrated": _row("gaal", "GAAL, calibrated", **_CALIBRATED),
    },
    "gaal_joint": {
        "gaal-joint": _joint(_JOINT),
        "gaal-joint-mean": _joint(f"{_JOINT}, mean of the logits", fusion="mean"),
        "gaal-joint-auto": _joint(f"{_JOINT}, chosen fusion", fusion="auto"),
        "gaal-joint-guided": _joint("GAAL, guided joint turn", guided=True),
        "gaal-joint-encoders": _joint(f"{_JOINT}, encoders", gradient="encoders"),
        "gaal-joint-own": _joint(f"{_JOINT}, own head", head="own"),
        "gaal-joint-own-encoders": _joint(f"{_JOINT}, own head, encoders", head="own", gradient="encoders"),
        "gaal-joint-balanced": _joint(
            f"{_JOINT}, own head, encoders, class weights", head="own", gradient="encoders", **_BALANCED
        ),
        "alternating-joint": _without_surgery(_joint(_JOINT_ALONE)),
        "alternating-joint-own-encoders": _without_surgery(
            _joint(f"{_JOINT_ALONE}, own head, encoders", head="own", gradient="encoders")
        ),
    },
    "mmcl": {"mmcl-frozen": _row("mmcl", "MMCL, frozen encoder", encoder="frozen")},
}


def _rows() -> Iterator[tuple[str, Row]]:
    labels = {"gaal": "GAAL (paper)"}
    for name, entry in METHODS.entries.items():
        if name != "gaal_joint":  # all rows of gaal_joint are variants
            yield name, replace(_row(name, labels.get(name) or METHODS.title(name)), paper=entry.paper)
        yield from _VARIANTS.get(name, {}).items()


ROWS = dict(_rows())
REFERENCE = {"fused": "gaal", "image alone at test time": "gaal_star"}

# A recipe is an optimizer with a learning rate and a weight decay. Every method tries the recipes in this order, and
# the first recipe is the default. Half of the recipes are SGD, because Adam undoes the methods that scale gradients.
_ADAMW, _SGD = {"optimizer": "adamw", "weight_decay": 0.01}, {"optimizer": "sgd", "weight_decay": 5e-4}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw 0.003": {**_ADAMW, "learning_rate": 0.003},
    "sgd 0.05": {**_SGD, "learning_rate": 0.05},
    "adamw 0.001": {**_ADAMW, "learning_rate": 0.001},
    "sgd 0.02": {**_SGD, "learning_rate": 0.02},
    "adamw 0.01": {**_ADAMW, "learning_rate": 0.01},
    "sgd 0.1": {**_SGD, "learning_rate": 0.1},
}


def known_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe.

    Raises:
        SystemExit: There is no such recipe.
    """
    if name not in RECIPES:
        raise SystemExit(f"error: there is no recipe {name!r}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class DataSet:
    """A data set of a command.

    Attributes:
        name: the name in tables and files.
        given: the name on the command line, a key of `SETS` or a YAML file.
        options: options of train.py, without a method.
        data: digest of the data; empty where the data were not read.
    """

    name: str
    given: str
    options: Options
    data: str = ""


def data_set(name: str) -> DataSet:
    """The data set of a key of `SETS`, or of a YAML file of train.py.

    Raises:
        SystemExit: There is no such set, or the file cannot be used.
    """
    if name in SETS:
        return DataSet(name, name, Options(**(_COMMON | SETS[name])))
    if name.endswith((".yaml", ".yml")):
        return DataSet(Path(name).stem, name, from_yaml(name))
    hint = f"; {name} alone needs its options in a YAML file of train.py" if name in DATASETS else ""
    raise SystemExit(
        f"error: there is no data set {name!r}{hint}; choose from {', '.join(SETS)}, or name a YAML file with options "
        "of train.py, such as the config.yaml of a run"
    )


def from_yaml(path: str, *arguments: str) -> Options:
    """The options in a YAML file of train.py, with more arguments of train.py's command line.

    Raises:
        SystemExit: The file cannot be read or used.
    """
    try:
        return as_written(["--config", path, *arguments])
    except InputError as error:
        raise SystemExit(f"error: {path}: {error}") from error


def known_rows(names: Sequence[str] | None) -> list[str]:
    """The given names of rows; by default the names of all rows.

    Raises:
        SystemExit: There is no such row.
    """
    for name in names or ():
        if name not in ROWS:
            raise SystemExit(f"error: there is no row {name!r}; choose from {', '.join(ROWS)}")
    return list(names or ROWS)


def row_options(base: Options, row: Row, **changes: Any) -> Options:
    """The options of a set with the method of a row. `changes` are settings of the method or options of train.py."""
    kind = SETTINGS.get(row.method, MethodSettings)
    changes = row.settings | {name: max(1, round(share * base.epochs)) for name, share in row.stages.items()} | changes
    names = {option.name for option in fields(kind)}
    own = {name: value for name, value in changes.items() if name in names}
    common = {name: value for name, value in changes.items() if name not in own}
    return replace(base, method=row.method, settings=kind(**own), **common)


def repeated(which: DataSet, row_name: str, options: Options, seeds: int) -> list[Run]:
    """One run for each seed, and for each fold where the set is cross-validated."""
    return [
        Run(which.name, row_name, replace(options, seed=seed, fold=fold), which.data)
        for seed in range(seeds)
        for fold in range(options.folds or 1)
    ]


class Search:
    """The hyper-parameter search of one row on one set.

    Trial t takes recipe number t, for every method. The first trial takes the defaults of the method's own settings.
    The other trials draw these settings at random. All trials train on the rows of seed 0 (fold 0). The trial with the
    best validation accuracy is chosen, and among equals the earliest. A row of `classical` has one trial, because
    recipes do not apply to it.
    """

    def __init__(self, which: DataSet, row_name: str, trials: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        row = ROWS[row_name]
        if row.method in MODELS:
            self.runs = repeated(which, row_name, row_options(which.options, row), seeds=1)[:1]
            return
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
        self.runs: list[Run] = []
        for number, recipe in enumerate(islice(cycle(RECIPES), trials)):
            defaults = vars(row_options(which.options, row).settings) if number == 0 else {}
            study.enqueue_trial({"recipe": recipe} | {name: defaults[name] for name in row.searched if defaults})
            trial = study.ask()
            trial.suggest_categorical("recipe", list(RECIPES))
            own = {name: trial.suggest_categorical(name, values) for name, values in row.searched.items()}
            options = row_options(which.options, row, **RECIPES[recipe], **own)
            self.runs.append(Run(which.name, row_name, replace(options, seed=0, fold=0), which.data))

    def best(self, results: Results) -> Options:
        """The options of the best trial; all trials must be in the results."""
        accuracies = [results[run]["val_accuracy"] for run in self.runs]
        best = max(range(len(self.runs)), key=lambda trial: np.nan_to_num(accuracies[trial], nan=-1.0))
        return self.runs[best].options


def paper_figures() -> pd.DataFrame:
    """Table I of the paper: row, set, prediction, accuracy, and for a suspect figure the reason."""
    return pd.read_csv(Path(__file__).parent / "paper.csv", keep_default_na=False)
