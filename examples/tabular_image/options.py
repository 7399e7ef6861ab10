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


# What `--help` shows together: each group by its first option.
GROUPS = {"Data": "dataset", "Model": "method", "Training": "optimizer", "Run": "seed"}


@dataclass(frozen=True)
class Options:
    """Options of a run. The first sentence on an option is its line in `--help`; `--help OPTION` has them all."""

    dataset: str = "digits"
    """Data set. digits comes with scikit-learn and needs no files."""
    data_root: str = "data"
    """Folder with one folder a data set. The folder of leaves100 is then data/leaves100."""
    table: Literal["texture", "margin", "shape"] | None = None
    """leaves100: kind of table. The default is texture."""
    path: str | None = None
    """csv: the file, as CSV and its kin, Excel or Parquet. The file has one row a sample."""
    image_column: str | list[str] = ""
    """csv: column of image paths. Several columns are written as '[front, back]'."""
    target_column: str | list[str] = ""
    """csv: column of what is predicted. The column holds classes, a number, or lists of labels. Several columns,
    written as '[cat, dog]', are labels. fashion: columns of its table. The default of fashion is articleType."""
    task: Literal["", "classification", "multilabel", "regression"] = ""
    """Kind of target. A class is one of several, and a row may have several labels. The kind is inferred and printed
    where left out. houses: regression predicts the price."""
    log_target: bool = False
    """Learn the logarithm of a number. The logarithm suits prices. Predictions are in the units of the target. Only
    --task regression has numbers."""
    numeric: str | list[str] = ""
    """csv: columns that are numbers, such as '[age, weight]'. The columns are inferred and printed where left out."""
    categorical: str | list[str] = ""
    """csv: columns that are categories. The columns are inferred and printed where left out."""
    split_column: str = ""
    """csv: column that says train, val or test."""
    group_column: str = ""
    """csv: rows with one value here stay in one split. The option names a column, such as the owner of a pet."""
    separator: str = ""
    """csv: sign between the cells. The sign is found where left out."""
    encoding: str = ""
    """csv: encoding of the text. The name is one of Python's, such as utf-8. The encoding is found where left out."""
    image_root: str | None = None
    """csv: folder where relative image paths start. The default is the folder of the file."""
    skip_corrupt: bool = False
    """Leave out unreadable images. Rows whose image is missing or unreadable are left out and listed. By default such a
    row stops the run."""
    validation: OpenUnitInterval = 0.1
    """Rows for validation. The share counts where the data set does not fix the rows."""
    test: OpenUnitInterval = 0.2
    """Rows for the test. The share counts where the data set does not fix the rows."""
    image_size: PositiveInt | None = None
    """Side of the images in pixels. The default is 64. Images that come as arrays, those of digits, keep their size."""
    augment: bool = False
    """Vary the training images. Images are flipped, rotated, scaled and shifted at random."""
    folds: PositiveInt | None = None
    """Folds of a cross-validation. The test rows are then one fold of so many, and --test does not count."""
    fold: NonNegativeInt = 0
    """Fold that is the test. Folds are counted from 0."""
    split_seed: NonNegativeInt | None = None
    """Seed of the splits. Runs with one --split_seed have the same test rows, whatever their --seed. The default is
    --seed. Test rows that the data set itself names stay the test."""

    method: str = "gaal"
    """Method to train."""
    image_encoder: str = "small"
    """small, features, resnet18, resnet50, timm:NAME or your own MODULE:FACTORY. features is an MLP on histograms of
    gradients and colours. The histograms are computed once. features is good where pictures are few."""
    pretrained: bool = False
    """Start from pretrained weights. ResNets and the models of timm have such weights."""
    table_encoder: str = "mlp"
    """mlp, ft_transformer or your own MODULE:FACTORY. The table encoder has the width of the image encoder."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes. balanced lets all classes weigh alike, however many rows each has. The weights count in
    the loss, in the loss of the guides, and in the calibrated fusion. Only classification has such weights."""
    fusion: Literal["mean", "product", "calibrated", "auto"] = "mean"
    """How predictions become one. mean is the mean of the logits. product is the product of experts, which knows the
    class frequencies. calibrated has weights that are fitted on the validation rows. auto takes the fusion with the
    least cross-validated loss on the validation rows."""

    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    """Optimizer."""
    learning_rate: PositiveFloat = 3e-3
    """Learning rate at the start. --lr is short for --learning_rate."""
    momentum: NonNegativeFloat = 0.9
    """Momentum of sgd."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay."""
    schedule: Literal["none", "cosine", "step"] = "cosine"
    """Rate schedule. none keeps the learning rate constant. cosine brings the learning rate down to 0 along a cosine.
    step takes a tenth of the learning rate after every --step_size epochs."""
    step_size: PositiveInt = 10
    """Epochs of a step. Only --schedule step has steps."""
    epochs: PositiveInt = 40
    """Most epochs. The best epoch on the validation rows is tested, see --select. Methods that train in stages have
    more epochs, see the options of the method."""
    select: Literal["accuracy", "balanced_accuracy", "loss"] | None = None
    """Measure that picks the epoch. The tested epoch is the best one by this measure on the validation rows. The
    default is accuracy for classes, and loss for labels and numbers. balanced_accuracy counts all classes alike."""
    patience: PositiveInt | None = None
    """Epochs without gain before the end. The measure of --select decides what a gain is. By default the training never
    ends early."""
    batch_size: BatchSize = 64
    """Rows in a batch. Each device has a batch of its own."""

    seed: NonNegativeInt = 0
    """Seed of what is random. The seed decides the splits (but see --split_seed), the initial weights, the order of the
    rows and the augmentation."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto takes CUDA where there is a GPU."""
    devices: PositiveInt = 1
    """Devices of a machine. Each device has one process. Where torchrun starts the processes, torchrun decides. The
    batch is shared out, --batch_size rows on each device."""
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Numeric precision. The names are those of Lightning."""
    workers: NonNegativeInt = 2
    """Reading processes. The processes read images. With 0 the main process reads."""
    threads: PositiveInt | None = None
    """CPU threads. The threads are those of torch. The default is all cores."""

    out: str | None = None
    """Run folder. The default is runs/DATASET-METHOD-seedSEED. Where that folder holds a run, the next number (-2, -3,
    ...) is appended."""
    logger: str | list[str] = "none"
    """Log: none, csv, tensorboard or wandb. The log has the metrics of every epoch, and goes into the run folder too.
    Several loggers are written as '[csv, tensorboard]'. wandb is offline unless you are logged in or WANDB_MODE says
    otherwise."""
    pictures: bool = True
    """Draw pictures and a page. The pictures show curves, confusion matrix and conflicts. The page is report.html."""
    resume: bool = False
    """Continue an interrupted run. The run lies in the folder --out, and its options are read from there. Without --out
    the last of the numbered folders is taken."""

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
