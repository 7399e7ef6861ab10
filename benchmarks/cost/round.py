"""What one round (an image turn and a table turn) costs, side by side in one run.

Prints the median time of each way to train a ResNet-18 with a table MLP and a shared head, as ratios to plain
alternation and to the order of work in the authors' released code, and what surgery adds to the encoders' work.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from tabular_image.models import TableMLP, image_encoder

from gaal_surgery import GradientAlignedAlternator, align, entropy, select_uncertain

MODALITIES = ("image", "table")


class Rounds:
    """The ways to train one round, all on the same batch and each on its own copy of the same model."""

    def __init__(self, batch: int, image_size: int, classes: int, columns: int, device: str) -> None:
        self.batch = {
            "image": torch.randn(batch, 3, image_size, image_size, device=device),
            "table": torch.randn(batch, columns, device=device),
        }
        self.target = torch.randint(classes, (batch,), device=device)
        image = image_encoder("resnet18", channels=3)
        self.encoders = nn.ModuleDict({"image": image, "table": TableMLP(columns, image.width)}).to(device)
        self.head = nn.Linear(image.width, classes).to(device)
        adam = torch.optim.Adam([*self.encoders.parameters(), *self.head.parameters()], lr=1e-3)
        self.optimizer = GradientAlignedAlternator(adam, shared=self.head)

    def features(self, modality: str) -> Tensor:
        """What the modality's encoder makes of the batch, (B, width)."""
        features: Tensor = self.encoders[modality](self.batch[modality])
        return features

    def joint(self) -> None:
        """One step of both encoders and the head on the sum of the losses: the floor of any training."""
        loss = sum(F.cross_entropy(self.head(self.features(m)), self.target) for m in MODALITIES)
        loss.backward()
        self.optimizer.base.step()
        self.optimizer.zero_grad()

    def plain(self) -> None:
        """Alternation without guides."""
        self._alternate(guidance=None)

    def fresh(self) -> None:
        """The guide's encoder runs again in every turn, without a graph."""
        self._alternate(guidance="fresh")

    def cached(self) -> None:
        """The guide is what the other modality's own turn computed."""
        self._alternate(guidance="cached")

    def _alternate(self, guidance: str | None) -> None:
        for turn in self.optimizer.turns(*MODALITIES):
            features = self.features(turn.modality)
            F.cross_entropy(self.head(features), self.target).backward()
            if guidance == "fresh":
                for guide in turn.guides:
                    with torch.no_grad():
                        self.optimizer.guide(guide, self.features(guide), self.target)
            self.optimizer.step()
            if guidance == "cached":
                self.optimizer.guide(turn.modality, features, self.target)
            self.optimizer.zero_grad()
        if guidance is None:
            assert not self.optimizer.stats.guides

    def authors(self) -> None:
        """The order of work of the released code: guidance goes back through the other encoder and is discarded.

        Both encoders run forward and backward in both turns; the projection is done on the CPU in float64 (by the
        closed form that equals the code's quadratic program, so the solver's own time is left out).
        """
        head = list(self.head.parameters())
        for modality, other in (MODALITIES, MODALITIES[::-1]):
            logits, guide_logits = self.head(self.features(modality)), self.head(self.features(other))
            hardest = select_uncertain(entropy(guide_logits.detach()), 0.5)
            F.cross_entropy(guide_logits[hardest], self.target[hardest]).backward()
            guide = [parameter.grad.cpu().double() for parameter in head]
            self.optimizer.zero_grad()
            F.cross_entropy(logits, self.target).backward()
            aligned = align([parameter.grad.cpu().double() for parameter in head], [guide])
            for parameter, gradient in zip(head, aligned, strict=True):
                parameter.grad.copy_(gradient)
            self.optimizer.base.step()
            self.optimizer.zero_grad()

    def encoders_alone(self) -> None:
        """Forward and backward of both encoders, once each: the work that surgery is measured against."""
        for modality in MODALITIES:
            features = self.features(modality)
            features.backward(torch.ones_like(features))
        self.optimizer.zero_grad()

    def surgery_alone(self) -> float:
        """Seconds that both turns' steps take longer with a guide than without one."""
        extra = 0.0
        features = {modality: self.features(modality).detach() for modality in MODALITIES}
        for turn in self.optimizer.turns(*MODALITIES):
            for sign in (-1, 1):
                F.cross_entropy(self.head(features[turn.modality]), self.target).backward()
                if sign > 0:
                    self.optimizer.guide(turn.guides[0], features[turn.guides[0]], self.target)
                extra += sign * _seconds(self.optimizer.step, self.target.device)
                self.optimizer.zero_grad()
        # Nothing recorded here may guide what is measured next.
        for modality in MODALITIES:
            self.optimizer.guide(modality, features[modality][:0], self.target[:0])
        return extra


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def main(
    batch: int = 32,
    image_size: int = 64,
    classes: int = 286,
    columns: int = 63,
    repeats: int = 15,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Time one round of every way to train, interleaved.

    Args:
        batch: rows in a batch.
        image_size: side of the images in pixels.
        classes: width of the head (the paper's DVM has 286 classes).
        columns: width of the table (the paper's DVM has 63).
        repeats: rounds measured of each way, after three that are not.
        threads: CPU threads.
        device: where to train.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ways = ("joint", "plain", "fresh", "cached", "authors", "encoders_alone")
    rounds = {way: Rounds(batch, image_size, classes, columns, device) for way in (*ways, "surgery_alone")}
    seconds: dict[str, list[float]] = {way: [] for way in rounds}
    for repeat in range(repeats + 3):
        for way, training in rounds.items():
            training.optimizer.zero_grad()
            if way == "surgery_alone":
                taken = training.surgery_alone()
            else:
                taken = _seconds(getattr(training, way), training.target.device)
            if repeat >= 3:
                seconds[way].append(taken)
    print(
        f"ResNet-18, {image_size} px, batch {batch}, {classes} classes, {threads} thread(s), {device}, torch", end=" "
    )
    print(f"{torch.__version__}: median of {repeats} interleaved rounds\n")
    print(f"{'round':<16}{'ms':>9}{'least':>9}{'most':>9}{'/ plain':>10}{'/ authors':>11}")
    median = {way: statistics.median(values) for way, values in seconds.items()}
    for way, values in seconds.items():
        print(
            f"{way:<16}{1e3 * median[way]:>9.1f}{1e3 * min(values):>9.1f}{1e3 * max(values):>9.1f}"
            f"{median[way] / median['plain']:>10.3f}{median[way] / median['authors']:>11.3f}"
        )
    print(f"\nfresh / authors' order of work:    {median['fresh'] / median['authors']:.3f}")
    print(f"cached / authors' order of work:   {median['cached'] / median['authors']:.3f}")
    print(f"surgery / the encoders' own work:  {median['surgery_alone'] / median['encoders_alone']:.4f}")


if __name__ == "__main__":
    auto_cli(main)
