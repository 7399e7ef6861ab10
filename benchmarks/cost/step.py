"""Time and peak memory of one round, all ways to train side by side in one run.

A turn is one step in which a modality trains its encoder and the shared head. A round is one turn of every modality.
One modality has an image encoder, every other modality a table MLP, and all share a Linear head. The library's recipes
are compared with a joint step, plain alternation, the order of work in the authors' released code, and TorchJD's
aggregators on the head's gradients. One way adds a joint turn, as the pipeline's `gaal_joint` does. A second table has
the time that surgery adds to each turn.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import timing
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabular_image.commands import run_command
from tabular_image.models import TableMLP, image_encoder
from timing import RESULTS, Work
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, DualProj, PCGrad, UPGrad
from torchjd.autojac import backward, jac_to_grad

from gaal_surgery import FreshFeatures, GradientAlignedAlternator, align, entropy, select_uncertain

Guidance = Literal["fresh", "run anew", "cached"] | None
COLUMNS = 63  # width of the paper's largest table, DVM
_SIZE = "encoder, batch / classes / modalities"


@dataclass(frozen=True)
class Size:
    """The size of one problem."""

    encoder: str
    batch: int
    classes: int
    modalities: int


class Rounds:
    """The ways to train one round, all on one model, one batch and one Adam."""

    def __init__(self, size: Size, image_size: int, device: torch.device) -> None:
        image = image_encoder(size.encoder, channels=3)
        tables = {f"table{i}": TableMLP(COLUMNS, image.width) for i in range(1, size.modalities)}
        self.encoders = nn.ModuleDict({**tables, "image": image}).to(device)  # the costly one takes the last turn
        self.head = nn.Linear(image.width, size.classes, device=device)
        self.batch = {name: torch.randn(size.batch, COLUMNS, device=device) for name in tables}
        self.batch["image"] = torch.randn(size.batch, 3, image_size, image_size, device=device)
        self.target = torch.randint(size.classes, (size.batch,), device=device)
        self.joint_network = nn.Sequential(
            nn.Linear(size.modalities * image.width, image.width),
            nn.BatchNorm1d(image.width),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(image.width, image.width),
            nn.Linear(image.width, size.classes),
        ).to(device)
        self.trained = nn.ModuleList([self.encoders, self.head, self.joint_network])
        self.adam = torch.optim.Adam(self.trained.parameters(), lr=1e-4)

    def ways(self) -> dict[str, Work]:
        """The ways to train by name. Each way that has guides has an alternator of its own."""
        return {
            "joint": self.joint,
            "plain": partial(self.alternate, self._wrapper(), None),
            "fresh": partial(self.alternate, self._wrapper(), "fresh"),
            "fresh, run anew": partial(self.alternate, self._wrapper(), "run anew"),
            "fresh, joint turn": partial(self.alternate_with_joint_turn, self._wrapper()),
            "cached": partial(self.alternate, self._wrapper(), "cached"),
            "update, fresh": partial(self.alternate, self._wrapper(align="update"), "fresh"),
            "update, cached": partial(self.alternate, self._wrapper(align="update"), "cached"),
            **self._fused(),
            "authors": self.authors,
            "TorchJD PCGrad": partial(self.torchjd, PCGrad()),
            "TorchJD UPGrad": partial(self.torchjd, UPGrad()),
            "TorchJD DualProj": partial(self.torchjd, DualProj()),
        }

    def joint(self) -> None:
        """One step of all encoders and the head on the sum of the losses: the floor of any training."""
        torch.stack(self._losses()).sum().backward()
        self._step()

    def alternate(self, optimizer: GradientAlignedAlternator, guidance: Guidance) -> None:
        """Alternation. Guides come from shared passes (fresh), passes of their own (run anew) or own turns (cached)."""
        features = FreshFeatures(optimizer, self.encoders, self.batch)
        for turn in optimizer.turns(*self.encoders):
            own = features[turn.modality]
            F.cross_entropy(self.head(own), self.target).backward()
            for guide in turn.guides if guidance == "fresh" else ():
                optimizer.guide(guide, features[guide], self.target)
            for guide in turn.guides if guidance == "run anew" else ():
                with torch.no_grad():
                    optimizer.guide(guide, self._features(guide), self.target)
            optimizer.step()
            if guidance == "cached":
                optimizer.guide(turn.modality, own, self.target)
            optimizer.zero_grad()

    def alternate_with_joint_turn(self, optimizer: GradientAlignedAlternator) -> None:
        """Fresh guides, then the turn of a network on all features. This turn has a head of its own and no guides."""
        self.alternate(optimizer, "fresh")
        features = torch.cat([self._features(modality) for modality in self.encoders], dim=1)
        F.cross_entropy(self.joint_network(features), self.target).backward()
        self._step()

    def authors(self) -> None:
        """The order of work of the released code.

        Both encoders run forward and backward in a turn. The guide's gradient on the other encoder is discarded. The
        projection runs on the CPU in float64. A closed form replaces the released code's quadratic program, so that the
        solver's time is left out.
        """
        modalities = list(self.encoders)
        head = list(self.head.parameters())
        for modality, other in zip(modalities, [modalities[-1], *modalities[:-1]], strict=True):
            logits, guide_logits = self.head(self._features(modality)), self.head(self._features(other))
            hardest = select_uncertain(entropy(guide_logits.detach()), 0.5)
            F.cross_entropy(guide_logits[hardest], self.target[hardest]).backward()
            guide = [parameter.grad.cpu().double() for parameter in head]
            self.adam.zero_grad()
            F.cross_entropy(logits, self.target).backward()
            aligned = align([parameter.grad.cpu().double() for parameter in head], [guide])
            for parameter, gradient in zip(head, aligned, strict=True):
                parameter.grad.copy_(gradient)
            self._step()

    def torchjd(self, aggregator: Aggregator) -> None:
        """A joint step in which TorchJD aggregates the head's gradients, one for each modality's loss.

        TorchJD's `mtl_backward` is for a shared encoder with one head for each loss. Here the head is shared. The
        Jacobian of the losses is therefore taken on the head alone, and an ordinary backward pass gives the encoders'
        gradients.
        """
        losses = self._losses()
        backward(losses, inputs=self.head.parameters(), retain_graph=True)
        jac_to_grad(self.head.parameters(), aggregator)
        torch.stack(losses).sum().backward(inputs=list(self.encoders.parameters()))
        self._step()

    def parts(self) -> dict[str, Work]:
        """The parts of a round by name: encoders, plain turns, and the head's part of a turn, guided and unguided."""
        parts: dict[str, Work] = {}
        for modality in self.encoders:
            parts[f"{modality} encoder"] = partial(self.encoder, modality)
            parts[f"{modality} plain"] = partial(self.plain_turn, modality)
        features = [self._features(modality).detach() for modality in ("image", "table1")]
        parts["head"] = partial(self.head_turn, self._wrapper(), *features, guided=False)
        parts["guided head"] = partial(self.head_turn, self._wrapper(), *features, guided=True)
        return parts

    def encoder(self, modality: str) -> None:
        """The encoder alone, forward and backward."""
        features = self._features(modality)
        features.backward(torch.ones_like(features))
        self.adam.zero_grad()

    def plain_turn(self, modality: str) -> None:
        """A turn without a guide."""
        F.cross_entropy(self.head(self._features(modality)), self.target).backward()
        self._step()

    def head_turn(self, optimizer: GradientAlignedAlternator, own: Tensor, other: Tensor, guided: bool) -> None:
        """A turn of the head alone, on given features. The extra time with a guide is the time of surgery."""
        F.cross_entropy(self.head(own), self.target).backward()
        if guided:
            optimizer.guide("other", other, self.target)
        optimizer.step()
        optimizer.zero_grad()

    def _fused(self) -> dict[str, Work]:
        """Fresh guides with the Triton kernels, where there is a GPU."""
        if self.target.device.type != "cuda":
            return {}
        return {"fresh, fused": partial(self.alternate, self._wrapper(fused=True), "fresh")}

    def _wrapper(self, **options: Any) -> GradientAlignedAlternator:
        return GradientAlignedAlternator(self.adam, shared=self.head, **options)

    def _features(self, modality: str) -> Tensor:
        features: Tensor = self.encoders[modality](self.batch[modality])
        return features

    def _losses(self) -> list[Tensor]:
        return [F.cross_entropy(self.head(self._features(modality)), self.target) for modality in self.encoders]

    def _step(self) -> None:
        self.adam.step()
        self.adam.zero_grad()


