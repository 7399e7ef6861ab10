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

_CHECKED = 50  # steps between looks at the losses on a device, each of which makes the host wait


@dataclass(frozen=True)
class Stage:
    """Some epochs of a training, with an optimizer and a schedule of their own.

    Attributes:
        name: what the method calls it.
        epochs: its length.
        trained: what learns in it; all other modules are frozen, in eval mode.
    """

    name: str
    epochs: int
    trained: Sequence[nn.Module]


class Method(L.LightningModule):
    """Base of all methods; a method is its heads, `forward` and `training_step`.

    Optimization is manual, as methods differ in who steps when. The encoders of one seed start alike in every method.
    A method may train in several stages, one after the other in one run; only epochs of the last one are tested.

    Args:
        data: its `channels`, `table_width` and `task` shape the networks.
        options: encoder, optimizer, schedule, fusion, and the method's own `settings`.

    Attributes:
        Settings: the dataclass of the method's own options, with which it is registered.
        tasks: what the method can learn.
        several_processes: whether it may train in several, because its loss is a mean over the rows of a batch.
        settings: its instance.
        modalities: those that the method trains and predicts from.
        voices: the predictions that are fused.
        takes_image_alone: whether `forward` takes a batch without a table; others get a table of zeros.
        encoders: an encoder by modality, each to (B, width).
        width: features of each encoder.
        task: the loss, and what the outputs of a head mean.
        outputs: columns of a head, C: one a class or label, two of a number.
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
        # Fitted by themselves, never by the optimizer.
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
        """The stages in order; by default one, in which everything learns."""
        return [Stage("training", self.options.epochs, self.trainable())]

    def begin_stage(self) -> None:
        """Called before the first batch of each stage; what it computes must be kept in buffers, for a resume."""

    def build_optimizer(self, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        """The optimizer of the parameters of a stage's modules."""
        # A module may be shared: each parameter once.
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
        """Its number, from 0."""
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
        """Whether all parameters are."""
        return all(parameter.isfinite().all() for parameter in self.parameters())

    @property
    def parameter_count(self) -> int:
        """Numbers that some stage trains."""
        trained = {
            parameter for stage in self.stages() for module in stage.trained for parameter in module.parameters()
        }
        return sum(parameter.numel() for parameter in trained)

    @property
    def selecting(self) -> bool:
        """Whether an epoch now may be the one that is tested."""
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
        """Looks at the losses since the last look, all in one transfer from the device."""
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
        """The error that says so, with the remedy."""
        options = self.options
        half = f", or --precision 32-true (now {options.precision})" if options.precision == "16-mixed" else ""
        return DivergenceError(
            f"{what}; start again with a lower --learning_rate (now {options.learning_rate:g}){half}"
        )

    # Predictions.

    def fusions(self, logits: Logits) -> Logits:
        """The three fusions (B, C) of the voices, by name; none where the method does not predict from all of them."""
        return self.fused_by(self.calibrated, logits) if set(self.voices) <= logits.keys() else {}

    def fused_by(self, calibrated: nn.Module, logits: Logits) -> Logits:
        """The three fusions (B, C), the mean and the calibrated sum of the voices that `calibrated` has."""
        voices = {voice: logits[voice] for voice in calibrated.modalities}
        unimodal = [logits[modality] for modality in ("image", "table")]
        return {
            "mean": self.task.mean(voices),
            "product": self.task.product(unimodal),
            "calibrated": calibrated(voices),
        }

    def fit_fusions(self, logits: Logits, target: Tensor) -> None:
        """Fit the calibrated fusions to validation rows, and with `--fusion auto` choose the best of the three."""
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
        """The fusion that the prediction is made by: `--fusion`, or what `auto` chose."""
        return FUSIONS[int(self.chosen)] if self.options.fusion == "auto" else self.options.fusion

    def predictions(self, logits: Logits) -> Logits:
        """All predictions (B, C) by name; the first is the one to select epochs by."""
        fusions = self.fusions(logits)
        fused = {} if "fused" in logits or not fusions else {"fused": fusions[self.fusion]}
        predictions = fused | logits
        order = [name for name in ("fused", "image", "table", "joint") if name in predictions]
        return {name: predictions[name] for name in order}

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Any]:
        """Logits by name, with the batch's target and row."""
        if "table" not in batch and not self.takes_image_alone:
            batch = batch | {"table": batch["image"].new_zeros(len(batch["row"]), self.table_width)}
        return {"logits": self._in_full(self(batch)), "target": batch["target"], "row": batch["row"]}

    def answer(self, batch: Batch) -> Tensor:
        """Outputs (B, C) of the prediction for rows that may lack "image" or "table".

        Where voices are fused late, the voice that is left answers, calibrated if the fusion is. Otherwise zeros, the
        means of the training rows, stand for what is missing. NaN where the prediction looks at one modality, and that
        one is missing.
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
        """Out of mixed precision: metrics and the calibrated fusion work in the precision of the parameters."""
        return {name: values.to(self.dtype) for name, values in outputs.items()}

    # Validation.

    def on_validation_start(self) -> None:
        """Give all ranks the statistics of the first, with which they start their next batch anyway."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the batch's predictions for the end of the epoch."""
        if self.selecting:
            self._validation.append(self.predict_step(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Fit the calibrated fusion; log loss and figure of the selecting prediction, and the figure of each voice.

        `val_selection` is what the tested epoch has most of, by `--select`: rows that are right, or the mean recall,
        and between equals the lower loss; or the lower loss alone.
        """
        self._check_losses()
        figure, selected = f"val_{self.task.figure}", f"val_{self.selected_by}"
        if not self.selecting:
            for name in {"val_loss", figure, selected, "val_selection"}:
                # As below: Lightning takes no metric that is logged in two ways.
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
            case "balanced_accuracy":  # a row that is right adds 1 / C or more, and the loss less
                return _number(figures["balanced_accuracy"]) * rows + 1 / (1 + loss) / self.outputs
        return -loss

    @property
    def selected_by(self) -> str:
        """What the tested epoch is best in: `--select`, or what the task selects by."""
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
        """Freeze what the stage does not train, and open a stage that begins."""
        self.eval().requires_grad_(False)
        for module in self.stage.trained:
            module.train().requires_grad_(True)
        if self.stage_epoch == 0:
            self.begin_stage()

    def on_train_epoch_end(self) -> None:
        """Step the stage's schedule, which manual optimization leaves to the module."""
        configured = self.trainer.lr_scheduler_configs
        if configured:
            configured[self.stage_index].scheduler.step()

    def _ends(self) -> list[int]:
        """The epoch after each stage."""
        return list(accumulate(stage.epochs for stage in self.stages()))


def _number(figure: float | None) -> float:
    return math.nan if figure is None else figure


def collate(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outputs of `predict_step` for N rows in one: logits (N, C) by name, target (N,) and row (N,).

    Raises:
        InputError: There are none, as no picture could be read.
    """
    if not outputs:
        raise InputError("no picture of a whole split can be read; restore the files and go on with --resume true")
    return {
        "logits": {name: torch.cat([output["logits"][name] for output in outputs]) for name in outputs[0]["logits"]},
        "target": torch.cat([output["target"] for output in outputs]),
        "row": torch.cat([output["row"] for output in outputs]),
    }
