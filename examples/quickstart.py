"""GAAL in plain PyTorch, on scikit-learn's handwritten digits: half of each scan as an image, half as measurements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from tabular_image.data.digits import digits
from torch import Tensor, nn

from gaal_surgery import ConflictMonitor, FreshFeatures, GradientAlignedAlternator, fuse_logits

EPOCHS, BATCH, WIDTH = 60, 50, 64
MODALITIES = ("table", "image")  # the costly encoder takes the last turn, as it then runs once a round


def load() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """By split, the inputs by modality and the classes. The training rows standardise the table."""
    samples = digits()
    table = samples.table.to_numpy()
    scaler = StandardScaler().fit(table[samples.split == "train"])
    image = torch.tensor(samples.images).float().div(255).unsqueeze(1)
    inputs = {"image": image, "table": torch.tensor(scaler.transform(table)).float()}
    target = torch.tensor(samples.target.astype(int).tolist())
    rows = {split: torch.tensor((samples.split == split).to_numpy()) for split in ("train", "test")}
    return {split: ({m: x[chosen] for m, x in inputs.items()}, target[chosen]) for split, chosen in rows.items()}


def build(columns: int) -> nn.ModuleDict:
    """One encoder for each modality, and the head that the modalities share."""
    return nn.ModuleDict(
        {
            "image": nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, WIDTH),
            ),
            "table": nn.Sequential(nn.Linear(columns, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
            "head": nn.Linear(WIDTH, 10),
        }
    )  # fmt: skip


def main() -> None:
    """Train, then print the test accuracy of the table, the image and both."""
    torch.manual_seed(0)
    data = load()
    inputs, target = data["train"]
    model = build(columns=inputs["table"].shape[1])
    optimizer = GradientAlignedAlternator(torch.optim.AdamW(model.parameters(), lr=2e-3), shared=model["head"])
    monitor = ConflictMonitor()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(target)).split(BATCH):
            features = FreshFeatures(optimizer, model, {modality: inputs[modality][rows] for modality in MODALITIES})
            for turn in optimizer.turns(*MODALITIES):
                F.cross_entropy(model["head"](features[turn.modality]), target[rows]).backward()
                for guide in turn.guides:
                    optimizer.guide(guide, features[guide], target[rows])
                optimizer.step()
                optimizer.zero_grad()
                monitor.update(optimizer.stats)
    inputs, target = data["test"]
    with torch.no_grad():
        logits = {modality: model["head"](model[modality](inputs[modality])) for modality in MODALITIES}
    for name, prediction in {**logits, "fused": fuse_logits(logits)}.items():
        print(f"{name:<6} test accuracy {(prediction.argmax(dim=1) == target).float().mean():.3f}")
    for row in monitor.summary():
        print(f"{row['modality']}'s turn: in conflict with the {row['guide']} in {row['conflict']:.0%} of the steps")


if __name__ == "__main__":
    main()
