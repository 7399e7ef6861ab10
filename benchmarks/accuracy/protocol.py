"""What is compared: data sets, methods, the hyper-parameters that are searched, and the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from tabular_image.methods import SETTINGS
from tabular_image.methods.settings import NoSettings
from tabular_image.options import Options

FEATURES, RESNET = "-features", "-resnet18"  # end the names of sets that are compared under the other protocols

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
    **{name: {"dataset": name, "epochs": 15, "image_size": None} for name in ("dvm", "celeba", "sun", "digits")},
}
# The same sets with an MLP on fixed features of the pictures as image encoder: a run takes seconds.
_FEATURES: dict[str, Any] = {"image_encoder": "features", "image_size": 64, "augment": False}
_LONGER = {"fashion": 10, "houses": 20}
SETS |= {
    f"{name}{FEATURES}": SETS[name] | _FEATURES | ({"epochs": _LONGER[name]} if name in _LONGER else {})
    for name in ("leaves100-texture", "leaves100-margin", "fashion", "houses")
}
# With a ResNet-18 from random weights, for a GPU: on a CPU a run takes hours.
_RESNET: dict[str, Any] = {"image_encoder": "resnet18", "image_size": 64}
SETS |= {
    f"{name}{RESNET}": SETS[name] | _RESNET | {"epochs": 20} for name in ("leaves100-texture", "fashion", "houses")
}

Block = Literal["one modality", "fused", "image alone at test time"]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        method: as `train.py --method` names it, or a key of `classical.MODELS`.
        block: with which lines it is compared, and by which prediction.
        settings: of the method, or options of train.py, where they differ from the defaults.
        paper: the line of the paper's Table I.
        searched: values of the method's own settings that the hyper-parameter search may choose.
        stages: settings that are lengths of earlier stages, as multiples of the set's epochs.
        label: what tables for people call it, as in the literature; rows of figures have none.
    """

    method: str
    block: Block = "fused"
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str | None = None
    searched: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    label: str = ""

    @property
    def prediction(self) -> str:
        """The prediction that the line is judged by."""
        if self.method in MODELS:
            return MODELS[self.method][0]
        return self.method if self.block == "one modality" else "fused" if self.block == "fused" else "image"


# Every method searches two settings of three values each, where it has as many: the defaults and what lies around them
# in papers and released code. Concatenation, alternation and the single modalities have none that act on training. The
# default comes first: the draws of `Search` then try all values of such a pair in three trials.
_GAAL = {"image_fraction": (0.5, 0.25, 1.0), "table_fraction": (0.5, 0.25, 1.0)}
_CALIBRATED = {"fusion": "calibrated"}
_BALANCED = {"class_weights": "balanced", "select": "balanced_accuracy"}
_PRETRAINED = {"corruption": (0.3, 0.1, 0.5), "temperature": (0.1, 0.05, 0.2)}


def _joint(label: str, **settings: Any) -> Row:
    """A row of the joint turn: shared head, gradient to the joint network alone, calibrated, but for `settings`."""
    chosen = {"head": "shared", "gradient": "joint", **_CALIBRATED} | settings
    return Row("gaal_joint", label=label, settings=chosen, searched={} if chosen.get("rule") == "none" else _GAAL)


