"""GAAL with Lightning Fabric: `python examples/trainers/with_fabric.py --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch.utils.data import DataLoader, DistributedSampler
from trainers.problem import MODALITIES, Model, accuracy, fresh_features, rows

from gaal_surgery import GradientAlignedAlternator, HalfSpace


def main(
    epochs: int = 20,
    guidance: Literal["fresh", "cached"] = "fresh",
    margin: float = 0.0,
    batch: int = 50,
    max_norm: float = 1.0,
    checkpoint: Path | None = None,
    **options: Any,
) -> Model:
    """Train, then print the test accuracy.

    Args:
        epochs: the number of epochs, including those before a resume.
        guidance: "fresh" runs a guide's encoder on this batch, "cached" keeps the features of the guide's last turn.
        margin: HalfSpace's relative margin, a cosine.
        batch: rows in a step of one process.
        max_norm: the norm to which gradients are clipped.
        checkpoint: a file. An existing file is resumed; the file is written at the end.
        options: options of Fabric.
    """
    fabric = L.Fabric(**options)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    module = Model()
    sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    optimizer = GradientAlignedAlternator(sgd, shared=module.head, rule=HalfSpace(margin, relative=True))
    model, optimizer = fabric.setup(module, optimizer)
    # The order depends on the epoch alone, so that a resumed run repeats the order.
    dataset = rows("train")
    sampler = DistributedSampler(dataset, fabric.world_size, fabric.global_rank)
    # Fabric does not set up the loader: Fabric's loaders start from epoch 0 when a run is resumed.
    loader = DataLoader(dataset, batch, sampler=sampler)

    # The precision holds the scale of 16-mixed, which Fabric does not save by itself.
    state = {"model": model, "optimizer": optimizer, "precision": fabric.strategy.precision}
    done = 0
    if checkpoint and checkpoint.exists():
        done = fabric.load(checkpoint, state)["epochs"]
    for epoch in range(done, epochs):
        sampler.set_epoch(epoch)
        for inputs in map(fabric.to_device, loader):
            features = fresh_features(optimizer, model, inputs)
            for turn in optimizer.turns(*MODALITIES):
                own = features[turn.modality]
                fabric.backward(F.cross_entropy(model(own), inputs["labels"]))
                if guidance == "fresh":
                    for guide in turn.guides:
                        optimizer.guide(guide, features[guide], inputs["labels"])
                # Under 16-mixed this unscales first. The scaler handles an overflow, so clipping must not raise.
                fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
                optimizer.step()
                optimizer.zero_grad()
                if guidance == "cached":
                    optimizer.guide(turn.modality, own, inputs["labels"])
    if checkpoint:
        fabric.save(checkpoint, {**state, "epochs": epochs})
    if fabric.is_global_zero:
        print(f"test accuracy {accuracy(module):.3f}")
    return module


if __name__ == "__main__":
    auto_cli(main)
