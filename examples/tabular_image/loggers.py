"""Lightning's loggers, which write logs for other programs into the run folder. A resumed run continues the logs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from .errors import border
from .files import resume_command
from .options import Options

PROJECT = "gaal_surgery"  # in Weights & Biases


def loggers(options: Options, finished: int) -> list[Logger]:
    """The loggers of a run, which have logged the options of the run.

    Args:
        options: The options of the run.
        finished: The number of epochs in the checkpoint that a resumed run continues.

    Raises:
        InputError: A log of the run to resume cannot be read, or a logger cannot start.
    """
    made: list[Logger] = []
    for name in options.loggers:
        with border("start", f"--logger {name}", f"correct the cause or leave {name} out of --logger"):
            match name:
                case "csv":
                    made.append(_csv(options.folder, finished))
                case "tensorboard":
                    # The epochs that a resumed run repeats have the same steps, and TensorBoard shows one of each.
                    made.append(TensorBoardLogger(options.folder, name=None, version="tensorboard"))
                case "wandb":
                    made.append(_wandb(options.folder))
            made[-1].log_hyperparams(options.configuration())
    return made


def _csv(folder: Path, finished: int) -> CSVLogger:
    """A table in `csv/metrics.csv`. Lightning deletes an older table, so its finished epochs are logged again."""
    logger = CSVLogger(folder, name=None, version="csv")
    path = Path(logger.log_dir) / "metrics.csv"
    if path.exists():
        with border("read", path, f"remove the file and go on with {resume_command(folder)}"):
            rows = pd.read_csv(path, dtype=str)  # the digits as they are
            rows = rows[rows["epoch"].astype(int) < finished]
            steps = rows.pop("step").astype(int)
        shutil.rmtree(path.parent)
        for step, (_, row) in zip(steps, rows.iterrows(), strict=True):
            logger.log_metrics(row.dropna().to_dict(), step)
        logger.save()
    return logger


def _wandb(folder: Path) -> WandbLogger:
    """A run of Weights & Biases in `wandb/`, with the id of an earlier log of the same run folder."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("offline" if wandb.api.api_key is None else "online")
    before = sorted(folder.glob("wandb/*run-*-*"))
    experiment = wandb.init(
        project=PROJECT,
        name=folder.name,
        dir=folder,
        id=before[-1].name.rsplit("-", 1)[-1] if before else None,
        mode=mode,
        resume="allow" if mode == "online" else None,  # offline runs of one identity become one when they are synced
        settings=wandb.Settings(silent=True, console="off"),
    )
    experiment.define_metric("*", step_metric="trainer/global_step")
    return FinishedWandbLogger(experiment=experiment)


class FinishedWandbLogger(WandbLogger):
    """Ends the run of Weights & Biases with the training, not with the process."""

    def finalize(self, status: str) -> None:
        """Write everything."""
        super().finalize(status)
        self.experiment.finish(exit_code=int(status != "success"))
