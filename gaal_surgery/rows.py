"""Several processes: one batch's rows, spread over the ranks that share the batch, and sums over these ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from gaal_surgery.projection import common_dtype
from gaal_surgery.rounds import Turn


class Plan(NamedTuple):
    """What a rank is about to do in a step, for comparison with the other ranks.

    Attributes:
        turn: whose turn it is; None outside a round.
        rows: by guide, how many rows this rank has; None where this rank recorded no guide.
        stepping: the parameters of the shared module that have a gradient.
    """

    turn: Turn | None
    rows: dict[str, int | None]
    stepping: tuple[str, ...]


def several(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group whose ranks share every batch; None takes the default group. Returns None for a single process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return None
    return group or dist.group.WORLD


class SharedRows:
    """The batches of guides, whose rows lie on several ranks.

    The hosts exchange their plans first. Each host then knows the shapes of all messages without waiting for a device.

    Args:
        group: the ranks that share every batch.
        plan: this rank's plan.

    Attributes:
        counts: by guide, how many rows each rank has. A guide without rows on any rank is left out.

    Raises:
        RuntimeError: the ranks are in different turns, only some ranks recorded a guide, or the ranks have gradients
            for different parameters. All ranks raise the same sentence.
    """

    def __init__(self, group: dist.ProcessGroup, plan: Plan) -> None:
        self.group = group
        plans: list[Plan] = [plan] * dist.get_world_size(group)
        dist.all_gather_object(plans, plan, group=_host_group(group))
        _check_agreement(plans)
        counts = {name: [its.rows[name] or 0 for its in plans] for name in plan.rows}
        self.counts = {name: rows for name, rows in counts.items() if sum(rows) > 0}

    def gather(self, *tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The rows of all ranks, in order, for mappings by guide of ``(rows of this rank, ...)``; one collective."""
        own = [(name, tensor) for mapping in tensors for name, tensor in mapping.items()]
        packed = [_padded_bytes(tensor, max(self.counts[name])) for name, tensor in own]
        message = torch.cat(packed)
        everyone = message.new_empty(dist.get_world_size(self.group), len(message))
        dist.all_gather(list(everyone.unbind()), message, group=self.group)
        columns = torch.split(everyone, [len(column) for column in packed], dim=1)
        gathered = iter(
            torch.cat([_from_bytes(part, tensor, count) for part, count in zip(column, self.counts[name], strict=True)])
            for (name, tensor), column in zip(own, columns, strict=True)
        )
        return [{name: next(gathered) for name in mapping} for mapping in tensors]

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a guide's tensor that holds the rows of all ranks."""
        return torch.split(tensor, self.counts[name])[dist.get_rank(self.group)]

    def sum(self, gradients: list[list[Tensor]]) -> list[list[Tensor]]:
        """The sum of each gradient over the ranks, equal to the bit on every rank; one collective."""
        tensors = [tensor for gradient in gradients for tensor in gradient]
        flat = torch.cat([tensor.flatten().to(common_dtype(tensors)) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True)
        summed = iter([part.view_as(tensor).to(tensor.dtype) for tensor, part in parts])
        return [[next(summed) for _ in gradient] for gradient in gradients]


def _check_agreement(plans: list[Plan]) -> None:
    if len({(plan.turn, *plan.rows) for plan in plans}) > 1:
        at = "; ".join(f"rank {rank}: {p.turn or 'no turn'}, guides {[*p.rows]}" for rank, p in enumerate(plans))
        raise RuntimeError(f"ranks are in different turns ({at}): call turns, guide and step alike on every rank")
    for name in plans[0].rows:
        without = [rank for rank, plan in enumerate(plans) if plan.rows[name] is None]
        if 0 < len(without) < len(plans):
            remedy = "call guide on every rank; a rank without rows passes features[:0] and target[:0]"
            raise RuntimeError(f"guide {name!r} is missing on ranks {without} and recorded on the others: {remedy}")
    if len({plan.stepping for plan in plans}) > 1:
        counts = [len(plan.stepping) for plan in plans]
        remedy = "call backward on every rank; a rank without rows calls it on shared(features[:0]).sum()"
        raise RuntimeError(f"ranks have gradients for {counts} parameters of shared, rank by rank: {remedy}")


_HOST_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group itself if it has a CPU backend, else a gloo group of the same ranks, made once."""
    if "cpu" not in dist.get_backend_config(group) and group not in _HOST_GROUPS:
        host = dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
        _HOST_GROUPS[group] = cast(dist.ProcessGroup, host)
    return _HOST_GROUPS.get(group, group)


def _padded_bytes(tensor: Tensor, rows: int) -> Tensor:
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded.flatten().view(torch.uint8)


def _from_bytes(packed: Tensor, like: Tensor, rows: int) -> Tensor:
    # Copy, since a slice of bytes may start at an address that this dtype does not allow.
    return packed.clone().view(like.dtype).view(-1, *like.shape[1:])[:rows]
