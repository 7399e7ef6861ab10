"""The cost of guides in several processes: rounds with guides beside plain DDP alternation, in one run.

A guide is the other modality's gradient on the shared head. A round is an image turn of a ResNet-18 and a table turn of
an MLP, with a shared head. The command starts gloo processes on this machine, each with a batch of its own. It prints
the median time of a round, and the ratio to the loop without guides, for four ways:

- plain: no guides.
- cached: the guide comes from the other modality's last turn.
- fresh: the guide comes from a forward pass that also serves the other modality's turn.
- run_anew: the guide comes from a forward pass of its own.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabular_image.commands import run_command
from tabular_image.models import TableMLP, image_encoder
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from gaal_surgery import FreshFeatures, GradientAlignedAlternator

MODALITIES = ("table", "image")  # the costly encoder takes the last turn
WARM_UP = 3


class Rounds:
    """Training of one model, in this process and its peers. Each process has one batch."""

    def __init__(self, batch: int, image_size: int, classes: int, columns: int) -> None:
        self.batch = {"image": torch.randn(batch, 3, image_size, image_size), "table": torch.randn(batch, columns)}
        self.target = torch.randint(classes, (batch,))
        image = image_encoder("resnet18", channels=3)
        self.encoders = nn.ModuleDict({"image": image, "table": TableMLP(columns, image.width)})
        head = nn.Linear(image.width, classes)
        self.parallel = {name: DistributedDataParallel(encoder) for name, encoder in self.encoders.items()}
        self.head = DistributedDataParallel(head)
        adam = torch.optim.Adam([*self.encoders.parameters(), *head.parameters()], lr=1e-3)
        self.optimizer = GradientAlignedAlternator(adam, shared=head)

    def plain(self) -> None:
        """Alternation without guides: the wrapped optimizer steps by itself."""
        for modality in MODALITIES:
            self._backward(modality)
            self.optimizer.base.step()
            self.optimizer.zero_grad()

    def cached(self) -> None:
        """The guide takes the features that the other modality's last turn computed."""
        for turn in self.optimizer.turns(*MODALITIES):
            features = self._backward(turn.modality)
            self.optimizer.step()
            self.optimizer.guide(turn.modality, features, self.target)
            self.optimizer.zero_grad()

    def fresh(self) -> None:
        """One pass through an encoder serves the encoder's guide and the encoder's turn."""
        features = FreshFeatures(self.optimizer, self.parallel, self.batch)
        for turn in self.optimizer.turns(*MODALITIES):
            F.cross_entropy(self.head(features[turn.modality]), self.target).backward()
            for guide in turn.guides:
                self.optimizer.guide(guide, features[guide], self.target)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def run_anew(self) -> None:
        """The guide's encoder runs again in every turn, without a graph."""
        for turn in self.optimizer.turns(*MODALITIES):
            self._backward(turn.modality)
            for guide in turn.guides:
                with torch.no_grad():
                    self.optimizer.guide(guide, self.encoders[guide](self.batch[guide]), self.target)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _backward(self, modality: str) -> Tensor:
        features: Tensor = self.parallel[modality](self.batch[modality])
        F.cross_entropy(self.head(features), self.target).backward()
        return features


def _measure(rank: int, store: Path, processes: int, repeats: int, size: dict[str, int]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    ways = {way: Rounds(**size) for way in ("plain", "cached", "fresh", "run_anew")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(WARM_UP + repeats):
        for way, rounds in ways.items():
            dist.barrier()
            start = time.perf_counter()
            getattr(rounds, way)()
            dist.barrier()
            if repeat >= WARM_UP:
                seconds[way].append(time.perf_counter() - start)
    if rank == 0:
        print(f"{'round':<10}{'ms':>9}{'least':>9}{'most':>9}{'/ plain':>10}")
        median = {way: statistics.median(values) for way, values in seconds.items()}
        for way, values in seconds.items():
            figures = (1e3 * median[way], 1e3 * min(values), 1e3 * max(values))
            print(
                f"{way:<10}"
                + "".join(f"{figure:>9.1f}" for figure in figures)
                + f"{median[way] / median['plain']:>10.3f}"
            )
    dist.destroy_process_group()


def main(
    processes: int = 2,
    batch: int = 32,
    image_size: int = 64,
    classes: int = 286,
    columns: int = 63,
    repeats: int = 20,
) -> None:
    """Time a round of every way, interleaved.

    Args:
        processes: number of processes, with one thread each.
        batch: rows in the batch of each process.
        image_size: side of the images in pixels.
        classes: width of the head (the paper's DVM has 286 classes).
        columns: width of the table (the paper's DVM has 63).
        repeats: measured rounds of each way, after three rounds of warm-up.
    """
    print(
        f"ResNet-18, {image_size} px, batch {batch} in each of {processes} gloo processes, {classes} classes, "
        f"torch {torch.__version__}: median of {repeats} interleaved rounds\n"
    )
    size = {"batch": batch, "image_size": image_size, "classes": classes, "columns": columns}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder) / "store", processes, repeats, size)
        start_processes(_measure, arguments, nprocs=processes, start_method="spawn")


if __name__ == "__main__":
    sys.exit(run_command(main, __file__, __doc__, example="--batch 8 --repeats 5"))
