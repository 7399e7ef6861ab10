"""GAAL with Hugging Face Accelerate: `python examples/trainers/with_accelerate.py --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from jsonargparse import auto_cli
from torch.utils.data import DataLoader
from trainers.problem import MODALITIES, Model, accuracy, fresh_features, rows

from gaal_surgery import GradientAlignedAlternator, HalfSpace


def main(
    epochs: int = 20,
    guidance: Literal["fresh", "cached"] = "fresh",
    margin: float = 0.0,
    batch: int = 50,
    accumulate: int = 1,
    max_norm: float = 1.0,
    save: Path | None = None,
    resume: Path | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    cpu: bool = False,
) -> Model:
    """Train, then print the test accuracy.

    Args:
        epochs: the number of epochs, including those before a resume.
        guidance: "fresh" runs a guide's encoder on this batch, "cached" keeps the features of the guide's last turn.
        margin: HalfSpace's relative margin, a cosine.
        batch: rows in a micro-batch of one process.
        accumulate: micro-batches in a step.
        max_norm: the norm to which gradients are clipped.
        save: a folder for `epoch_1`, `epoch_2`, ...
        resume: one of these folders.
        mixed_precision: Accelerator's; fp16 needs a GPU.
        cpu: run on the CPU, even where there is a GPU.
    """
    set_seed(0)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu,
        # A turn leaves the other encoders unused.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        gradient_accumulation_steps=accumulate,
        # The order depends on the epoch alone, so that a resumed run repeats the order.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )
    module = Model()
    sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    alternator = GradientAlignedAlternator(sgd, shared=module.head, rule=HalfSpace(margin, relative=True))
    loader = DataLoader(rows("train"), batch, shuffle=True)
    # The prepared optimizer has neither `turns` nor `guide`. The alternator has both, and shares the state.
    model, optimizer, loader = accelerator.prepare(module, alternator, loader)

    done = 0
    if resume:
        accelerator.load_state(resume)
        done = int(resume.name.removeprefix("epoch_"))
    for epoch in range(done, epochs):
        loader.set_epoch(epoch)
        # `accumulate` micro-batches at a time; an incomplete group at the end is dropped
        for group in zip(*[iter(loader)] * accumulate, strict=False):
            labels = torch.cat([inputs["labels"] for inputs in group])
            passes = [fresh_features(alternator, model, inputs) for inputs in group]
            for turn in alternator.turns(*MODALITIES):
                # DDP prepares its reduction in the last pass before backward.
                with accelerator.no_sync(model):
                    own = [features[turn.modality] for features in passes]
                for inputs, part in zip(group, own, strict=True):
                    with accelerator.accumulate(model):
                        accelerator.backward(F.cross_entropy(model(part), inputs["labels"]))
                for guide in turn.guides if guidance == "fresh" else ():
                    with accelerator.no_sync(model):
                        parts = [features[guide] for features in passes]
                    alternator.guide(guide, torch.cat(parts), labels)
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
                if guidance == "cached":
                    alternator.guide(turn.modality, torch.cat(own), labels)
        if save:
            accelerator.save_state(save / f"epoch_{epoch + 1}")
    accelerator.print(f"test accuracy {accuracy(module):.3f}")
    return module


if __name__ == "__main__":
    auto_cli(main)
