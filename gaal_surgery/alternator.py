"""GradientAlignedAlternator: an optimizer that alternates modalities and aligns the shared module's step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import Parameter, signature
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gaal_surgery.functional import LossFn, as_function, check_lengths, same_random_numbers, trainable
from gaal_surgery.guidance import (
    Uncertainty,
    check_settings,
    entropy,
    hurt_shares,
    select_uncertain,
    uncertain_gradients,
)
from gaal_surgery.projection import cancels, combine_into, fused_kernels, join
from gaal_surgery.rounds import Evidence, Round, Turn, Turns
from gaal_surgery.rows import Plan, SharedRows, several
from gaal_surgery.shards import Shards
from gaal_surgery.stats import AlignmentStats
from gaal_surgery.surgery import HalfSpace, Rule, check_function, weigh, widest

_STATE_KEY = "gaal_surgery"


def _of_base(name: str, doc: str) -> Any:
    """A property that reads and writes an attribute of the wrapped optimizer."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value), doc=doc)


class GradientAlignedAlternator(Optimizer):
    """Wraps any torch optimizer for alternating multimodal learning with gradient surgery on a shared module (GAAL).

    The modalities take turns. In a *turn* one modality trains its own encoder and the shared module, on its own loss. A
    *round* is one turn for every modality. A *guide* is a batch of another modality. A turn and a guide are in
    *conflict* where the inner product of their gradients is negative: a plain step would then raise the guide's loss.
    Surgery changes the shared module's step so that the step respects every guide. Equation numbers below are those of
    the GAAL paper (Huang and Yang, ICME 2026). A step does the following:

    1. The shared module's gradient g is read from ``.grad``, where ``backward`` left it.
    2. For each guide of the turn, the shared module runs on the recorded features with its current weights. The most
       uncertain samples are selected (Eqs. 6-7). Their mean gradient is the guide gradient g_p (Eq. 8).
    3. The rule turns the Gramian of g and the guide gradients into weights. The weighted sum of these gradients
       replaces g (Eqs. 3-5). Every inner product spans the whole shared module; no parameter is aligned by itself.
    4. The wrapped optimizer steps.

    With ``align="update"`` the wrapped optimizer steps first. Surgery then works on the *applied update*, the change
    that the wrapped optimizer made to the shared module, in the place of g. The guarantee then holds for the step
    really taken, with its momentum, preconditioning and weight decay. Without a live guide, ``step`` is the wrapped
    optimizer's step, bit for bit; :meth:`guide` says how long a guide lives.

    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own objects, not copies. A step hook that
    is registered globally fires for the wrapper and for the wrapped optimizer.

    Args:
        optimizer: a built torch optimizer that evaluates a closure at most once.
        shared: the module from features to logits. ``optimizer`` must hold its trainable parameters.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced. Only guides use it.
        fraction: lambda of the paper, the share of uncertain samples in (0, 1], or a mapping from modality to share.
        uncertainty: ``logits -> (B,)``, higher is harder.
        rule: from the Gramian to weights; see :class:`HalfSpace`, :class:`DualFloor`, :class:`Orthogonal`.
        align: "gradient" (the paper) or "update".
        guides: "previous" (the paper: the modality before this one in the round, cyclically) or "others" (all others).
        max_norm: clip each selected sample's gradient to this norm before the mean; None does not clip.
        process_group: the ranks that share every batch. None takes the default group where ``torch.distributed`` is
            initialised. Samples are selected among the rows of all ranks. All ranks must take the same turns and record
            guides of the same modalities. ``uncertainty``, ``loss_fn`` and ``rule`` must return equal values on all
            ranks.
        fused: run surgery in Triton kernels, which need less memory on a device and about as much time.
        measure_hurt: measure ``stats.hurt_before`` and ``stats.hurt_after``, the shares of each guide's selected
            samples that the step hurts before and after surgery. The step hurts a sample if the sample's loss rises to
            first order. With ``align="gradient"`` the measured step goes along the gradient, as in plain descent. With
            ``align="update"`` the measured step is a change of the weights, weight decay included: before surgery the
            wrapped optimizer's change, after surgery the change really made. Measuring does not change training by a
            bit. Measuring costs a run of ``shared`` and two forward-mode passes a guide.

    Raises:
        TypeError: an argument is not of the kind above.
        ImportError: ``fused`` is set, and Triton is missing or older than 3.3.
        ValueError: an argument is outside its range, ``optimizer`` needs a closure, or ``optimizer`` lacks parameters
            of ``shared``.

    Example:
        >>> encoders = torch.nn.ModuleDict(
        ...     {"image": torch.nn.Linear(16, 8), "table": torch.nn.Linear(4, 8)}
        ... )
        >>> head = torch.nn.Linear(8, 3)
        >>> adam = torch.optim.Adam([*encoders.parameters(), *head.parameters()])
        >>> optimizer = GradientAlignedAlternator(adam, shared=head)
        >>> inputs = {"image": torch.randn(32, 16), "table": torch.randn(32, 4)}
        >>> target = torch.randint(3, (32,))
        >>> for turn in optimizer.turns("image", "table"):
        ...     features = encoders[turn.modality](inputs[turn.modality])
        ...     F.cross_entropy(head(features), target).backward()
        ...     for guide in turn.guides:
        ...         optimizer.guide(guide, encoders[guide](inputs[guide]), target)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> list(optimizer.stats.cosine_before)
        ['image']
    """

    # The gradient scaler must unscale the gradients before step, also where a fused wrapped optimizer could do so.
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
        process_group: dist.ProcessGroup | None = None,
        fused: bool = False,
        measure_hurt: bool = False,
    ) -> None:
        _check_optimizer(optimizer)
        _check_shared(shared, optimizer)
        check_settings(fraction, max_norm)
        for name, function in {"loss_fn": loss_fn, "uncertainty": uncertainty, "rule": rule}.items():
            check_function(name, function)
        if align not in ("gradient", "update"):
            raise ValueError(f"align must be 'gradient' or 'update', not {align!r}")
        if guides not in ("previous", "others"):
            raise ValueError(f"guides must be 'previous' or 'others', not {guides!r}")
        if align == "update" and any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("align='update' cannot follow an optimizer with maximize=True: use align='gradient'")
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a group that this rank is in, or None, not {process_group!r}")
        self.base, self.shared, self.process_group = optimizer, shared, process_group
        self.loss_fn, self.fraction, self.uncertainty, self.max_norm = loss_fn, fraction, uncertainty, max_norm
        if fused:
            fused_kernels()
        self.rule, self.align, self.guides, self.fused = rule, align, guides, fused
        self.measure_hurt = measure_hurt
        self._round = Round()
        self._tried: list[tuple[Rule, int]] = []
        # Optimizer.__init__ would overwrite the wrapped optimizer's groups and state. __setstate__ only makes hooks.
        self.__setstate__({})

    param_groups = _of_base("param_groups", "The wrapped optimizer's parameter groups.")
    state = _of_base("state", "The wrapped optimizer's state.")
    defaults = _of_base("defaults", "The wrapped optimizer's defaults.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of all parameters to None; guides stay.

        With ``set_to_none=False`` the gradients become zeros. Momentum and weight decay then keep moving idle encoders.
        """
        self.base.zero_grad(set_to_none=set_to_none)

    # Alternation.

    @property
    def stats(self) -> AlignmentStats:
        """Statistics of the last step."""
        return self._round.stats

    def turns(self, *modalities: str) -> Iterator[Turn]:
        """Iterate over one round: a turn for every modality, in order.

        A turn lasts until the next turn begins, the iterator is exhausted, or the iterator's ``close`` method is
        called. A loop that ends by ``break`` leaves its turn open.

        Raises:
            TypeError: a modality is not a string.
            ValueError: there is no modality, or a modality appears twice.
        """
        if not all(isinstance(modality, str) for modality in modalities):
            raise TypeError(f"modalities must be strings, not {modalities}")
        if not modalities or len(set(modalities)) != len(modalities):
            raise ValueError(f"modalities must be one or more different names, not {modalities}")
        return Turns(self._round, modalities, every_other=self.guides == "others")

    def guide(self, modality: str, features: Tensor, target: Tensor) -> None:
        """Record a batch of a modality as the modality's guide. The batch replaces an earlier one.

        The features are detached and kept. The shared module runs on them when a step needs them. In a round of n
        modalities, a guide lives for the turn in which it was recorded and for the next n - 1 turns. Outside ``turns``,
        a guide lives for the next step. With micro-batches, the last recorded batch counts. An empty batch is no guide.
        With several processes, an empty batch says that this rank has no rows of the guide.

        Args:
            modality: whose batch it is.
            features: ``(B, ...)``, what ``shared`` is called on.
            target: ``(B, ...)``, what ``loss_fn`` takes.

        Raises:
            TypeError: ``modality`` is not a string, or ``features`` or ``target`` is not a tensor.
            ValueError: ``features`` and ``target`` differ in length, the open round has no such modality, or
                ``fraction`` has no entry for the modality.
        """
        if not isinstance(modality, str):
            raise TypeError(f"modality must be a string, not {type(modality).__name__}")
        for name, tensor in {"features": features, "target": target}.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        check_lengths(features, target)
        if isinstance(self.fraction, Mapping) and modality not in self.fraction:
            raise ValueError(f"fraction has no entry for {modality!r}, only for {tuple(self.fraction)}: add one")
        self._round.record(
            modality, features, target, keep=len(features) > 0 or several(self.process_group) is not None
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Align the shared module's step with the live guides of the turn, and step the wrapped optimizer.

        If the alignment raises an error, nothing has changed. If the wrapped optimizer raises an error, what it had
        changed by then remains.

        Args:
            closure: evaluates the loss and its gradients, once, before anything else. The closure may record guides.

        Returns:
            What the closure returned, or None without a closure.

        Raises:
            ValueError: the shared module cannot take a guide's features, the rule cannot take so many guides, or
                ``fused`` is set and the parameters are on a CPU.
            RuntimeError: the ranks of several processes are in different turns, only some ranks recorded a guide or
                have gradients, or FSDP has left the shared module unsharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepping = {name: p for name, p in trainable(self.shared).items() if p.grad is not None}
        evidence, ranks = self._evidence(tuple(stepping))
        if evidence and not stepping and _foreign(trainable(self.shared), self.param_groups):
            remedy = "give fully_shard reshard_after_forward=True, or call reshard() on the module before step"
            raise RuntimeError(f"{_name(self.shared)} has other parameters than the optimizer at step time: {remedy}")
        if not evidence or not stepping:
            self.base.step()
            self._round.stats = AlignmentStats()
            return loss
        if self.fused:
            fused_kernels().check_device(next(iter(stepping.values())).device)
        with as_function(self.shared, next(iter(evidence.values())).features.device) as function:
            settings = (self.loss_fn, self.max_norm)
            whole, selected = uncertain_gradients(function, evidence, self._choose, settings, ranks)
        if not self.measure_hurt:
            selected.clear()  # frees memory for the wrapped optimizer's step
        shards = Shards(list(stepping.values()))
        positions = [function.names.index(name) for name in stepping]
        guides = [shards.cut([gradient[position] for position in positions]) for gradient in whole]
        if self.align == "gradient":
            # Write in place, since gradients may be views into a trainer's buckets.
            moved = shards.own([_dense_gradient(name, parameter) for name, parameter in stepping.items()])
            rows = [moved, *guides]
            plain = [tensor.clone() for tensor in moved] if self.measure_hurt else moved
        else:
            self._try_rule(1 + len(guides), guides[0][0].device)
            moved = shards.own([parameter.detach() for parameter in stepping.values()])
            before = [tensor.clone() for tensor in moved]
            self.base.step()
            plain = [earlier - now for earlier, now in zip(before, moved, strict=True)]
            rows = [moved, plain, *guides]
        joined, count = join(rows, self.fused), 1 + len(guides)
        products = shards.gramian(rows[-count:], joined.last(count))
        weights = change = weigh(products, self.rule)
        if self.align == "update":
            # The weights must end at before - (w_0 d + sum_i w_i p_i), where d = before - moved. From `moved`, they end
            # at moved + (1 - w_0) d - sum_i w_i p_i.
            change = torch.cat([torch.ones_like(weights[:1]), 1 - weights[:1], -weights[1:]])
        combine_into(moved, joined, change, cancels(products, weights))
        hurt = None
        if self.measure_hurt:
            applied = moved if self.align == "gradient" else [x - now for x, now in zip(before, moved, strict=True)]
            directions = [dict(zip(stepping, shards.whole(parts), strict=True)) for parts in (plain, applied)]
            at_first = _holding(moved, before) if self.align == "update" else nullcontext()
            with at_first, as_function(self.shared, selected[0].features.device) as function:
                hurt = hurt_shares(function, selected, directions, ranks)
        self._round.finish(evidence, products, weights, hurt)
        if self.align == "gradient":
            self.base.step()
        return loss

    if torch.__version__ < "2.8":  # the compiler cannot follow the step, which then runs between compiled graphs
        step = torch.compiler.disable(step)  # type: ignore[no-untyped-call]

    def _choose(self, modality: str, logits: Tensor) -> Tensor:
        """Positions of a modality's most uncertain samples (Eqs. 6-7)."""
        scores = self.uncertainty(logits)
        if scores.shape != logits.shape[:1]:
            raise ValueError(f"uncertainty must return one score a sample, ({len(logits)},), not {tuple(scores.shape)}")
        return select_uncertain(
            scores, self.fraction[modality] if isinstance(self.fraction, Mapping) else self.fraction
        )

    def _evidence(self, stepping: tuple[str, ...]) -> tuple[dict[str, Evidence], SharedRows | None]:
        """The evidence of this step's guides and, with several processes, how the evidence's rows lie on the ranks."""
        names, group = self._round.guides(), several(self.process_group)
        live = {name: self._round.evidence[name] for name in names if name in self._round.evidence}
        if group is None:
            # A checkpoint of several processes may hold a guide of which a rank had no rows.
            return {name: its for name, its in live.items() if len(its.features)}, None
        # A checkpointing engine makes an optimizer's state by a step with learning rates of 0, on any one rank.
        if not names and all(its.get("lr") == 0 for its in self.param_groups):
            return {}, None
        counts = {name: len(live[name].features) if name in live else None for name in names}
        rows = SharedRows(group, Plan(self._round.turn, counts, stepping))
        return {name: live[name] for name in rows.counts}, rows

    def _try_rule(self, count: int, device: torch.device) -> None:
        """Let the rule fail before the wrapped optimizer steps: ask the rule once for each number of gradients."""
        if torch.compiler.is_compiling() or any(rule is self.rule and count == n for rule, n in self._tried):
            return
        # Ask a copy of a rule that has a state.
        rule = copy.deepcopy(self.rule) if isinstance(self.rule, nn.Module) else self.rule
        with same_random_numbers(device):
            weigh(torch.eye(count, dtype=widest(device), device=device), rule)
        self._tried.append((self.rule, count))

    # Checkpoints and copies.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with the live guides under the key "gaal_surgery".

        The guides are stored as builtin types and tensors. The bare wrapped optimizer can load this state too, and
        ignores the key.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = {**self.base.state_dict(), _STATE_KEY: self._round.state_dict()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a checkpoint of the bare wrapped optimizer, which has no guides.

        Raises:
            ValueError: the entry of the guides is not one that :meth:`state_dict` gives. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        # Read the guides first: a foreign entry must not leave a half-loaded optimizer behind.
        restored = Round.from_state_dict(state_dict.pop(_STATE_KEY, None), next(self.shared.parameters()).device)
        self.base.load_state_dict(state_dict)
        vars(self._round).update(vars(restored))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers put a bound `step` on the instance, which neither pickles nor belongs to a copy. Every optimizer
        # leaves its hooks out of a copy.
        return {k: value for k, value in vars(self).items() if k != "step" and not k.startswith("_optimizer_")}

    def __repr__(self) -> str:
        settings = f"shared={type(self.shared).__name__}, rule={self.rule}, align={self.align!r}"
        return f"{type(self).__name__}({settings}, guides={self.guides!r})\n{self.base!r}"


def _check_optimizer(optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a built torch.optim.Optimizer, not {kind}")
    closure = signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is Parameter.empty
    # Sharpness-aware optimizers declare their closure optional, but step twice. All ports have `second_step`.
    if needs_closure or hasattr(optimizer, "second_step") or isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"optimizer must not be {kind}, which evaluates a closure several times: wrap SGD or AdamW")


def _check_shared(shared: nn.Module, optimizer: Optimizer) -> None:
    if not isinstance(shared, nn.Module):
        raise TypeError(f"shared must be an nn.Module, not {type(shared).__name__}")
    parameters = trainable(shared)
    if not parameters:
        raise ValueError(f"{_name(shared)} has no trainable parameter: unfreeze one, or pass another module")
    if imaginary := [name for name, parameter in parameters.items() if parameter.is_complex()]:
        raise ValueError(f"{_name(shared)} has complex parameters, which cannot be aligned: {', '.join(imaginary)}")
    if foreign := ", ".join(_foreign(parameters, optimizer.param_groups)):
        raise ValueError(f"{_name(shared)} has parameters that optimizer does not hold: {foreign}; add or freeze these")


def _name(shared: nn.Module) -> str:
    return f"shared ({type(shared).__name__})"


def _foreign(parameters: Mapping[str, nn.Parameter], groups: Sequence[dict[str, Any]]) -> list[str]:
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return [name for name, parameter in parameters.items() if id(parameter) not in held]


@contextmanager
def _holding(tensors: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Give the tensors other values for the length of the block."""
    own = [tensor.clone() for tensor in tensors]
    try:
        torch._foreach_copy_(tensors, values)
        yield
    finally:
        torch._foreach_copy_(tensors, own)


def _dense_gradient(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None or parameter.grad.layout is not torch.strided:
        raise ValueError(f"shared has a sparse gradient ({name}), which cannot be aligned: use sparse=False")
    return parameter.grad
