"""Several processes on shards of a batch train as one process on the whole batch; every process here is a real one."""

import contextlib
import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_in_group
from reference import assert_identical, frozen_copy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gaal_surgery import FreshFeatures, GradientAlignedAlternator, HalfSpace
from gaal_surgery import rows as library

pytestmark = pytest.mark.slow  # starts processes

SGD = partial(torch.optim.SGD, lr=0.3, momentum=0.9, weight_decay=1e-2)
ADAMW = partial(torch.optim.AdamW, lr=0.02)
CLASS_WEIGHTS = (1.0, 5.0, 0.2)


def weighted_cross_entropy(logits, target):
    return F.cross_entropy(logits, target, weight=torch.tensor(CLASS_WEIGHTS, dtype=logits.dtype))


def mlp():
    """A head that is no plain Linear, with what differs between training and evaluation."""
    return nn.Sequential(nn.Linear(reference.HIDDEN, 6), nn.BatchNorm1d(6).eval(), nn.Dropout(0.0), nn.Linear(6, 3))


# Ways to run a model in several processes: its encoders by name, and its head.


def separate(model, **settings):
    """A wrapper for each encoder and one for the head."""
    encoders = {name: DistributedDataParallel(encoder, **settings) for name, encoder in model.encoders.items()}
    return encoders, DistributedDataParallel(model.head, **settings)


class Joint(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, modality, inputs):
        features = self.model.encoders[modality](inputs)
        return features, self.model.head(features)


def one_wrapper(model):
    """A wrapper of the whole model, which has to be entered once a turn."""
    joint = DistributedDataParallel(Joint(model), find_unused_parameters=True)
    return {name: partial(joint, name) for name in model.encoders}, lambda outputs: outputs[1]


class OnFeatures(nn.Module):
    """The model behind one forward that takes features: the graph behind them leads to their encoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features):
        return self.model.head(features)


def one_wrapper_on_features(model):
    """A wrapper of the whole model, which has to be entered last; encoders run outside of it."""
    return model.encoders, DistributedDataParallel(OnFeatures(model), find_unused_parameters=True)


@dataclass(frozen=True)
class Case:
    """A training run, and the rows of every batch that each rank has."""

    shards: tuple[int, ...] = (4, 4)
    modalities: tuple[str, ...] = ("image", "table")
    recipe: str = "fresh"
    inner: object = SGD
    dtype: torch.dtype = torch.float64
    head: object = None
    loss_fn: object = F.cross_entropy
    parallel: object = separate
    rounds: int = 4
    settings: dict = field(default_factory=dict)

    def batches(self):
        return reference.make_batches(self.rounds, *self.modalities, size=sum(self.shards), dtype=self.dtype)

    def own(self, tensor):
        """This rank's rows; all rows outside a process group."""
        return tensor.split(self.shards)[dist.get_rank()] if dist.is_initialized() else tensor

    def loss(self, logits, target):
        """This rank's part of the loss of the whole batch, times the ranks, of which DDP takes the mean."""
        weight = torch.ones(3, dtype=logits.dtype)
        if self.loss_fn is weighted_cross_entropy:
            weight = torch.tensor(CLASS_WEIGHTS, dtype=logits.dtype)
        total = F.cross_entropy(logits, self.own(target), weight=weight, reduction="sum") / weight[target].sum()
        return total * len(self.shards) if dist.is_initialized() else total


def train(case, group=None):
    """Trains on this rank's rows; returns the model's state, and the statistics by turn."""
    model = reference.make_model(*case.modalities, dtype=case.dtype, head=case.head)
    encoders, head = case.parallel(model) if dist.is_initialized() else (model.encoders, model.head)

    # A margin that no gradient of noise meets by itself: surgery acts in most steps.
    settings = {"rule": HalfSpace(0.5, relative=True), "loss_fn": case.loss_fn, "process_group": group, **case.settings}
    optimizer = GradientAlignedAlternator(case.inner(model.parameters()), model.head, **settings)
    history = []
    for inputs, target in case.batches():
        own = {name: case.own(rows) for name, rows in inputs.items()}
        passes = FreshFeatures(optimizer, encoders, own)
        for turn in optimizer.turns(*case.modalities):
            features = passes[turn.modality] if case.recipe == "shared" else encoders[turn.modality](own[turn.modality])
            case.loss(head(features), target).backward()
            if case.recipe == "shared":
                for guide in turn.guides:
                    optimizer.guide(guide, passes[guide], case.own(target))
            if case.recipe == "fresh":
                for guide in turn.guides:
                    with torch.no_grad():
                        optimizer.guide(guide, model.encoders[guide](own[guide]), case.own(target))
            optimizer.step()
            if case.recipe == "cached":
                features = features[0] if isinstance(features, tuple) else features
                optimizer.guide(turn.modality, features.detach(), case.own(target))
            optimizer.zero_grad()
            stats = optimizer.stats
            history.append((stats.guides, stats.gramian, stats.weights, *([] if stats.hurt is None else [stats.hurt])))
    return whole(model), history


