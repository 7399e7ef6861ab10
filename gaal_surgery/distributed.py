"""Several processes: rows and sums over all ranks that share a batch, and parameters that are sharded over ranks.

Parameters that FSDP2 has sharded are DTensors. They are put together where the shared module is run for a guide;
everything else works on the shards, and their Gramians add up. `torch.distributed.tensor` is imported where a DTensor
was met: it takes half a second, which whoever shards has spent already.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gaal_surgery.projection import gramian

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def several(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group whose ranks share every batch, the default group for None; None where this process is alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return None
    return group or dist.group.WORLD


def share_rows(group: ProcessGroup, label: str, rows: Mapping[str, int | None]) -> SharedRows:
    """Tells every rank how many rows of each guide the others have: 8 bytes a guide and 8 more, between hosts.

    Hosts must know the counts, as they give tensors their shapes; this way no device is waited for.

    Args:
        group: the ranks that share every batch.
        label: what this rank is at, which must be the same on all.
        rows: this rank's rows by guide, the same guides on all ranks; None where it recorded no guide.

    Raises:
        RuntimeError: the ranks are in different turns, or only some of them recorded a guide. All ranks raise.
    """
    counts = [-1 if count is None else count for count in rows.values()]
    message = torch.tensor([zlib.crc32(f"{label} {tuple(rows)}".encode()), *counts], device="cpu")
    everyone = _all_gather(message, _host_group(group)).tolist()
    if len({theirs[0] for theirs in everyone}) > 1:
        raise RuntimeError(
            f"ranks are in different turns; rank {dist.get_rank(group)} is at {label}, guides {tuple(rows)}: call "
            "turns, guide and step in the same order on every rank"
        )
    by_rank = {name: [theirs[1 + position] for theirs in everyone] for position, name in enumerate(rows)}
    for name, theirs in by_rank.items():
        without = [rank for rank, count in enumerate(theirs) if count < 0]
        if without and len(without) < len(theirs):
            raise RuntimeError(
                f"guide {name!r} is missing on ranks {without} and recorded on the others: call guide on every rank, "
                "with an empty batch (features[:0], target[:0]) where it has no rows"
            )
    return SharedRows(group, {name: theirs for name, theirs in by_rank.items() if sum(theirs) > 0})


class SharedRows:
    """The batches of guides whose rows lie on several ranks.

    Attributes:
        counts: by guide, the rows of every rank; guides that no rank has rows of are left out.
    """

    def __init__(self, group: ProcessGroup, counts: dict[str, list[int]]) -> None:
        self.group = group
        self.counts = counts

    def gather(self, *tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Mappings by guide of ``(rows of this rank, ...)``, with the rows of all ranks in order; one collective."""
        own = [(name, tensor) for mapping in tensors for name, tensor in mapping.items()]
        packed = [_padded_bytes(tensor, max(self.counts[name])) for name, tensor in own]
        columns = torch.split(_all_gather(torch.cat(packed), self.group), [len(column) for column in packed], dim=1)
        gathered = iter(
            torch.cat([_from_bytes(part, tensor, count) for part, count in zip(column, self.counts[name], strict=True)])
            for (name, tensor), column in zip(own, columns, strict=True)
        )
        return [{name: next(gathered) for name in mapping} for mapping in tensors]

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows of a guide's tensor with the rows of all ranks."""
        return torch.split(tensor, self.counts[name])[dist.get_rank(self.group)]

    def sum(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The sum over ranks of each gradient, the same to the bit on every rank; one collective."""
        tensors = [tensor for gradient in gradients for tensor in gradient.values()]
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        flat = torch.cat([tensor.flatten().to(dtype) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True)
        summed = iter([part.view_as(tensor).to(tensor.dtype) for tensor, part in parts])
        return [{name: next(summed) for name in gradient} for gradient in gradients]


def _all_gather(own: Tensor, group: ProcessGroup) -> Tensor:
    """``(ranks, n)`` of everyone's ``(n,)``."""
    everyone = own.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather(list(everyone.unbind()), own, group=group)
    return everyone


_HOST_GROUPS: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()


def _host_group(group: ProcessGroup) -> ProcessGroup:
    """The group itself where it speaks between hosts too, else one of the same ranks that does, made once."""
    if "cpu" in dist.get_backend_config(group):
        return group
    if group not in _HOST_GROUPS:
        ranks = dist.get_process_group_ranks(group)
        host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _HOST_GROUPS[group] = cast("ProcessGroup", host)
    return _HOST_GROUPS[group]


def _padded_bytes(tensor: Tensor, rows: int) -> Tensor:
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded.flatten().view(torch.uint8)


def _from_bytes(packed: Tensor, like: Tensor, rows: int) -> Tensor:
    # A copy, since a slice of bytes may start where no number of this dtype can.
    return packed.clone().view(like.dtype).view(-1, *like.shape[1:])[:rows]


# Sharded parameters.


class _Layout(NamedTuple):
    """Where the shards of a DTensor lie."""

    mesh: Any
    placements: tuple[Any, ...]


def _layout(tensor: Tensor) -> _Layout | None:
    if not hasattr(tensor, "placements"):
        return None
    sharded = cast("DTensor", tensor)
    return _Layout(sharded.device_mesh, tuple(sharded.placements))


def shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return cast("DTensor", tensor).to_local() if _layout(tensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as the parameter is; no communication."""
    layout = _layout(parameter)
    if layout is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, layout.mesh, layout.placements, src_data_rank=None).to_local()


def gramian_of_shards(gradients: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, Tensor]) -> Tensor:
    """The :func:`gramian` of gradients of which this rank holds the parts that it holds of the parameters."""
    by_layout: dict[_Layout | None, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        by_layout[_layout(parameter)].append(name)
    parts = []
    for layout, names in by_layout.items():
        products = gramian([{name: gradient[name] for name in names} for gradient in gradients])
        parts.append(products if layout is None else _sum_over_shards(products, layout))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def _sum_over_shards(products: Tensor, layout: _Layout) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = [Partial() if placement.is_shard() else Replicate() for placement in layout.placements]
    return DTensor.from_local(products, layout.mesh, partial).full_tensor()


@contextmanager
def unsharded(shared: nn.Module) -> Iterator[None]:
    """Whole parameters in place of sharded ones, and none of FSDP's hooks; afterwards everything is as it was."""
    replaced = [
        (module, name, parameter)
        for module in shared.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and _layout(parameter)
    ]
    hooks = [
        (table, dict(table))
        for module in (shared.modules() if replaced else ())
        for table in (module._forward_pre_hooks, module._forward_hooks)
    ]
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    try:
        for module, name, parameter in replaced:
            if parameter not in whole:
                gathered = cast("DTensor", parameter.detach()).full_tensor()
                whole[parameter] = nn.Parameter(gathered, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[parameter]
        for table, saved in hooks:
            for key, hook in saved.items():
                # They would gather the parameters once more, and put them in the place of ours.
                if hook.__module__.startswith("torch.distributed.fsdp"):
                    del table[key]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
        for table, saved in hooks:
            table.clear()
            table.update(saved)
