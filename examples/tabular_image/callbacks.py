"""What the Trainer does around the epochs: seeds them, tabulates them, stops early, and says when to save."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from .files import replacing

BEST, LAST = "best", "last"


def callbacks(folder: Path, seed: int, patience: int | None) -> list[Callback]:
    """All callbacks of a run that saves into `folder`."""
    saving: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": True}
    stopping = [ResumableEarlyStopping("val_accuracy", mode="max", patience=patience)] if patience else []
    return [
        TQDMProgressBar(),
        EpochSeed(seed),
        EpochTable(folder / "metrics.csv"),
        *stopping,
        MovableCheckpoint(filename=BEST, monitor="val_selection", mode="max", **saving),
        MovableCheckpoint(filename=LAST, **saving),  # after the best one, whose state it keeps
    ]


class EpochSeed(Callback):
    """Seeds all generators by (seed, epoch), so that a resumed run draws what an uninterrupted one does.

    All ranks alike: a random selection of guiding samples must be the same on every rank.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the epoch."""
        state = np.random.SeedSequence([self.seed, trainer.current_epoch]).generate_state(1)
        L.seed_everything(int(state[0]), verbose=False)


class EpochTable(Callback):
    """One row of metrics for every epoch, written after each; a resumed run continues the checkpoint's table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and forget the losses of an earlier stage."""
        self._started = time.perf_counter()
        trainer.callback_metrics.clear()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch."""
        metrics = {name: round(value.item(), 6) for name, value in sorted(trainer.callback_metrics.items())}
        self.rows.append(
            {
                "epoch": trainer.current_epoch,
                **metrics,
                "learning_rate": trainer.optimizers[pl_module.stage_index].param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - self._started, 3),
            }
        )
        if not trainer.is_global_zero:
            return
        with replacing(self.path) as temporary:
            self.table().to_csv(temporary, index=False)

    def table(self) -> pd.DataFrame:
        """The rows so far."""
        return pd.DataFrame(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of a checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping in the last stage that has not forgotten, after a resume, that it had already stopped the run."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check where the epoch may be tested."""
        if pl_module.selecting:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check where the epoch may be tested."""
        if pl_module.selecting:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop again before the first epoch."""
        trainer.should_stop = trainer.should_stop or self.stopping_reason != EarlyStoppingReason.NOT_STOPPED


class MovableCheckpoint(ModelCheckpoint):
    """A checkpoint callback that still knows its best score when its folder was moved before a resume."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state with the paths of today."""
        old, new = state_dict["dirpath"], str(self.dirpath)
        state = {
            name: value.replace(old, new) if isinstance(value, str) else value for name, value in state_dict.items()
        }
        state["best_k_models"] = {path.replace(old, new): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state)
