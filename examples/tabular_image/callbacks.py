"""What the Trainer does around the epochs: seeds them, tabulates them, stops early, and says when to save."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from .checkpoints import BEST, LAST
from .files import writing
from .interrupts import interrupts


def callbacks(
    folder: Path, seed: int, patience: int | None, *, figure: str, selected_by: str, bar: bool
) -> list[Callback]:
    """All callbacks of a run that saves into `folder` and shows a progress bar, or else prints a line an epoch.

    Args:
        folder: the run folder.
        seed: the seed of the run.
        patience: the training stops after this many epochs without a better one; None never stops early.
        figure: the measure that lines show.
        selected_by: what patience looks at: a measure, or the loss.
        bar: show a bar.
    """
    saving: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": True}
    mode = "min" if selected_by == "loss" else "max"
    stopping = [ResumableEarlyStopping(f"val_{selected_by}", mode=mode, patience=patience)] if patience else []
    return [
        *([OneBar()] if bar else []),
        Interruptible(),
        EpochSeed(seed),
        EpochTable(folder / "metrics.csv", figure, lines=not bar),
        *stopping,
        MovableCheckpoint(filename=BEST, monitor="val_selection", mode="max", **saving),
        MovableCheckpoint(filename=LAST, **saving),  # after the best one, whose state it keeps
    ]


class OneBar(TQDMProgressBar):
    """One bar at a time: of the training, or of a prediction while the prediction lasts. Validation has no bar."""

    def init_validation_tqdm(self) -> Tqdm:
        """No bar."""
        return Tqdm(disable=True)

    def init_predict_tqdm(self) -> Tqdm:
        """A bar that vanishes."""
        bar = super().init_predict_tqdm()
        bar.leave = False
        return bar


class Interruptible(Callback):
    """Takes back SIGTERM: Lightning's handler broadcasts to other processes, which may be gone."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The training begins."""
        interrupts.catch_again()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A test begins."""
        interrupts.catch_again()


class EpochSeed(Callback):
    """Seeds all generators by (seed, epoch), so that a resumed run draws the numbers of an uninterrupted run.

    All ranks have the same seed: a random selection of guiding samples must be the same on every rank.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the epoch."""
        state = np.random.SeedSequence([self.seed, trainer.current_epoch]).generate_state(1)
        L.seed_everything(int(state[0]), verbose=False)


class EpochTable(Callback):
    """One row of metrics for every epoch, written after the epoch; a resumed run continues the checkpoint's table.

    Args:
        path: The file of the table.
        figure: The measure that a line shows.
        lines: Print a line after each epoch.
    """

    def __init__(self, path: Path, figure: str = "accuracy", *, lines: bool = False) -> None:
        self.path = path
        self.figure = figure
        self.lines = lines
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
        with writing(self.path) as temporary:
            self.table().to_csv(temporary, index=False)
        if self.lines:
            print(self._line(trainer.max_epochs), flush=True)

    def table(self) -> pd.DataFrame:
        """The rows so far."""
        return pd.DataFrame(self.rows)

    def _line(self, epochs: int) -> str:
        """The last row for a reader: losses, figures, seconds."""
        row = self.rows[-1]
        losses, figures = [
            ", ".join(
                f"{name.removeprefix(prefix).lstrip('_') or 'selected'} {value:.4f}"
                for name, value in row.items()
                if name.startswith(prefix) and math.isfinite(value)
            )
            for prefix in ("train_loss", f"val_{self.figure}")
        ]
        parts = [f"training loss: {losses}"]
        if math.isfinite(row["val_loss"]):
            parts += [
                f"validation loss: {row['val_loss']:.4f}",
                f"validation {self.figure.replace('_', ' ')}: {figures}",
            ]
        return "; ".join([f"epoch {row['epoch']}/{epochs - 1}", *parts, f"{row['seconds']:.1f} s"])

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of a checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping in the last stage. A run that was stopped early stops again after a resume."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the epoch, if the epoch may be tested."""
        if pl_module.selecting:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the epoch, if the epoch may be tested."""
        if pl_module.selecting:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop again before the first epoch."""
        trainer.should_stop = trainer.should_stop or self.stopping_reason != EarlyStoppingReason.NOT_STOPPED


class MovableCheckpoint(ModelCheckpoint):
    """A checkpoint callback that keeps its best score when the run folder is moved before a resume."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state with the current paths."""
        old, new = state_dict["dirpath"], str(self.dirpath)
        state = {
            name: value.replace(old, new) if isinstance(value, str) else value for name, value in state_dict.items()
        }
        state["best_k_models"] = {path.replace(old, new): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state)
