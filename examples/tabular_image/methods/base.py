"""What all methods share: encoders, stages, optimizer and schedule, fusion, and validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from ..data.module import Batch, TabularImageData
from ..errors import DivergenceError, InputError
from ..models import image_encoder, table_encoder
from ..options import Options
from ..tasks import TASKS, Task, build_task
from .fusion import FUSIONS, fusion_losses
from .settings import MethodSettings

Logits = dict[str, Tensor]
ALL_TASKS = tuple(TASKS)

_CHECKED = 50  # steps between two checks of the losses on a GPU, because each check makes the host wait


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs of a training that share one optimizer and one schedule.

    Attributes:
        name: the method's name for the stage.
        epochs: the length of the stage.
        trained: the modules that learn in the stage. All other modules are frozen, in eval mode.
    """

    name: str
    epochs: int
    trained: Sequence[nn.Module]


class Method(L.LightningModule):
    """Base of all methods. A method adds its heads, `forward` and `training_step`.

    Optimization is manual, because methods differ in which modules step when. For one seed the encoders have equal
    initial weights in every method. A method may train in several stages, one after the other in one run. Only epochs
    of the last stage are tested.

    A *voice* is the prediction of one modality, or of a joint network. Voices are fused into one prediction.

    Args:
        data: the data; `channels`, `table_width` and `task` shape the networks.
        options: encoder, optimizer, schedule, fusion, and the method's own `settings`.

    Attributes:
        Settings: the dataclass of the method's own options. The method is registered with this class.
        tasks: the names of the tasks that the method can learn.
        several_processes: whether the method may train in several processes. The loss must then be a mean over the rows
            of a batch.
        settings: an instance of `Settings`.
        modalities: the modalities that have an encoder in `encoders`.
        voices: the names of the predictions that are fused.
        takes_image_alone: whether `forward` takes a batch without a table. Other methods get a table of zeros.
        encoders: an encoder by modality, each to (B, width).
        width: number of features that each encoder makes.
        task: the loss, and the meaning of a head's outputs.
        outputs: number of a head's columns, C: one for each class or label, two for a number.
        chosen: the position in `FUSIONS` of the fusion that `--fusion auto` chose.
    """

    Settings: ClassVar[type[Any]] = MethodSettings
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    several_processes: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("image", "table")
    voices: ClassVar[tuple[str, ...]] = ("image", "table")
    takes_image_alone: ClassVar[bool] = False
    chosen: Tensor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.options = options
        self.settings = self.Settings() if options.settings is None else options.settings
        self.task: Task = build_task(data.task, options.class_weights)
        self.outputs, self.table_width = self.task.outputs, data.table_width
        side = data.image_size if data.feature_scale is None else 1
        self.image_shape = (data.channels, side, side)
        pretrained = options.pretrained and "image" in self.modalities
        image = image_encoder(options.image_encoder, data.channels, pretrained, size=data.image_size)
        table = table_encoder(options.table_encoder, data.table_columns, data.table_width, image.width)
        encoders = {"image": image, "table": table}
        self.width: int = image.width
        self.encoders = nn.ModuleDict({modality: encoders[modality] for modality in self.modalities})
        self.register_buffer("chosen", torch.tensor(0))
        # Fitted to the validation rows, never trained by the optimizer.
        self.calibrated = self.task.calibrated(self.voices).requires_grad_(False)
        alone = {modality: self.task.calibrated([modality]) for modality in self.modalities}
        self.alone = nn.ModuleDict(alone).requires_grad_(False)
        self._validation: list[dict[str, Any]] = []
        self._unchecked: list[tuple[int, dict[str, Tensor]]] = []

    # For a method to write.

    def forward(self, batch: Batch) -> Logits:
        """Outputs (B, C) by the name of the prediction: "image", "table", and "fused" if the method has its own."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses and optimizer steps of one batch."""
        raise NotImplementedError

    def stages(self) -> list[Stage]:
        """The stages in order; by default one stage, in which everything learns."""
        return [Stage("training", self.options.epochs, self.trainable())]

    def begin_stage(self) -> None:
        """Called before the first batch of each stage. Keep results in buffers, so that a resumed run has them."""

    def build_optimizer(self, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        """The optimizer of the parameters of a stage's modules."""
        # Two modules may share a parameter, and an optimizer takes each parameter once.
        parameters = list({parameter: None for module in modules for parameter in module.parameters()})
        options = self.options
        settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        match options.optimizer:
            case "sgd":
                return torch.optim.SGD(parameters, momentum=options.momentum, **settings)
            case "adam":
                return torch.optim.Adam(parameters, **settings)
            case "adamw":
                return torch.optim.AdamW(parameters, **settings)

    # For a method to use.

    def trainable(self) -> list[nn.Module]:
        """All modules that the method may train."""
        return [module for module in self.children() if module not in (self.calibrated, self.alone, self.task)]

    @property
    def stage(self) -> Stage:
        """The stage of the Trainer's epoch."""
        return self.stages()[self.stage_index]

    @property
    def stage_index(self) -> int:
        """The number of the stage, from 0."""
        return sum(self.trainer.current_epoch >= end for end in self._ends()[:-1])

    @property
    def stage_epoch(self) -> int:
        """The epoch within the stage, from 0."""
        return self.trainer.current_epoch - (0, *self._ends())[self.stage_index]

    @property
    def total_epochs(self) -> int:
        """Epochs of all stages."""
        return self._ends()[-1]

    @property
    def finite(self) -> bool:
        """Whether all parameters are finite."""
        return all(parameter.isfinite().all() for parameter in self.parameters())

    @property
    def parameter_count(self) -> int:
        """How many numbers the stages train in all."""
        trained = {
            parameter for stage in self.stages() for module in stage.trained for parameter in module.parameters()
        }
        return sum(parameter.numel() for parameter in trained)

    @property
    def selecting(self) -> bool:
        """Whether the current epoch may be chosen for the test."""
        return self.stage_index == len(self.stages()) - 1

    @property
    def optimizer(self) -> Any:
        """The optimizer of the stage."""
        optimizers = self.optimizers()
        return optimizers[self.stage_index] if isinstance(optimizers, list) else optimizers

    def descend(self, loss: Tensor) -> None:
        """One plain optimizer step on a loss."""
        optimizer = self.optimizer
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def log_losses(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Log training losses by name, as means over the epoch.

        Raises:
            DivergenceError: A loss is not finite.
        """
        named = {f"train_loss_{name}": loss.detach() for name, loss in losses.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(batch["target"]))
        self._unchecked.append(
            (self.trainer.fit_loop.epoch_loop.batch_idx, {name: loss.detach() for name, loss in losses.items()})
        )
        if self.device.type == "cpu" or len(self._unchecked) >= _CHECKED:
            self._check_losses()

    def _check_losses(self) -> None:
        """Check the losses since the last check, all in one transfer from the device."""
        unchecked, self._unchecked = self._unchecked, []
        named = [(step, name, loss) for step, losses in unchecked for name, loss in losses.items()]
        if not named:
            return
        finite = torch.stack([loss.isfinite().all() for _, _, loss in named]).tolist()
        if not all(finite):
            step, name, loss = named[finite.index(False)]
            raise self.diverged(
                f"the training loss {name!r} is {loss.item()} in epoch {self.current_epoch}, batch {step}"
            )

    def diverged(self, what: str) -> DivergenceError:
        """The error that says `what` diverged, and the remedy."""
        options = self.options
        half = f", or --precision 32-true (now {options.precision})" if options.precision == "16-mixed" else ""
        return DivergenceError(
            f"{what}; start again with a lower --learning_rate (now {options.learning_rate:g}){half}"
        )

    # Predictions.

    def fusions(self, logits: Logits) -> Logits:
        """The three fusions (B, C) of the voices, by name; empty where the logits lack a voice."""
        return self.fused_by(self.calibrated, logits) if set(self.voices) <= logits.keys() else {}

    def fused_by(self, calibrated: nn.Module, logits: Logits) -> Logits:
        """The three fusions (B, C). Mean and calibrated sum take the voices that `calibrated` was made for."""
        voices = {voice: logits[voice] for voice in calibrated.modalities}
        unimodal = [logits[modality] for modality in ("image", "table")]
        return {
            "mean": self.task.mean(voices),
            "product": self.task.product(unimodal),
            "calibrated": calibrated(voices),
        }

    def fit_fusions(self, logits: Logits, target: Tensor) -> None:
        """Fit the calibrated fusions to validation rows. `--fusion auto` also chooses the best of the three fusions."""
        voices = {voice: logits[voice] for voice in self.voices}
        self.task.fit(self.calibrated, voices, target)
        if self.options.fusion in ("calibrated", "auto"):
            for modality, alone in self.alone.items():  # answers where the other modality is missing
                self.task.fit(alone, {modality: logits[modality]}, target)
        if self.options.fusion == "auto":
            losses = fusion_losses(self.task, self.fused_by(self.calibrated, logits), voices, target)
            self.chosen.fill_(FUSIONS.index(min(losses, key=lambda name: losses[name])))

    @property
    def fusion(self) -> str:
        """The name of the fusion that makes the prediction: `--fusion`, or the choice of `auto`."""
        return FUSIONS[int(self.chosen)] if self.options.fusion == "auto" else self.options.fusion

    def predictions(self, logits: Logits) -> Logits:
        """All predictions (B, C) by name. Epochs are selected by the first one."""
        fusions = self.fusions(logits)
        fused = {} if "fused" in logits or not fusions else {"fused": fusions[self.fusion]}
        predictions = fused | logits
        order = [name for name in ("fused", "image", "table", "joint") if name in predictions]
        return {name: predictions[name] for name in order}

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Any]:
        """Logits (B, C) by name, with the batch's targets and row numbers."""
        if "table" not in batch and not self.takes_image_alone:
            batch = batch | {"table": batch["image"].new_zeros(len(batch["row"]), self.table_width)}
        return {"logits": self._in_full(self(batch)), "target": batch["target"], "row": batch["row"]}

    def answer(self, batch: Batch) -> Tensor:
        """Outputs (B, C) of the prediction for rows that may lack "image" or "table".

        Where voices are fused, the voice that is left answers; this voice is calibrated where the fusion is calibrated.
        Otherwise zeros, which are the means of the training rows, replace the missing modality. A method that looks at
        one modality alone answers NaN where this modality is missing.
        """
        missing = {"image", "table"} - batch.keys()
        rows = len(batch["row"])
        shapes = {"image": self.image_shape, "table": (self.table_width,)}
        if not self.takes_image_alone:
            zeros = {name: torch.zeros(rows, *shapes[name], device=self.device, dtype=self.dtype) for name in missing}
            batch = batch | zeros
        logits = self._in_full(self(batch))
        predictions = self.predictions(logits)
        main = next(iter(predictions))
        left = [name for name in ("image", "table") if name not in missing]
        if main == "fused" and "fused" not in logits and len(left) == 1 and left[0] in logits:
            (voice,) = left
            return self.alone[voice]({voice: logits[voice]}) if self.fusion == "calibrated" else logits[voice]
        return predictions[main] * (torch.nan if main in missing else 1)

    def _in_full(self, outputs: Logits) -> Logits:
        """Leave mixed precision: metrics and the calibrated fusion work in the precision of the parameters."""
        return {name: values.to(self.dtype) for name, values in outputs.items()}

    # Validation.

    def on_validation_start(self) -> None:
        """Give all processes the buffers of the first one. Every next batch starts with these buffers anyway."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the batch's predictions for the end of the epoch."""
        if self.selecting:
            self._validation.append(self.predict_step(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Fit the calibrated fusion, and log the figures of the epoch.

        Logged are the loss and the figure of the first prediction, and the figure of each voice. The epoch with the
        greatest `val_selection` is tested. `--select` says what `val_selection` prefers: more right rows or a greater
        mean recall, and among equals a lower loss; or a lower loss alone.
        """
        self._check_losses()
        figure, selected = f"val_{self.task.figure}", f"val_{self.selected_by}"
        if not self.selecting:
            for name in {"val_loss", figure, selected, "val_selection"}:
                # Logged exactly as below, because Lightning refuses a metric that is logged in two ways.
                self.log(name, math.nan, prog_bar=name == figure)
            return
        outputs = collate(self._validation)
        self._validation.clear()
        logits, target = outputs["logits"], outputs["target"]
        for name, values in logits.items():
            if not values.isfinite().all():
                raise self.diverged(
                    f"the logits {name!r} of the validation rows are not finite in epoch {self.current_epoch}"
                )
        if self.fusions(logits):
            self.fit_fusions(logits, target)
        predictions = self.predictions(logits)
        main = next(iter(predictions.values()))
        loss = self.task.loss(main, target)
        if not loss.isfinite():
            raise self.diverged(f"the validation loss is {loss.item()} in epoch {self.current_epoch}")
        measured = {name: self.task.measure(values, target, brief=True) for name, values in predictions.items()}
        figures = {name: _number(each[self.task.figure]) for name, each in measured.items()}
        first = next(iter(measured.values()))
        self.log("val_loss", loss)
        self.log(figure, figures[next(iter(figures))], prog_bar=True)
        if selected not in ("val_loss", figure):
            self.log(selected, _number(first[self.selected_by]))
        self.log("val_selection", self._selection(first, loss, len(target)))
        self.log_dict({f"{figure}_{name}": value for name, value in figures.items() if name in self.voices})

    def _selection(self, figures: Mapping[str, float | None], loss: Tensor, rows: int) -> Tensor:
        match self.selected_by:
            case "accuracy":
                return round(_number(figures["accuracy"]) * rows) + 1 / (1 + loss)
            case "balanced_accuracy":  # one more right row adds 1 / C or more, and the loss adds less than 1 / C
                return _number(figures["balanced_accuracy"]) * rows + 1 / (1 + loss) / self.outputs
        return -loss

    @property
    def selected_by(self) -> str:
        """The measure that selects the tested epoch: `--select`, or the first measure of the task."""
        return self.options.select or self.task.selections[0]

    # Optimization, as the Trainer wants it.

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        """An optimizer and a schedule for each stage."""
        stages = self.stages()
        optimizers = [self.build_optimizer(stage.trained) for stage in stages]
        match self.options.schedule:
            case "cosine":
                epochs = [stage.epochs for stage in stages]
                return optimizers, [CosineAnnealingLR(*pair) for pair in zip(optimizers, epochs, strict=True)]
            case "step":
                return optimizers, [StepLR(optimizer, self.options.step_size) for optimizer in optimizers]
            case _:
                return optimizers, []

    def on_train_epoch_start(self) -> None:
        """Freeze what the stage does not train. In the first epoch of a stage, also call `begin_stage`."""
        self.eval().requires_grad_(False)
        for module in self.stage.trained:
            module.train().requires_grad_(True)
        if self.stage_epoch == 0:
            self.begin_stage()

    def on_train_epoch_end(self) -> None:
        """Step the stage's schedule: with manual optimization Lightning leaves this to the module."""
        configured = self.trainer.lr_scheduler_configs
        if configured:
            configured[self.stage_index].scheduler.step()

    def _ends(self) -> list[int]:
        """For each stage, the number of the first epoch after the stage."""
        return list(accumulate(stage.epochs for stage in self.stages()))


def _number(figure: float | None) -> float:
    return math.nan if figure is None else figure


def collate(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outputs of `predict_step` joined to N rows: logits (N, C) by name, target (N,) and row (N,).

    Raises:
        InputError: There are no outputs, because no picture could be read.
    """
    if not outputs:
        raise InputError(
            "every picture of one split failed to load; restore the picture files and continue with --resume true"
        )
    return {
        "logits": {name: torch.cat([output["logits"][name] for output in outputs]) for name in outputs[0]["logits"]},
        "target": torch.cat([output["target"] for output in outputs]),
        "row": torch.cat([output["row"] for output in outputs]),
    }