def whole(model):
    """The state of a model, its shards put together, and no more than values."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def assert_equal_to_one_process(case, tolerance=1e-12):
    by_rank = run_in_group(len(case.shards), train, case)
    for others in by_rank[1:]:
        assert_identical(others, by_rank[0])
    state, history = by_rank[0]
    expected, its_history = train(case)
    torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)
    for (guides, *measured), (its_guides, *expected) in zip(history, its_history, strict=True):
        assert guides == its_guides
        torch.testing.assert_close(measured, expected, rtol=100 * tolerance, atol=100 * tolerance)
    acted = [weights is not None and weights[1:].any() for _, _, weights, *_ in its_history]
    assert any(acted), "surgery had nothing to do"
    return its_history


SHARDS = pytest.mark.parametrize("shards", [(4, 4), (5, 3), (8, 0), (3, 1, 4)], ids=str)
ALIGN = pytest.mark.parametrize("align", ["gradient", "update"])
RECIPE = pytest.mark.parametrize("recipe", ["fresh", "shared", "cached"])


@SHARDS
@RECIPE
@ALIGN
def test_processes_train_as_one(shards, recipe, align):
    settings = {"align": align}
    assert_equal_to_one_process(Case(shards, recipe=recipe, loss_fn=weighted_cross_entropy, settings=settings))


@RECIPE
@ALIGN
def test_with_all_other_modalities_as_guides(recipe, align):
    case = Case((5, 0, 3), ("image", "table", "audio"), recipe, settings={"guides": "others", "align": align})
    assert_equal_to_one_process(case)


SETTINGS = {
    "float32": (Case(dtype=torch.float32), 1e-6),
    "adamw": (Case(inner=ADAMW), 1e-12),
    "mlp_head": (Case((5, 3), head=mlp), 1e-12),
    "clipped": (Case((5, 3), settings={"max_norm": 0.05}), 1e-12),
    "clipped_mlp_head": (Case((3, 5), head=mlp, settings={"max_norm": 0.05}), 1e-12),
    "paper_rule": (Case((5, 3), rounds=12, settings={"rule": HalfSpace()}), 1e-12),
    "one_sample_selected": (Case((4, 4), settings={"fraction": 1e-9}), 1e-12),
    "fraction_by_modality": (Case((1, 7), settings={"fraction": {"image": 0.9, "table": 0.2}}), 1e-12),
}


@pytest.mark.parametrize(("case", "tolerance"), SETTINGS.values(), ids=SETTINGS)
def test_settings_are_those_of_one_process(case, tolerance):
    assert_equal_to_one_process(case, tolerance)


def select_from_one_rank_alone():
    """Rank 0 is sure of its rows, rank 1 is not: all that is selected lies on rank 1."""
    model = reference.make_model(dtype=torch.float64)
    optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head)
    features = torch.randn(4, reference.HIDDEN, dtype=torch.float64) * (100.0 if dist.get_rank() == 0 else 0.01)
    target = torch.arange(4) % 3
    F.cross_entropy(model.head(torch.ones(4, reference.HIDDEN, dtype=torch.float64)), target).backward()
    optimizer.guide("table", features, target)
    expected = torch.autograd.grad(F.cross_entropy(model.head(features), target), [*model.head.parameters()])
    optimizer.step()
    return float(optimizer.stats.guide_norm["table"]), math.sqrt(sum(float((g**2).sum()) for g in expected))


def test_a_rank_may_hold_none_of_the_selected_samples():
    (norm, _), (same, expected) = run_in_group(2, select_from_one_rank_alone)
    assert norm == same == pytest.approx(expected, rel=1e-12)


# DistributedDataParallel.


PARALLEL = {
    "one_wrapper": one_wrapper,
    "bucket_views": partial(separate, gradient_as_bucket_view=True),
    "find_unused_parameters": partial(separate, find_unused_parameters=True),
}


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
@pytest.mark.parametrize("recipe", ["fresh", "cached"])
def test_under_distributed_data_parallel(parallel, recipe):
    assert_equal_to_one_process(Case((4, 4), recipe=recipe, parallel=parallel))


HELD_PASSES = {
    "bucket_views": PARALLEL["bucket_views"],
    "find_unused_parameters": PARALLEL["find_unused_parameters"],
    "one_wrapper_on_features": one_wrapper_on_features,
}


@pytest.mark.parametrize("parallel", HELD_PASSES.values(), ids=HELD_PASSES)
@ALIGN
def test_a_pass_may_be_held_over_another_modules_step(parallel, align):
    """The last encoder's pass serves as a guide while other encoders, and the head, are reduced and step."""
    settings = {"align": align, "guides": "others"}
    assert_equal_to_one_process(Case((5, 3), ("a", "b", "c"), "shared", parallel=parallel, settings=settings))


