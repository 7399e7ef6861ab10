"""GAAL in plain PyTorch on several processes: `torchrun --nproc-per-node 2 examples/trainers/with_torchrun.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from trainers.problem import MODALITIES, Model, accuracy, fresh_features, rows

from gaal_surgery import GradientAlignedAlternator, HalfSpace


def main(
    epochs: int = 20,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    guidance: Literal["fresh", "cached"] = "fresh",
    margin: float = 0.0,
    batch: int = 50,
    save: Path | None = None,
    resume: Path | None = None,
) -> Model:
    """Train, then print the test accuracy.

    Args:
        epochs: the number of epochs, including those before a resume.
        parallel: "ddp" replicates the model, "fsdp" shards it.
        guidance: "fresh" runs a guide's encoder on this batch, "cached" keeps the features of the guide's last turn.
        margin: HalfSpace's relative margin, a cosine.
        batch: rows in a batch of one process.
        save: a folder for `epoch_1`, `epoch_2`, ...; each rank writes its own part.
        resume: one of these folders. The number of processes may differ.
    """
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group()  # gloo for CPU tensors and, with GPUs, nccl for GPU tensors
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    module = Model().to(device)
    model: torch.nn.Module = module
    if parallel == "ddp":
        model = DistributedDataParallel(module, find_unused_parameters=True)  # a turn leaves the other encoder unused
    else:
        for part in (*module.encoders.values(), module.head, module):
            fully_shard(part, reshard_after_forward=True)  # else a guide's forward pass leaves a module whole
    sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    optimizer = GradientAlignedAlternator(sgd, shared=module.head, rule=HalfSpace(margin, relative=True))
    sampler = DistributedSampler(train := rows("train"), seed=0)
    loader = DataLoader(train, batch, sampler=sampler)

    done = 0
    if resume:
        weights, state = get_state_dict(module, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=resume)
        set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=state)
        done = int(resume.name.removeprefix("epoch_"))
    for epoch in range(done, epochs):
        sampler.set_epoch(epoch)
        for rows_of_rank in loader:
            inputs = {name: value.to(device) for name, value in rows_of_rank.items()}
            features = fresh_features(optimizer, model, inputs)
            for turn in optimizer.turns(*MODALITIES):
                own = features[turn.modality]
                F.cross_entropy(model(own), inputs["labels"]).backward()
                if guidance == "fresh":
                    for guide in turn.guides:
                        optimizer.guide(guide, features[guide], inputs["labels"])
                optimizer.step()
                optimizer.zero_grad()
                if guidance == "cached":
                    optimizer.guide(turn.modality, own, inputs["labels"])
        if save:
            weights, state = get_state_dict(module, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=save / f"epoch_{epoch + 1}")
    right = accuracy(module)  # on every rank, as a sharded model runs on all ranks at once
    if dist.get_rank() == 0:
        print(f"test accuracy {right:.3f}")
    if not joined:
        dist.destroy_process_group()
    return module


if __name__ == "__main__":
    auto_cli(main)