_MISSING: Block = "image alone at test time"
ROWS: dict[str, Row] = {
    "image": Row("image", "one modality", label="Image alone", paper="ResNet50"),
    "table": Row("table", "one modality", label="Table alone", paper="MLP"),
    "boosting-table": Row("boosting-table", "one modality", label="Gradient boosting (table)"),
    "logistic-image": Row("logistic-image", "one modality", label="Logistic regression (image features)"),
    "boosting-both": Row("boosting-both", label="Gradient boosting (both)"),
    "boosting-stacked": Row("boosting-stacked", label="Stacked boosting and regression"),
    "concatenation": Row("concatenation", label="Concatenation (CF)", paper="CF"),
    "maximum": Row("maximum", label="Maximum (MF)", paper="MF", searched={"projection": ("linear", "identity")}),
    "daft": Row("daft", label="DAFT", paper="DAFT", searched={"reduction": (7, 2, 14)}),
    "tip": Row("tip", label="TIP", paper="TIP", searched=_PRETRAINED, stages={"pretraining_epochs": 1}),
    "tip-frozen": Row(
        "tip",
        label="TIP, frozen encoder",
        settings={"encoder": "frozen"},
        searched=_PRETRAINED,
        stages={"pretraining_epochs": 1},
    ),
    "ogm_ge": Row(
        "ogm_ge", label="OGM-GE", paper="OGM", searched={"alpha": (0.8, 0.1, 0.3), "share": (0.5, 0.25, 1.0)}
    ),
    "mmpareto": Row(
        "mmpareto",
        label="MMPareto",
        paper="MMPareto",
        searched={"rescale": ("tensor", "encoder"), "gamma": (1.5, 1.0, 2.0)},
    ),
    "mla": Row(
        "mla", label="MLA", paper="MLA", searched={"gate": ("entropy", "fixed"), "image_weight": (0.55, 0.4, 0.7)}
    ),
    "di_mml": Row(
        "di_mml",
        label="DI-MML",
        paper="DI-MML",
        searched={"temperature": (10.0, 20.0, 50.0), "confidence_temperature": (1.0, 0.3, 3.0)},
    ),
    "reconboost": Row(
        "reconboost",
        label="ReconBoost",
        paper="ReconBoost",
        searched={"label_weight": (4.0, 5.0, 8.0), "residual_weight": (1.0, 2.0, 4.0)},
        stages={"pretraining_epochs": 0.5},
    ),
    "lfm": Row("lfm", label="LFM", paper="LFM", searched={"alpha": (None, 0.3, 0.5, 0.7, 0.9)}),
    "alternating": Row("alternating", label="Alternation"),
    "gaal": Row("gaal", label="GAAL (paper)", paper="GAAL", searched=_GAAL),
    "gaal-dualfloor": Row("gaal", label="GAAL, released rule", settings={"rule": "dualfloor"}, searched=_GAAL),
    "gaal-update": Row("gaal", label="GAAL, update alignment", settings={"align": "update"}, searched=_GAAL),
    "alternating-calibrated": Row("alternating", label="Alternation, calibrated", settings=_CALIBRATED),
    "alternating-balanced": Row(
        "alternating", label="Alternation, calibrated, class weights", settings=_CALIBRATED | _BALANCED
    ),
    "gaal-calibrated": Row("gaal", label="GAAL, calibrated", settings=_CALIBRATED, searched=_GAAL),
    "gaal-joint": _joint("GAAL, joint turn"),
    "gaal-joint-mean": _joint("GAAL, joint turn, mean of the logits", fusion="mean"),
    "gaal-joint-auto": _joint("GAAL, joint turn, chosen fusion", fusion="auto"),
    "gaal-joint-guided": _joint("GAAL, guided joint turn", guided=True),
    "gaal-joint-encoders": _joint("GAAL, joint turn, encoders", gradient="encoders"),
    "gaal-joint-own": _joint("GAAL, joint turn, own head", head="own"),
    "gaal-joint-own-encoders": _joint("GAAL, joint turn, own head, encoders", head="own", gradient="encoders"),
    "alternating-joint": _joint("Alternation, joint turn", rule="none"),
    "alternating-joint-own-encoders": _joint(
        "Alternation, joint turn, own head, encoders", rule="none", head="own", gradient="encoders"
    ),
    "kd": Row(
        "kd",
        _MISSING,
        label="KD",
        paper="KD",
        searched={"temperature": (4.0, 1.0, 2.0), "weight": (0.5, 0.25, 0.75)},
        stages={"teacher_epochs": 1},
    ),
    "mfh": Row(
        "mfh",
        _MISSING,
        label="MFH",
        paper="MFH",
        searched={"removed": (0.75, 0.25, 0.5), "teacher_dropout": (0.5, 0.0, 0.25)},
        stages={"pair_epochs": 0.5, "teacher_epochs": 1},
    ),
    "fmr": Row(
        "fmr",
        _MISSING,
        label="FMR",
        paper="FMR",
        searched={"knockdown": (1 / 3, 1 / 6, 1 / 2), "reconstruction": (0.1, 0.01, 1.0)},
    ),
    "mmcl": Row("mmcl", _MISSING, label="MMCL", paper="MMCL", searched=_PRETRAINED, stages={"pretraining_epochs": 2}),
    "mmcl-frozen": Row(
        "mmcl",
        _MISSING,
        label="MMCL, frozen encoder",
        settings={"encoder": "frozen"},
        searched=_PRETRAINED,
        stages={"pretraining_epochs": 2},
    ),
    # A table of one kind of columns has one of the two weights.
    "charms": Row(
        "charms",
        _MISSING,
        label="CHARMS",
        paper="CHARMS",
        searched={"numeric_weight": (0.03, 0.3, 1.0), "categorical_weight": (0.03, 0.3, 1.0)},
    ),
    "gaal_star": Row("gaal_star", _MISSING, label="GAAL*", paper="GAAL*", searched=_GAAL),
}
REFERENCE = {"fused": "gaal", _MISSING: "gaal_star"}