def accumulate(wrap):
    """Two micro-batches a turn, the first without reduction."""
    case = Case((4, 4))
    model = reference.make_model(dtype=torch.float64)
    optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head)
    joint = DistributedDataParallel(Joint(model), find_unused_parameters=True) if wrap else Joint(model)
    for inputs, target in case.batches():
        for turn in optimizer.turns(*inputs):
            guiding = []
            micro = torch.arange(len(case.own(target))).chunk(2)
            for rows in micro:
                last = rows is micro[-1]
                with joint.no_sync() if wrap and not last else contextlib.nullcontext():
                    _, logits = joint(turn.modality, case.own(inputs[turn.modality])[rows])
                    (F.cross_entropy(logits, case.own(target)[rows]) / len(micro)).backward()
                with torch.no_grad():
                    guiding.append(model.encoders[turn.guides[0]](case.own(inputs[turn.guides[0]])[rows]))
            optimizer.guide(turn.guides[0], torch.cat(guiding), case.own(target))
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def test_gradients_accumulate_without_reduction_up_to_the_last_micro_batch():
    first, second = run_in_group(2, accumulate, True)
    assert_identical(first, second)
    torch.testing.assert_close(first, accumulate(False), rtol=1e-12, atol=1e-12)


# FSDP2.

on_a_cpu = pytest.mark.skipif(torch.__version__ < "2.8", reason="FSDP2 of torch before 2.8 needs a GPU")


def shard_all(model):
    for module in (*model.encoders.values(), model.head):
        fully_shard(module, reshard_after_forward=True)
    return model.encoders, model.head


def shard_encoders(model):
    """The head is replicated: its gradient is reduced by DistributedDataParallel."""
    for encoder in model.encoders.values():
        fully_shard(encoder, reshard_after_forward=True)
    return model.encoders, DistributedDataParallel(model.head)


def shard_layers_of_the_head(model):
    for module in (*model.encoders.values(), model.head[0], model.head[-1], model.head):
        fully_shard(module, reshard_after_forward=True)
    return model.encoders, model.head


