"""Parameters that FSDP2 has sharded over several processes; trivial where nothing is sharded.

Sharded parameters are DTensors. They are put together where the shared module runs for a guide. Everything else works
on the shards, and the Gramians of the shards add up. ``torch.distributed.tensor`` is imported only once a DTensor was
met: the import takes half a second, and whoever shards has imported the module already.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gaal_surgery.projection import Joined, gramian_of, join


class Shards:
    """How some parameters are sharded over ranks, to shard other tensors in the same way.

    Args:
        parameters: in the order of the lists of tensors below.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._layouts = [_layout(parameter) for parameter in parameters]
        self._sizes = [(parameter.shape, parameter.stride()) for parameter in parameters]
        self._trivial = not any(self._layouts)

    def own(self, tensors: list[Any]) -> list[Tensor]:
        """This rank's parts of sharded tensors, sharing their memory."""
        return [x.to_local() if layout else x for x, layout in zip(tensors, self._layouts, strict=True)]

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's parts of whole tensors, sharded as the parameters are; no communication."""
        if self._trivial:
            return tensors
        from torch.distributed.tensor import DTensor, Replicate

        parts: list[Any] = list(tensors)
        for i, layout in enumerate(self._layouts):
            if layout is not None:
                mesh, placements = layout
                whole = DTensor.from_local(tensors[i], mesh, [Replicate()] * len(placements), run_check=False)
                parts[i] = whole.redistribute(placements=placements)
        return self.own(parts)

    def whole(self, parts: list[Tensor]) -> list[Tensor]:
        """Whole tensors from the parts that the ranks hold; one collective for each sharded tensor."""
        if self._trivial:
            return parts
        from torch.distributed.tensor import DTensor

        tensors = list(parts)
        for i, (layout, (shape, stride)) in enumerate(zip(self._layouts, self._sizes, strict=True)):
            if layout is not None:
                tensor = DTensor.from_local(parts[i], *layout, run_check=False, shape=shape, stride=stride)
                tensors[i] = tensor.full_tensor()
        return tensors

    def gramian(self, rows: list[list[Tensor]], joined: Joined) -> Tensor:
        """The Gramian of whole gradients, from the parts that the ranks hold."""
        if self._trivial:
            return gramian_of(joined)
        from torch.distributed.tensor import DTensor, Partial, Replicate

        total: Any = 0
        for layout in dict.fromkeys(self._layouts):
            its = [i for i, other in enumerate(self._layouts) if other == layout]
            products: Any = gramian_of(join([[row[i] for i in its] for row in rows], joined.fused))
            if layout is not None:
                mesh, placements = layout
                partial = [Partial() if placement.is_shard() else Replicate() for placement in placements]
                products = DTensor.from_local(products, mesh, partial).full_tensor()
            total = total + products
        return torch.as_tensor(total)


def put_together(shared: nn.Module) -> None:
    """Put whole parameters in the place of sharded ones, and take FSDP's hooks off; the caller restores both."""
    tables = [(module._parameters, name, x) for module in shared.modules() for name, x in module._parameters.items()]
    sharded = [(table, name, x) for table, name, x in tables if x is not None and _layout(x)]
    whole: dict[Any, nn.Parameter] = {}  # a tied parameter stays one
    for table, name, x in sharded:
        if x not in whole:
            gathered: Any = x.detach()
            whole[x] = nn.Parameter(gathered.full_tensor(), requires_grad=x.requires_grad)
        table[name] = whole[x]
    for module in shared.modules() if sharded else ():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                # FSDP's hooks would gather the parameters again, and replace the whole parameters.
                if hook.__module__.startswith("torch.distributed.fsdp"):
                    del hooks[key]


def _layout(tensor: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The mesh and the placements of a DTensor; None for another tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if hasattr(tensor, "placements") else None
