"""Who steps when: the optimizer wrapper that alternates modalities and aligns the shared module's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gaal_surgery.distributed import SharedRows, gramian_of_shards, several, shard, shard_like, share_rows, unsharded
from gaal_surgery.guidance import Evidence, Uncertainty, check_fraction, check_max_norm, entropy, uncertain_gradients
from gaal_surgery.per_sample import LossFn, check_lengths, trainable
from gaal_surgery.projection import Rule, combine_into, weigh
from gaal_surgery.stats import AlignmentStats
from gaal_surgery.surgery import HalfSpace, keeps_current

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STATE_KEY = "gaal_surgery"
_ATTRIBUTES = (
    *("base", "shared", "loss_fn", "fraction", "uncertainty", "rule", "align", "guides", "max_norm"),
    *("process_group", "_round"),
)


@dataclass(frozen=True)
class Turn:
    """One modality's turn: ``modality`` trains, ``guides`` are the modalities whose guides its step respects."""

    modality: str
    guides: tuple[str, ...]


@dataclass(frozen=True)
class _Guide:
    """The latest evidence of one modality: features and target of its batch, and the turn they were recorded in."""

    features: Tensor
    target: Tensor
    recorded: int


@dataclass
class _Round:
    """All that changes from turn to turn, in one object: trainers wrap the optimizer in shells that share it."""

    turn: Turn | None = None
    turns_begun: int = 0
    guides: dict[str, _Guide] = field(default_factory=dict)
    stats: AlignmentStats = field(default_factory=AlignmentStats)