def shard_and_replicate(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    for module in (*model.encoders.values(), model.head):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model.encoders, model.head


SHARDED = {
    "shared_passes": Case((4, 4), ("a", "b", "c"), "shared", parallel=shard_all, settings={"guides": "others"}),
    "shared_passes_by_layer": Case((5, 3), recipe="shared", parallel=shard_layers_of_the_head, head=mlp),
    "all": Case((4, 4), parallel=shard_all),
    "three_ranks": Case((2, 2, 2), parallel=shard_all),
    "encoders": Case((4, 4), parallel=shard_encoders),
    "mlp_head": Case((4, 4), parallel=shard_layers_of_the_head, head=mlp),
    "replicated_shards": Case((4, 4), parallel=shard_and_replicate),
    "clipped": Case((4, 4), parallel=shard_all, settings={"max_norm": 0.05}),
    "adamw": Case((4, 4), parallel=shard_all, inner=ADAMW),
}


@on_a_cpu
@pytest.mark.parametrize("case", SHARDED.values(), ids=SHARDED)
@ALIGN
def test_under_fully_sharded_data_parallel(case, align):
    assert_equal_to_one_process(replace(case, settings={**case.settings, "align": align}))


HURT = {
    "no_rows_on_a_rank": Case((5, 0, 3), ("image", "table", "audio"), settings={"guides": "others"}),
    "class_weights": Case((5, 3), head=mlp, loss_fn=weighted_cross_entropy),
    "sharded_layers": pytest.param(Case((4, 4), parallel=shard_layers_of_the_head, head=mlp), marks=on_a_cpu),
    "three_shards": pytest.param(Case((2, 2, 2), parallel=shard_all, inner=ADAMW), marks=on_a_cpu),
}


@pytest.mark.parametrize("case", HURT.values(), ids=HURT)
@ALIGN
def test_hurt_samples_are_counted_over_all_ranks(case, align):
    case = replace(case, settings={"measure_hurt": True, "rule": HalfSpace(), "align": align, **case.settings})
    shares = torch.cat([hurt for *_, hurt in assert_equal_to_one_process(case)], dim=1)
    assert shares.unique().numel() > 1


def leave_the_head_unsharded():
    model = reference.make_model()
    fully_shard(model.head)  # as a root it stays whole after a forward pass
    optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head)
    features, target = torch.ones(4, reference.HIDDEN), torch.arange(4) % 3
    F.cross_entropy(model.head(features), target).backward()
    optimizer.guide("table", features, target)
    model.head(features)
    before = [parameter.to_local().clone() for parameter in optimizer.param_groups[0]["params"][-2:]]
    with pytest.raises(RuntimeError, match=r"other parameters than the optimizer.*reshard"):
        optimizer.step()
    assert_identical([parameter.to_local() for parameter in optimizer.param_groups[0]["params"][-2:]], before)
    model.head.reshard()
    optimizer.step()
    return optimizer.stats.guides


@on_a_cpu
def test_a_head_that_was_left_unsharded_is_named():
    assert run_in_group(2, leave_the_head_unsharded) == [("table",)] * 2


def guide_a_sharded_head_and_look():
    model = reference.make_model(head=mlp)
    shard_layers_of_the_head(model)
    optimizer = GradientAlignedAlternator(SGD(model.parameters(), lr=0.0), model.head)
    features, target = torch.ones(4, reference.HIDDEN), torch.arange(4) % 3
    F.cross_entropy(model.head(features), target).backward()
    parameters, hooks = dict(model.head.named_parameters()), hooks_of(model.head)
    optimizer.guide("table", features, target)
    optimizer.step()
    assert all(parameters[name] is parameter for name, parameter in model.head.named_parameters())
    assert hooks_of(model.head) == hooks
    return sum(hooks)


def hooks_of(module):
    return [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules()]


@on_a_cpu
def test_a_sharded_head_gets_its_parameters_and_hooks_back():
    assert all(run_in_group(2, guide_a_sharded_head_and_look))


# What is exchanged, and with whom.


def count_collectives(modalities, parallel):
    """By turn, the collectives of `step` and the bytes this rank sends in each."""
    model = reference.make_model(*modalities)
    encoders, head = parallel(model)
    optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head, guides="others")
    sent, turns = [], []
    for name, argument in (("all_gather", 1), ("all_reduce", 0)):
        original = getattr(dist, name)

        def counted(*args, original=original, argument=argument, **settings):
            sent.append(args[argument].nbytes)
            return original(*args, **settings)

        setattr(dist, name, counted)
    try:
        inputs, target = reference.make_batches(1, *modalities)[0]
        for turn in optimizer.turns(*modalities):
            F.cross_entropy(head(encoders[turn.modality](inputs[turn.modality])), target).backward()
            for guide in turn.guides:
                optimizer.guide(guide, model.encoders[guide](inputs[guide]), target)
            sent.clear()
            optimizer.step()
            optimizer.zero_grad()
            turns.append(list(sent))
    finally:
        dist.all_gather, dist.all_reduce = (getattr(dist.distributed_c10d, n) for n in ("all_gather", "all_reduce"))
    return turns


@pytest.mark.parametrize("modalities", [("image",), ("image", "table"), ("image", "table", "audio")], ids=len)
def test_a_turn_exchanges_logits_with_targets_then_gradients(modalities):
    """Two collectives on the device, however many guides, after the plans of the hosts."""
    guides, rows, parameters = len(modalities) - 1, 8, (reference.HIDDEN + 1) * reference.CLASSES
    gathered, summed = guides * rows * (4 * reference.CLASSES + 8), guides * 4 * parameters
    expected = [gathered, summed] if guides else []
    assert run_in_group(2, count_collectives, modalities, separate) == [[expected] * len(modalities)] * 2


