"""GAAL under Hugging Face's Trainer: `python examples/trainers/with_transformers.py --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn
from trainers.problem import MODALITIES, Model, accuracy, fresh_features, rows
from transformers import Trainer, TrainingArguments, set_seed

from gaal_surgery import GradientAlignedAlternator, HalfSpace


class AlternatingTrainer(Trainer):
    """One step of the Trainer is a round: the Trainer takes the step of the last turn, this class takes the others."""

    def __init__(self, *args: Any, guidance: str, margin: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guidance, self.margin = guidance, margin
        self.group: list[dict[str, Tensor]] = []

    def create_optimizer(self, model: nn.Module | None = None) -> GradientAlignedAlternator:
        """Keep the wrapper: what Accelerate makes of the wrapper has neither `turns` nor `guide`."""
        model = model or self.model
        sgd = torch.optim.SGD(model.parameters(), lr=self.args.learning_rate, momentum=0.9)
        rule = HalfSpace(self.margin, relative=True)
        self.optimizer = self.alternator = GradientAlignedAlternator(sgd, shared=model.head, rule=rule)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """A round of turns on the micro-batches of one step."""
        model.train()
        self.group.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:  # the turns need all micro-batches of the step
            return torch.zeros((), device=self.args.device)
        group, self.group = self.group, []
        labels = torch.cat([micro["labels"] for micro in group])
        passes = [fresh_features(self.alternator, model, micro) for micro in group]
        losses = []
        for turn in self.alternator.turns(*MODALITIES):
            own = [features[turn.modality] for features in passes]
            for micro, part in zip(group, own, strict=True):
                logits = model(part)
                loss = F.cross_entropy(logits, micro["labels"]) * (len(logits) / len(labels))
                self.accelerator.backward(loss)
                losses.append(loss.detach())
            if self.guidance == "fresh":
                for guide in turn.guides:
                    parts = [features[guide] for features in passes]
                    self.alternator.guide(guide, torch.cat(parts), labels)
            else:
                self.alternator.guide(turn.modality, torch.cat(own), labels)
            if turn.modality == MODALITIES[-1]:
                break  # leaves the turn open; the Trainer takes its step
            if self.args.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return torch.stack(losses).sum() / len(MODALITIES)


def main(
    epochs: int = 20,
    guidance: Literal["fresh", "cached"] = "fresh",
    margin: float = 0.0,
    batch: int = 50,
    resume: Path | None = None,
    **options: Any,
) -> Model:
    """Train, then print the test accuracy.

    Args:
        epochs: the number of epochs, including those before a resume.
        guidance: "fresh" runs a guide's encoder on this batch, "cached" keeps the features of the guide's last turn.
        margin: HalfSpace's relative margin, a cosine.
        batch: rows in a micro-batch of one process.
        resume: a `checkpoint-...` folder that the Trainer wrote.
        options: options of TrainingArguments.
    """
    set_seed(0)
    model = Model()
    arguments = TrainingArguments(
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        data_seed=0,
        ddp_find_unused_parameters=True,  # a turn leaves the other encoders unused
        remove_unused_columns=False,  # no column is an argument of forward
        report_to="none",
        **options,
    )
    trainer = AlternatingTrainer(model, arguments, train_dataset=rows("train"), guidance=guidance, margin=margin)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        print(f"test accuracy {accuracy(model):.3f}")
    return model


if __name__ == "__main__":
    auto_cli(main)