# Optimizer, learning rate and weight decay, in the order in which every method tries them; the first is the default.
# Half are SGD, because Adam undoes the methods that scale gradients.
_ADAMW, _SGD = {"optimizer": "adamw", "weight_decay": 0.01}, {"optimizer": "sgd", "weight_decay": 5e-4}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw 0.003": {**_ADAMW, "learning_rate": 0.003},
    "sgd 0.05": {**_SGD, "learning_rate": 0.05},
    "adamw 0.001": {**_ADAMW, "learning_rate": 0.001},
    "sgd 0.02": {**_SGD, "learning_rate": 0.02},
    "adamw 0.01": {**_ADAMW, "learning_rate": 0.01},
    "sgd 0.1": {**_SGD, "learning_rate": 0.1},
}


@dataclass(frozen=True)
class DataSet:
    """A set of a command.

    Attributes:
        name: what tables and files call it.
        given: what the command line calls it, a key of `SETS` or a YAML file.
        options: those of train.py, without a method.
        data: digest of the data, where they were read.
    """

    name: str
    given: str
    options: Options
    data: str = ""


def data_set(name: str) -> DataSet:
    """A set by a key of `SETS`, or by a YAML file of train.py.

    Raises:
        SystemExit: there is no such set, or the file cannot be used.
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
    """The options in a YAML file of train.py, with more arguments of its command line.

    Raises:
        SystemExit: the file cannot be read or used.
    """
    try:
        return as_written(["--config", path, *arguments])
    except InputError as error:
        raise SystemExit(f"error: {path}: {error}") from error


def known_rows(names: Sequence[str] | None) -> list[str]:
    """The names, all of them by default.

    Raises:
        SystemExit: there is no such row.
    """
    for name in names or ():
        if name not in ROWS:
            raise SystemExit(f"error: there is no row {name!r}; choose from {', '.join(ROWS)}")
    return list(names or ROWS)


def row_options(base: Options, row: Row, **changes: Any) -> Options:
    """A set's options with the method of a row; `changes` are settings of the method or options of train.py."""
    kind = SETTINGS.get(row.method, NoSettings)
    changes = row.settings | {name: max(1, round(share * base.epochs)) for name, share in row.stages.items()} | changes
    own = {name: value for name, value in changes.items() if name in kind.__dataclass_fields__}
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

    Trial t takes recipe number t, the same for every method, and draws the method's own settings at random, but for
    the first, which takes their defaults. All are trained on the rows of seed 0 (fold 0), and chosen by validation
    accuracy; among equals the earlier. A row of `classical` has a single trial, as a recipe changes nothing in it.
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
    """Table I of the paper: row, set, prediction, accuracy, and why a figure is suspect, where it is."""
    return pd.read_csv(Path(__file__).parent / "paper.csv", keep_default_na=False)