def train_in_a_subgroup(case):
    """Ranks 0 and 1 share batches; nobody waits for rank 2."""
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return None
    return train(replace(case, parallel=partial(separate, process_group=group)), group)


def test_a_process_group_of_its_own():
    case = Case((4, 4))
    first, second, third = run_in_group(3, train_in_a_subgroup, case)
    assert third is None
    assert_identical(first, second)
    torch.testing.assert_close(first[0], train(case)[0], rtol=1e-12, atol=1e-12)


def train_where_devices_alone_speak(case):
    """As under nccl, whose group cannot carry what lies on the host."""
    library.dist.get_backend_config = lambda group: "cuda:nccl"
    try:
        state = train(case)[0]
    finally:
        library.dist.get_backend_config = dist.distributed_c10d.get_backend_config
    return state, len(library._HOST_GROUPS)


def test_hosts_speak_through_a_group_of_their_own_where_the_backend_serves_devices_alone():
    case = Case((5, 3))
    for state, groups in run_in_group(2, train_where_devices_alone_speak, case):
        assert groups == 1
        torch.testing.assert_close(state, train(case)[0], rtol=1e-12, atol=1e-12)


# Ranks that do not do the same.


def turn_of(optimizer, *modalities, skip=0):
    turns = optimizer.turns(*modalities)
    for _ in range(skip):
        next(turns)
    return next(turns)


def no_guide(optimizer, evidence, odd):
    turn = turn_of(optimizer, "image", "table")
    if not odd:
        optimizer.guide(turn.guides[0], *evidence)


def no_guide_outside_turns(optimizer, evidence, odd):
    if not odd:
        optimizer.guide("table", *evidence)


def another_turn(optimizer, evidence, odd):
    turn = turn_of(optimizer, *(("table", "image") if odd else ("image", "table")))
    optimizer.guide(turn.guides[0], *evidence)


def another_round(optimizer, evidence, odd):
    turn = turn_of(optimizer, "image", "table", *(["audio"] if odd else []))
    optimizer.guide(turn.guides[0], *evidence)


def a_turn_ahead(optimizer, evidence, odd):
    turn = turn_of(optimizer, "image", "table", skip=odd)
    optimizer.guide(turn.guides[0], *evidence)


def no_turn(optimizer, evidence, odd):
    if not odd:
        turn_of(optimizer, "image", "table")
    optimizer.guide("table", *evidence)


def a_round_of_one(optimizer, evidence, odd):
    turn = turn_of(optimizer, *(["image"] if odd else ["image", "table"]))
    for guide in turn.guides:
        optimizer.guide(guide, *evidence)


def more_guides_outside_turns(optimizer, evidence, odd):
    for modality in ("table", "audio", "text")[: 3 if odd else 1]:
        optimizer.guide(modality, *evidence)


def no_backward(optimizer, evidence, odd):
    """As a rank without rows might: it has no loss."""
    if odd:
        optimizer.zero_grad()
        evidence = [tensor[:0] for tensor in evidence]
    optimizer.guide(turn_of(optimizer, "image", "table").guides[0], *evidence)


def a_part_frozen(optimizer, evidence, odd):
    if odd:
        optimizer.shared.bias.grad = None
    optimizer.guide(turn_of(optimizer, "image", "table").guides[0], *evidence)


def no_backward_and_no_guide(optimizer, evidence, odd):
    if odd:
        optimizer.zero_grad()
    else:
        optimizer.guide(turn_of(optimizer, "image", "table").guides[0], *evidence)


MISTAKES = {
    no_guide: "guide 'table' is missing on ranks [1]",
    no_guide_outside_turns: "ranks are in different turns",
    another_turn: "ranks are in different turns",
    another_round: "ranks are in different turns",
    a_turn_ahead: "ranks are in different turns",
    no_turn: "ranks are in different turns",
    a_round_of_one: "ranks are in different turns",
    more_guides_outside_turns: "ranks are in different turns",
    no_backward: "ranks have gradients for [2, 0] parameters of shared",
    a_part_frozen: "ranks have gradients for [2, 1] parameters of shared",
    no_backward_and_no_guide: "ranks are in different turns",
}