def measure_ways(rounds: Rounds, device: torch.device, repeats: int) -> pd.DataFrame:
    """Time and memory of every way."""
    ways = rounds.ways()
    table = timing.summary(timing.interleaved(ways, device, repeats), "plain", "authors")
    table["peak_mib"] = [timing.peak_memory(work, device) / 2**20 for work in ways.values()]
    table["peak / plain"] = table["peak_mib"] / table.set_index("way")["peak_mib"]["plain"]
    return table


def measure_surgery(rounds: Rounds, device: torch.device, repeats: int) -> pd.DataFrame:
    """The time that surgery adds to the turn of each modality, and to the round."""
    ms = 1e3 * timing.interleaved(rounds.parts(), device, repeats)
    table = pd.DataFrame(
        {
            "encoder_ms": {modality: ms[f"{modality} encoder"].median() for modality in rounds.encoders},
            "plain_ms": {modality: ms[f"{modality} plain"].median() for modality in rounds.encoders},
            "surgery_ms": (ms["guided head"] - ms["head"]).median(),
        }
    )
    table.loc["round"] = table.sum()
    table["surgery / encoder"] = table["surgery_ms"] / table["encoder_ms"]
    table["surgery / plain"] = table["surgery_ms"] / table["plain_ms"]
    return table.rename_axis("turn").reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """Time and peak memory of every way, as ratios to plain alternation."""
    measures = {"/ plain": "time", "peak / plain": "peak memory"}
    long = _sized(table).melt(["way", _SIZE], list(measures), "measure", "ratio").replace({"measure": measures})
    return timing.dots(long, _SIZE, "measure", "ratio", "ratio to plain alternation")


