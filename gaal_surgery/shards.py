"""Parameters that FSDP2 has cut over several processes; trivial where nothing is sharded.

Such parameters are DTensors. They are put together where the shared module is run for a guide. Everything else works on
the shards, and the Gramians of the shards add up. ``torch.distributed.tensor`` is imported where a DTensor was met: the
import takes half a second, which whoever shards has spent already.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gaal_surgery.projection import gramian_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class _Layout(NamedTuple):
    """Where the shards of a DTensor lie."""

    mesh: Any
    placements: tuple[Any, ...]


class Shards:
    """How some parameters are cut over ranks, to cut other tensors in the same way.

    Args:
        parameters: in the order that lists of tensors have below.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._layouts = [_layout(parameter) for parameter in parameters] if any(map(_is_sharded, parameters)) else []

    def own(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's parts of sharded tensors, sharing their memory."""
        return [cast("DTensor", x).to_local() if _is_sharded(x) else x for x in tensors] if self._layouts else tensors

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's parts of whole tensors, cut as the parameters are; no communication."""
        if not self._layouts:
            return tensors
        from torch.distributed.tensor import DTensor, Replicate

        def cut(tensor: Tensor, layout: _Layout | None) -> Tensor:
            if layout is None:
                return tensor
            whole = DTensor.from_local(tensor, layout.mesh, [Replicate()] * len(layout.placements), run_check=False)
            return whole.redistribute(placements=layout.placements).to_local()

        return [cut(tensor, layout) for tensor, layout in zip(tensors, self._layouts, strict=True)]

    def gramian(self, rows: list[list[Tensor]]) -> Tensor:
        """The Gramian of whole gradients, of which this rank holds the parts that it holds of the parameters."""
        if not self._layouts:
            return gramian_of(rows)
        parts = []
        for layout in dict.fromkeys(self._layouts):
            products = gramian_of(
                [[x for x, its in zip(row, self._layouts, strict=True) if its == layout] for row in rows]
            )
            parts.append(products if layout is None else _sum_over_shards(products, layout))
        return torch.stack(parts).sum(dim=0)


def put_together(shared: nn.Module) -> None:
    """Put whole parameters in the place of sharded ones, and take FSDP's hooks off; the caller restores both."""
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in shared.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not _is_sharded(parameter):
                continue
            if parameter not in whole:
                gathered = cast("DTensor", parameter.detach()).full_tensor()
                whole[parameter] = nn.Parameter(gathered, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[parameter]
    if not whole:
        return
    for module in shared.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                # They would gather the parameters once more, and put them in the place of ours.
                if hook.__module__.startswith("torch.distributed.fsdp"):
                    del table[key]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def _layout(tensor: Tensor) -> _Layout | None:
    if not _is_sharded(tensor):
        return None
    sharded = cast("DTensor", tensor)
    return _Layout(sharded.device_mesh, tuple(sharded.placements))


def _sum_over_shards(products: Tensor, layout: _Layout) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = [Partial() if placement.is_shard() else Replicate() for placement in layout.placements]
    return DTensor.from_local(products, layout.mesh, partial).full_tensor()
