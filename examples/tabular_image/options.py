"""The options that all runs have; the command line, `--help` and `config.yaml` are made from them and the methods'."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from jsonargparse.typing import restricted_number_type as number

Finite = number("Finite", float, [(">", -float("inf")), ("<", float("inf"))])
Fraction = number("Fraction", float, [(">", 0), ("<=", 1)])
Share = number("Share", float, [(">=", 0), ("<", 1)])
BatchSize = number("BatchSize", int, (">=", 2))  # batch normalisation has no statistics of one row

LOGGERS = ("none", "csv", "tensorboard", "wandb")

# How a run is carried out, which may change when it is resumed; what it computes may not.
# Where the data lie may change too: their content is compared.
_CARRYING_OUT = (
    *("data_root", "path", "image_root"),
    *("accelerator", "workers", "threads", "out", "logger", "pictures", "resume", "settings"),
)


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    dataset: str = "digits"
    """Data set; digits needs no files."""
    data_root: str = "data"
    """Folder with one folder a data set, such as leaves100/."""
    table: Literal["texture", "margin", "shape"] | None = None
    """leaves100: which description of the leaves is the table; default texture."""
    path: str | None = None
    """csv: the file, one row a sample: CSV and its kin, Excel or Parquet."""
    image_column: str | list[str] = ""
    """csv: column of image paths, or several as '[front, back]'."""
    target_column: str | list[str] = ""
    """csv: column of what is predicted: classes, a number, or lists of labels. Several columns, as '[cat, dog]', are
    labels. fashion: its columns, by default articleType."""
    task: Literal["", "classification", "multilabel", "regression"] = ""
    """What the target is: one class of several, several labels, or a number; inferred and printed where left out.
    houses: regression predicts the price."""
    log_target: bool = False
    """Regression: learn the logarithm of the target, as suits prices; predictions are in the target's own units."""
    numeric: str | list[str] = ""
    """csv: columns that are numbers, as '[age, weight]'; inferred and printed where left out."""
    categorical: str | list[str] = ""
    """csv: columns that are categories; inferred and printed where left out."""
    split_column: str = ""
    """csv: column of train, val and test."""
    group_column: str = ""
    """csv: rows with one value of this column never sit in two splits."""
    separator: str = ""
    """csv: sign between the cells; found where left out."""
    encoding: str = ""
    """csv: encoding of the text, as Python names it; found where left out."""
    image_root: str | None = None
    """csv: where relative image paths start; default the folder of the file."""
    skip_corrupt: bool = False
    """Leave out rows whose image is missing or unreadable, and list them, instead of stopping."""
    validation: OpenUnitInterval = 0.1
    """Share of the rows for validation, where the data set does not fix it."""
    test: OpenUnitInterval = 0.2
    """Share of the rows for the test, where the data set does not fix it."""
    image_size: PositiveInt | None = None
    """Side of the images; default 64, or their own size where they come as arrays (digits)."""
    augment: bool = False
    """Flip, rotate, scale and shift the training images at random."""
    folds: PositiveInt | None = None
    """Cross-validation: the test rows are one of so many folds, instead of a share."""
    fold: NonNegativeInt = 0
    """Which fold is the test, from 0."""

    method: str = "gaal"
    """What to train; the groups below list the methods that have options of their own."""
    image_encoder: str = "small"
    """Image encoder: small, features, resnet18, resnet50, timm:NAME, or your own MODULE:FACTORY. features is an MLP on
    histograms of gradients and colours, which are computed once: good where pictures are few."""
    pretrained: bool = False
    """Start a ResNet or a model of timm from pretrained weights."""
    table_encoder: str = "mlp"
    """Table encoder of the image encoder's width: mlp, ft_transformer, or your own MODULE:FACTORY."""
    class_weights: Literal["none", "balanced"] = "none"
    """Classification: balanced lets all classes weigh alike, however many rows they have: in the loss, in that of the
    guides, and in the calibrated fusion."""
    fusion: Literal["mean", "product", "calibrated", "auto"] = "mean"
    """How the predictions become one: the mean of the logits, the product of experts (which knows the class
    frequencies), or weights fitted on the validation split; auto takes that of the least cross-validated loss there."""

    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    """Optimizer."""
    learning_rate: PositiveFloat = 3e-3
    """Learning rate at the start."""
    momentum: NonNegativeFloat = 0.9
    """Momentum of sgd."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay."""
    schedule: Literal["none", "cosine", "step"] = "cosine"
    """Learning rate over the epochs: constant, down to 0 along a cosine, or a tenth after every step_size epochs."""
    step_size: PositiveInt = 10
    """Epochs between the steps of schedule step."""
    epochs: PositiveInt = 40
    """Most epochs; the best one on the validation rows is tested, see select. Methods that train in stages have more,
    see their options."""
    select: Literal["accuracy", "balanced_accuracy", "loss"] | None = None
    """What the tested epoch is best in on the validation rows; default accuracy, and the loss of labels and numbers.
    balanced_accuracy counts all classes alike."""
    patience: PositiveInt | None = None
    """Stop after so many epochs that are no better in it; default never."""
    batch_size: BatchSize = 64
    """Rows in a batch, on each device."""

    seed: NonNegativeInt = 0
    """Seed of the splits, the initial weights, the order of the rows and the augmentation."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is one."""
    devices: PositiveInt = 1
    """Devices of each machine, with one process each; where torchrun starts the processes, it decides. The batch is
    shared out: batch_size rows on each device."""
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Numeric precision, as Lightning names it."""
    workers: NonNegativeInt = 2
    """Processes that read images; 0 reads in the main process."""
    threads: PositiveInt | None = None
    """CPU threads of torch; default all cores."""

    out: str | None = None
    """Run folder; default runs/DATASET-METHOD-seedSEED, with the next number (-2, -3, ...) where that holds a run."""
    logger: str | list[str] = "none"
    """Log the metrics of every epoch in the run folder too: none, csv, tensorboard or wandb, or several as
    '[csv, tensorboard]'. wandb is offline unless you are logged in or WANDB_MODE says otherwise."""
    pictures: bool = True
    """Draw curves, confusion matrix and conflicts, and write the page report.html."""
    resume: bool = False
    """Continue an interrupted run in its folder; its options are read from there. Without --out the last of the
    numbered folders is taken."""

    settings: Any = None
    """The method's own options; None takes their defaults."""

    def configuration(self) -> dict[str, Any]:
        """Everything that decides what the run computes, by the option's name; not how it is carried out."""
        common = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _CARRYING_OUT}
        return common | {
            f"{self.method}.{name}": value for name, value in (vars(self.settings) if self.settings else {}).items()
        }

    @property
    def loggers(self) -> list[str]:
        """The names of `--logger`."""
        names = [self.logger] if isinstance(self.logger, str) else self.logger
        return [name for name in dict.fromkeys(names) if name != "none"]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.dataset}-{self.method}-seed{self.seed}")