class GradientAlignedAlternator(Optimizer):
    """Wraps any torch optimizer for alternating multimodal learning with gradient surgery on a shared module (GAAL).

    Modalities take turns: each trains its own encoder and the shared module on its own loss. In a step,

    1. the shared module's gradient g is what ``backward`` left in ``.grad``;
    2. for each guide of the turn the shared module is run on the recorded features with its current weights, the most
       uncertain samples are selected (Eqs. 6-7), and their mean gradient is the guide gradient g_p (Eq. 8);
    3. the rule turns the Gramian of g and the guides into weights, and their sum replaces g (Eqs. 3-5): one inner
       product over the whole shared module, not one for each parameter;
    4. the wrapped optimizer steps.

    With ``align="update"`` the wrapped optimizer steps first, and the change it made to the shared module takes the
    place of g: the guarantee then holds for the step really taken, momentum, preconditioning and weight decay
    included. Without a live guide, ``step`` is the wrapped optimizer's step, bit for bit.

    Everything an optimizer has (``param_groups``, ``state``, ``defaults``) is the wrapped optimizer's own, live. Step
    hooks registered globally fire for both.

    Args:
        optimizer: any built torch optimizer that does not evaluate a closure several times.
        shared: the module called on features to give logits; its trainable parameters must be in ``optimizer``.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced, for the guides.
        fraction: lambda of the paper, the share of uncertain samples in (0, 1], or a mapping of it by modality.
        uncertainty: ``logits -> (B,)``, higher is harder.
        rule: Gramian -> weights; see :class:`HalfSpace`, :class:`DualFloor`, :class:`Orthogonal`.
        align: "gradient" (the paper) or "update".
        guides: "previous" (the paper: the modality before this one in the round, cyclically) or "others" (all others).
        max_norm: clip each selected sample's gradient to this norm before the mean; None does not clip.
        process_group: the ranks that share every batch; None takes the default group where ``torch.distributed`` is
            initialised. Samples are then selected among the rows of all ranks, which take the same turns and record the
            same guides; ``uncertainty``, ``loss_fn`` and ``rule`` must give the same on all of them.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: an argument is outside its range, ``optimizer`` needs a closure, or it does not hold ``shared``.
    """

    # The scaler unscales what it finds in param_groups and calls step; a fused inner optimizer must not claim more.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        shared: nn.Module,
        *,
        loss_fn: LossFn = F.cross_entropy,
        fraction: float | Mapping[str, float] = 0.5,
        uncertainty: Uncertainty = entropy,
        rule: Rule = HalfSpace(),
        align: Literal["gradient", "update"] = "gradient",
        guides: Literal["previous", "others"] = "previous",
        max_norm: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        _check_optimizer(optimizer)
        _check_shared(shared, optimizer)
        for share in fraction.values() if isinstance(fraction, Mapping) else [fraction]:
            check_fraction(share)
        check_max_norm(max_norm)
        for name, function in {"loss_fn": loss_fn, "uncertainty": uncertainty, "rule": rule}.items():
            if not callable(function):
                raise TypeError(f"{name} must be callable, not {type(function).__name__}")
        if align not in ("gradient", "update"):
            raise ValueError(f"align must be 'gradient' or 'update', not {align!r}")
        if guides not in ("previous", "others"):
            raise ValueError(f"guides must be 'previous' or 'others', not {guides!r}")
        if align == "update" and any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("align='update' takes updates for descent: use align='gradient' where maximize=True")
        if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
            raise TypeError(
                f"process_group must be a process group that this rank is in, or None, not {process_group!r}"
            )
        self.base = optimizer
        self.shared = shared
        self.loss_fn = loss_fn
        self.fraction = fraction
        self.uncertainty = uncertainty
        self.rule = rule
        self.align = align
        self.guides = guides
        self.max_norm = max_norm
        self.process_group = process_group
        self._round = _Round()
        # Optimizer.__init__ would overwrite the wrapped optimizer's groups and state; this makes its hooks alone.
        self.__setstate__({})

    # What an optimizer has is the wrapped one's: read live, written through.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of all parameters to None; guides stay.

        With ``set_to_none=False`` idle encoders keep moving under momentum and weight decay.
        """
        self.base.zero_grad(set_to_none=set_to_none)

    # Alternation.

    @property
    def stats(self) -> AlignmentStats:
        """Statistics of the last step."""
        return self._round.stats

    def turns(self, *modalities: str) -> Iterator[Turn]:
        """One round: a turn for every modality, in order.

        Raises:
            TypeError: a modality is not a string.
            ValueError: no modality, or one twice.
        """
        if not all(isinstance(modality, str) for modality in modalities):
            raise TypeError(f"modalities must be strings, not {modalities}")
        if not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(f"modalities must be one or more different names, not {modalities}")
        return self._turns(modalities)

    def _turns(self, modalities: tuple[str, ...]) -> Iterator[Turn]:
        current, turn = self._round, None
        try:
            for position, modality in enumerate(modalities):
                others = modalities[position + 1 :] + modalities[:position]
                current.turn = turn = Turn(modality, others if self.guides == "others" else others[-1:])
                current.turns_begun += 1
                oldest = current.turns_begun - len(modalities) + 1
                current.guides = {name: guide for name, guide in current.guides.items() if guide.recorded >= oldest}
                yield turn
        finally:
            # An abandoned round may end late, when the next one has begun.
            if current.turn is turn:
                current.turn = None

    def guide(self, modality: str, features: Tensor, target: Tensor) -> None:
        """Record a modality's batch as its guide, in place of an earlier one.

        The features are detached and kept; the shared module is run on them when a step needs them. A guide serves
        the turn it is recorded in and the next n - 1 turns of a round of n modalities, or the next step outside
        ``turns``. With micro-batches the last one recorded counts. An empty batch is no guide; with several processes
        it says that this rank has no rows of it.

        Args:
            modality: whose batch it is.
            features: ``(B, ...)``, what ``shared`` is called on.
            target: ``(B, ...)``, what ``loss_fn`` takes.

        Raises:
            TypeError: modality is not a string, or features or target is not a tensor.
            ValueError: they differ in length, or ``fraction`` has no entry for the modality.
        """
        if not isinstance(modality, str):
            raise TypeError(f"modality must be a string, not {type(modality).__name__}")
        if not isinstance(features, Tensor) or not isinstance(target, Tensor):
            raise TypeError(
                f"features and target must be tensors, not {type(features).__name__} and {type(target).__name__}"
            )
        check_lengths(features, target)
        self._fraction_of(modality)
        current = self._round
        current.guides.pop(modality, None)
        if len(features) or several(self.process_group):
            current.guides[modality] = _Guide(features.detach(), target.detach(), current.turns_begun)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Align the shared module's step with the live guides of the turn, and step the wrapped optimizer.

        Args:
            closure: evaluates the loss and its gradients, once, before anything else; it may record guides.

        Returns:
            What the closure returned, if there is one.

        Raises:
            ValueError: the shared module cannot take a guide's features. No parameter has changed then.
            RuntimeError: the ranks of several processes are in different turns, only some of them recorded a guide, or
                FSDP has left the shared module unsharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        guides, rows = self._live_guides()
        parameters = self._stepping(guides)
        if not parameters:
            self._round.stats = AlignmentStats()
            self.base.step()
            return loss
        with unsharded(self.shared):
            whole = uncertain_gradients(
                self.shared,
                guides,
                self.loss_fn,
                uncertainty=self.uncertainty,
                max_norm=self.max_norm,
                rows=rows,
            )
        guide_gradients = [
            {name: shard_like(gradient[name], parameter) for name, parameter in parameters.items()}
            for gradient in whole
        ]
        if self.align == "gradient":
            gradient = {name: shard(_dense_gradient(name, parameter)) for name, parameter in parameters.items()}
            weights = self._weigh(parameters, guides, [gradient, *guide_gradients])
            # In place: gradients may be views into a trainer's buckets.
            combine_into(gradient, [gradient, *guide_gradients], weights, first_is_one=keeps_current(self.rule))
            self.base.step()
        else:
            current = {name: shard(parameter) for name, parameter in parameters.items()}
            before = {name: tensor.clone() for name, tensor in current.items()}
            self.base.step()
            descent = {name: before[name] - tensor for name, tensor in current.items()}
            weights = self._weigh(parameters, guides, [descent, *guide_gradients])
            # The aligned descent ends at before - sum(w v), which is now + (1 - w_0) descent - the guides' part.
            change = torch.cat([torch.ones_like(weights[:1]), 1 - weights[:1], -weights[1:]])
            combine_into(current, [current, descent, *guide_gradients], change, first_is_one=True)
        return loss

    def _live_guides(self) -> tuple[dict[str, Evidence], SharedRows | None]:
        """The guides of this step and, with several processes, how their rows lie on the ranks."""
        current = self._round
        names = tuple(current.guides) if current.turn is None else current.turn.guides
        live = {name: current.guides[name] for name in names if name in current.guides}
        group, rows = several(self.process_group), None
        if group is None:
            # A checkpoint of several processes may hold a guide that had no rows on its rank.
            live = {name: guide for name, guide in live.items() if len(guide.features)}
        elif names:
            counts = {name: len(live[name].features) if name in live else None for name in names}
            rows = share_rows(group, f"a turn of {current.turn.modality}" if current.turn else "no turn", counts)
            live = {name: live[name] for name in rows.counts}
        evidence = {
            name: Evidence(guide.features, guide.target, self._fraction_of(name)) for name, guide in live.items()
        }
        return evidence, rows

    def _stepping(self, guides: Mapping[str, Evidence]) -> dict[str, nn.Parameter]:
        """The shared module's parameters that have a gradient, where a guide asks for them."""
        if not guides:
            return {}
        parameters = trainable(self.shared)
        stepping = {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}
        if not stepping and _foreign(parameters, self.param_groups):
            raise RuntimeError(
                f"shared ({type(self.shared).__name__}) has other parameters than the optimizer at step time: give "
                "fully_shard reshard_after_forward=True, or call reshard() on the module before step"
            )
        return stepping

    def _weigh(
        self,
        parameters: Mapping[str, Tensor],
        guides: Mapping[str, Evidence],
        gradients: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """The rule's weights; leaves the statistics, and uses up guides outside ``turns``."""
        products = gramian_of_shards(gradients, parameters)
        weights = weigh(products, self.rule)
        turn = self._round.turn
        self._round.stats = AlignmentStats(turn.modality if turn else None, tuple(guides), products, weights)
        if turn is None:
            self._round.guides.clear()
        return weights

    def _fraction_of(self, modality: str) -> float:
        if not isinstance(self.fraction, Mapping):
            return self.fraction
        if modality not in self.fraction:
            raise ValueError(f"fraction has no entry for {modality!r}, only for {tuple(self.fraction)}: add one")
        return self.fraction[modality]

    # Checkpoints and copies.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state with the live guides under a key of their own, in builtin types and tensors.

        The wrapped optimizer loads it too, and ignores that key.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        current = self._round
        guides = {
            name: {"features": guide.features, "target": guide.target, "recorded": guide.recorded}
            for name, guide in current.guides.items()
        }
        state_dict = {**self.base.state_dict(), _STATE_KEY: {"turns_begun": current.turns_begun, "guides": guides}}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a checkpoint of the bare wrapped optimizer (then without guides).

        Raises:
            ValueError: the entry of the guides is not one that :meth:`state_dict` gives. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        # Read before the wrapped optimizer loads: a foreign entry must not leave a half-loaded optimizer behind.
        turns_begun, guides = self._read(state_dict.pop(_STATE_KEY, {"turns_begun": 0, "guides": {}}))
        self.base.load_state_dict(state_dict)
        current = self._round
        current.turn, current.stats = None, AlignmentStats()
        current.turns_begun, current.guides = turns_begun, guides
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _read(self, entry: Any) -> tuple[int, dict[str, _Guide]]:
        device = next(self.shared.parameters()).device
        try:
            return int(entry["turns_begun"]), {
                name: _Guide(guide["features"].to(device), guide["target"].to(device), int(guide["recorded"]))
                for name, guide in entry["guides"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state_dict[{_STATE_KEY!r}] is not what state_dict() gives: {error!r}") from error

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers put a bound `step` on the instance, which neither pickles nor belongs to a copy.
        return {name: getattr(self, name) for name in _ATTRIBUTES}

    def __repr__(self) -> str:
        settings = (
            f"shared={type(self.shared).__name__}, rule={self.rule}, align={self.align!r}, guides={self.guides!r}"
        )
        return f"{type(self).__name__}({settings})\n{self.base!r}"


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a built torch.optim.Optimizer, not {type(optimizer).__name__}")
    closure = signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is Parameter.empty
    # Sharpness-aware optimizers call their closure optional, but step twice; all ports name the second half alike.
    needs_closure |= hasattr(optimizer, "second_step")
    if needs_closure or isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"optimizer must not be {type(optimizer).__name__}, which evaluates a closure several times in a step: "
            "use a first-order optimizer such as SGD or AdamW"
        )


def _check_shared(shared: nn.Module, optimizer: Optimizer) -> None:
    if not isinstance(shared, nn.Module):
        raise TypeError(f"shared must be an nn.Module, not {type(shared).__name__}")
    if not trainable(shared):
        raise ValueError(f"shared ({type(shared).__name__}) must have a trainable parameter: it is what takes turns")
    foreign = _foreign(trainable(shared), optimizer.param_groups)
    if foreign:
        raise ValueError(
            f"shared ({type(shared).__name__}) has parameters that optimizer does not hold: {', '.join(foreign)}; "
            "build the optimizer with them, or freeze them"
        )


def _foreign(parameters: Mapping[str, nn.Parameter], groups: Sequence[dict[str, Any]]) -> list[str]:
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return [name for name, parameter in parameters.items() if id(parameter) not in held]


def _dense_gradient(name: str, parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    if parameter.grad.layout is not torch.strided:
        raise ValueError(f"shared has a sparse gradient ({name}), which cannot be aligned: build it with sparse=False")
    return parameter.grad
