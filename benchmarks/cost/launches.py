"""How many operators surgery starts on a device, eager and fused. Operators are counted on the meta device, untimed.

An operator counts once where it computes or writes numbers: a copy, a cast, a fill (zeros, ones, eye), a join, a
multi-tensor operator, a custom operator of one kernel. Views, allocations and operators that return no tensor do not
count. A device may start more than one kernel for an operator (a sort, a product of matrices cut into parts).
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from tabular_image.commands import run_command
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gaal_surgery import GradientAlignedAlternator, align

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
HEADS = {
    "Linear 2048x286": lambda: nn.Linear(2048, 286),
    "MLP 2048x512x286": lambda: nn.Sequential(nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 286)),
}


class Launches(TorchDispatchMode):
    """Counts, by name, the working operators inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        returns_tensors = any("Tensor" in str(value.type) for value in schema.returns)
        name = schema.name.removeprefix("aten::")
        if (returns_tensors or schema.is_mutable) and not func.is_view and name not in _ALLOCATIONS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def of_align(head: nn.Module, guides: int, **settings: Any) -> Counter[str]:
    """The operators that `align` starts for gradients of the head's shapes."""
    gradient, *others = ([torch.empty_like(x, device="meta") for x in head.parameters()] for _ in range(1 + guides))
    with Launches() as launches:
        align(gradient, others, **settings)
    return launches.counts


def of_step(head: nn.Module, guides: int, **settings: Any) -> Counter[str]:
    """The operators that a guided step of SGD starts beyond a step without guides. Half of 32 samples guide."""

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(32, 2048, device="meta"), torch.empty(32, dtype=torch.long, device="meta")

    def step(count: int) -> Counter[str]:
        optimizer = GradientAlignedAlternator(torch.optim.SGD(head.parameters(), lr=0.1), head, **settings)
        features, target = batch()
        F.cross_entropy(head(features), target).backward()
        for i in range(count):
            optimizer.guide(str(i), *batch())
        with Launches() as launches:
            optimizer.step()
        return launches.counts

    head = head.to("meta")
    guided, unguided = step(guides), step(0)
    guided.subtract(unguided)
    return guided


def main(guides: list[int] = [1, 3]) -> None:  # noqa: B006 - read only
    """Print the counts.

    Args:
        guides: numbers of guides.
    """
    rows = [
        {"head": name, "guides": count, "path": path}
        | {"align": of_align(build(), count, **settings).total()}
        | {"guided step": of_step(build(), count, **settings).total()}
        for name, build in HEADS.items()
        for count in guides
        for path, settings in {"eager": {}, "fused": {"fused": True}}.items()
    ]
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    sys.exit(run_command(main, __file__, __doc__, example="--guides '[1]'"))