def step_with(mistake, align):
    model = reference.make_model()
    optimizer = GradientAlignedAlternator(ADAMW(model.parameters()), model.head, align=align)
    features, target = torch.ones(4, reference.HIDDEN), torch.arange(4) % 3
    F.cross_entropy(model.head(features), target).backward()
    mistake(optimizer, (features, target), dist.get_rank() == 1)
    before = frozen_copy(model, optimizer), [parameter.grad for parameter in model.parameters()]
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert_identical((frozen_copy(model, optimizer), [parameter.grad for parameter in model.parameters()]), before)
    return str(error.value)


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.items(), ids=lambda value: getattr(value, "__name__", ""))
@ALIGN
def test_ranks_that_do_not_do_the_same_are_told_in_the_same_words(mistake, message, align):
    first, second = run_in_group(2, step_with, mistake, align)
    assert first == second
    assert message in first


def step_with_learning_rate_0_on_one_rank():
    """As torch.distributed.checkpoint does, to make an optimizer's state before it loads one."""
    model = reference.make_model()
    optimizer = GradientAlignedAlternator(torch.optim.AdamW(model.parameters(), lr=0.0), model.head)
    if dist.get_rank() == 0:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return len(optimizer.state)


def test_an_optimizers_state_may_be_made_on_one_rank_alone():
    made, not_made = run_in_group(2, step_with_learning_rate_0_on_one_rank)
    assert made > not_made == 0


class TakesNoEmptyBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(reference.HIDDEN, 3)

    def forward(self, features):
        return self.layer(features) + 0 * features.amax()


def guide_without_rows_a_head_that_needs_some(ranks):
    """Rank 1 has no rows; it takes part in the reduction of the gradients with zeros."""
    model = reference.make_model(head=TakesNoEmptyBatch, dtype=torch.float64)
    optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head, rule=HalfSpace(0.5, relative=True))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, reference.HIDDEN, generator=generator, dtype=torch.float64)
    target, alone = torch.arange(6) % 3, ranks == 1
    rows = slice(None) if alone or dist.get_rank() == 0 else slice(0)
    F.cross_entropy(model.head(features[0]), target).backward()  # the reduced gradient, on every rank
    optimizer.guide("table", features[1, rows], target[rows])
    optimizer.step()
    return model.head.state_dict(), optimizer.stats.gramian


def test_a_rank_without_rows_need_not_run_the_head_on_none():
    first, second = run_in_group(2, guide_without_rows_a_head_that_needs_some, 2)
    assert_identical(first, second)
    torch.testing.assert_close(first, guide_without_rows_a_head_that_needs_some(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", ["world", -100, [0, 1]], ids=["name", "not_a_member", "ranks"])
def test_a_wrong_process_group_is_refused(group):
    model = reference.make_model()
    with pytest.raises(TypeError, match="process_group"):
        GradientAlignedAlternator(SGD(model.parameters()), model.head, process_group=group)


# Checkpoints.


def stop_and_resume(recipe):
    """Every rank keeps a checkpoint of its own."""
    model = reference.make_model(dtype=torch.float64)
    optimizer = GradientAlignedAlternator(ADAMW(model.parameters()), model.head)
    batches = [
        ({name: x.chunk(2)[dist.get_rank()] for name, x in inputs.items()}, target.chunk(2)[dist.get_rank()])
        for inputs, target in Case().batches()
    ]
    view = copy.copy(model)
    view._modules = {"encoders": nn.ModuleDict(separate(model)[0]), "head": DistributedDataParallel(model.head)}
    reference.train(optimizer, view, batches[:2], recipe=recipe)
    kept = frozen_copy(model, optimizer)
    reference.train(optimizer, view, batches[2:], recipe=recipe)
    expected = frozen_copy(model, optimizer)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    reference.train(optimizer, view, batches[2:], recipe=recipe)
    assert_identical(frozen_copy(model, optimizer), expected)
    return model.state_dict()


def state_of_a_rank_without_rows():
    model = reference.make_model()
    optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head)
    optimizer.guide("table", torch.ones(4, reference.HIDDEN)[: 4 * dist.get_rank()], torch.zeros(4 * dist.get_rank()))
    return optimizer.state_dict()


def test_a_guide_without_rows_on_its_rank_is_none_for_a_single_process():
    model = reference.make_model()
    optimizer = GradientAlignedAlternator(SGD(model.parameters()), model.head)
    optimizer.load_state_dict(run_in_group(2, state_of_a_rank_without_rows)[0])
    model.head(torch.ones(4, reference.HIDDEN)).sum().backward()
    optimizer.step()
    assert optimizer.stats.guides == ()


@RECIPE
def test_a_resumed_run_is_the_uninterrupted_one(recipe):
    assert_identical(*run_in_group(2, stop_and_resume, recipe))