def draw_surgery(table: pd.DataFrame) -> Figure:
    """The time that surgery adds to each turn."""
    shown = _sized(table).assign(measure="time of surgery")
    return timing.dots(shown, _SIZE, "measure", "surgery / plain", "ratio to the turn without a guide", way="turn")


def _sized(table: pd.DataFrame) -> pd.DataFrame:
    sizes = table["encoder"] + ", " + table[["batch", "classes", "modalities"]].astype(str).agg(" / ".join, axis=1)
    return table.assign(**{_SIZE: sizes})


def main(
    encoders: list[str] = ["small", "resnet18", "resnet50"],  # noqa: B006 - read only; the command line shows it
    batches: list[int] = [32, 64, 128, 256],  # noqa: B006
    classes: list[int] = [286, 10, 10_000],  # noqa: B006
    modalities: list[int] = [2, 3, 4, 5],  # noqa: B006
    image_size: int = 64,
    repeats: int = 15,
    threads: int = 1,
    device: str = "cpu",
    out: Path = RESULTS,
) -> None:
    """Measure rounds of every way, interleaved.

    The first value of --batches, --classes and --modalities is the standard size. One of the three varies at a time.

    Args:
        encoders: image encoders: "small", "resnet18", "resnet50".
        batches: rows in a batch.
        classes: widths of the head (the paper's DVM has 286 classes).
        modalities: numbers of modalities, at least 2: one image, and tables.
        image_size: side of the images in pixels.
        repeats: measured rounds of each way, after three rounds of warm-up.
        threads: CPU threads.
        device: device to train on, such as cpu or cuda.
        out: folder of the results.
    """
    where = timing.setup(device, threads)
    ways, surgery = [], []
    for encoder in encoders:
        standard = Size(encoder, batches[0], classes[0], modalities[0])
        varied = {"batch": batches, "classes": classes, "modalities": modalities}
        for size in dict.fromkeys(replace(standard, **{k: value}) for k, values in varied.items() for value in values):
            rounds = Rounds(size, image_size, where)
            ways.append(measure_ways(rounds, where, repeats).assign(**asdict(size)))
            surgery.append(measure_surgery(rounds, where, repeats).assign(**asdict(size)))
    table = pd.concat(ways, ignore_index=True)
    timing.write(table, draw(table), "step", out, where)
    table = pd.concat(surgery, ignore_index=True)
    timing.write(table, draw_surgery(table), "step-surgery", out, where)


if __name__ == "__main__":
    sys.exit(run_command(main, __file__, __doc__, example="--encoders '[small]' --repeats 5"))
