"""Training goes on from a checkpoint: torch's files, its distributed checkpoints, and checkpoints of other makes."""

import copy

import pytest
import reference
import torch
import torch.distributed.checkpoint as dcp
from reference import assert_identical, frozen_copy
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import lr_scheduler
from wrapped import ADAMW, ALIGN, DEMANDING, INNER, SGD, backward, build, saved_and_loaded

from gaal_surgery import GradientAlignedAlternator, HalfSpace

MODALITIES = ("image", "table", "audio")


def inner_state(optimizer):
    """In the order of the parameters, which an engine may change."""
    return dict(sorted(optimizer.state_dict()["state"].items()))


def guides_in_a_cached_round(optimizer, model):
    turns = reference.take_turns(optimizer, model, reference.make_batches(1)[0], recipe="cached")
    return [stats.guides for _, stats in turns]


@ALIGN
@pytest.mark.parametrize("guides", ["previous", "others"])
@INNER
def test_a_resumed_run_is_the_uninterrupted_one(inner, guides, align):
    batches = reference.make_batches(8, *MODALITIES)

    def start():
        rule = HalfSpace(margin=0.5, relative=True)
        model, optimizer = build(*MODALITIES, inner=inner, align=align, guides=guides, rule=rule)
        return model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    def run(model, optimizer, scheduler, batches):
        objected = []
        for batch in batches:
            objected += reference.train(optimizer, model, [batch], recipe="cached")
            scheduler.step()
        return objected

    uninterrupted = start()
    assert run(*uninterrupted, batches)[9], "the guides that the checkpoint carries must matter"
    stopped = start()
    run(*stopped, batches[:3])
    checkpoint = saved_and_loaded([part.state_dict() for part in stopped])
    resumed = start()
    for part, state in zip(resumed, checkpoint, strict=True):
        part.load_state_dict(state)
    run(*resumed, batches[3:])
    assert_identical(frozen_copy(*resumed), frozen_copy(*uninterrupted))


@INNER
def test_loading_what_was_saved_changes_nothing(inner):
    model, optimizer = build(inner=inner)
    reference.train(optimizer, model, reference.make_batches(2), recipe="cached")
    before = frozen_copy(optimizer)
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_identical(frozen_copy(optimizer), before)


@INNER
def test_a_checkpoint_of_the_bare_inner_optimizer_loads_without_guides(inner):
    model, optimizer = build(inner=inner)
    reference.train(optimizer, model, reference.make_batches(3), recipe="cached")
    checkpoint = saved_and_loaded(optimizer.base.state_dict())
    optimizer.load_state_dict(checkpoint)
    assert_identical(optimizer.base.state_dict(), checkpoint)
    assert guides_in_a_cached_round(optimizer, model) == [(), ("image",)]


@INNER
def test_the_bare_inner_optimizer_loads_our_checkpoint(inner):
    model, optimizer = build(inner=inner)
    reference.train(optimizer, model, reference.make_batches(3), recipe="cached")
    bare = inner(model.parameters())
    bare.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_identical(bare.state_dict(), optimizer.base.state_dict())


def test_loading_ends_the_turn_and_forgets_its_statistics(trained, batch):
    model, optimizer = trained
    checkpoint = optimizer.state_dict()
    unfinished = optimizer.turns("image", "table")
    next(unfinished)
    optimizer.load_state_dict(checkpoint)
    assert optimizer.stats.guides == ()
    backward(model, batch)
    optimizer.step()
    assert optimizer.stats.modality is None
    assert optimizer.stats.guides == ("image", "table")


def test_load_state_dict_takes_its_argument_by_keyword_and_leaves_it_alone(trained):
    _, optimizer = trained
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    optimizer.load_state_dict(state_dict=state_dict)
    assert_identical(state_dict, before)


def test_live_guides_follow_the_device_of_the_model(trained):
    _, optimizer = trained
    elsewhere, its_optimizer = build()
    elsewhere.to("meta")
    its_optimizer.load_state_dict(optimizer.state_dict())
    guides = its_optimizer.state_dict()["gaal_surgery"]["guides"]
    assert {tensor.device.type for guide in guides.values() for tensor in (guide["features"], guide["target"])} == {
        "meta"
    }


def test_live_guides_serve_a_model_of_another_precision(trained):
    _, optimizer = trained
    wide = reference.make_model(dtype=torch.float64)
    its_optimizer = GradientAlignedAlternator(ADAMW(wide.parameters()), wide.head)
    its_optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    batch = reference.make_batches(1, dtype=torch.float64)[0]
    (_, stats), _ = reference.take_turns(its_optimizer, wide, batch, recipe="cached")
    assert stats.guides == ("table",)


def test_a_checkpointing_engine_may_drop_the_guides(trained):
    """Torch's own keeps parameter groups and per-parameter state alone."""
    model, optimizer = trained
    kept = get_optimizer_state_dict(model, optimizer)
    fresh, its_optimizer = build()
    untouched = frozen_copy(fresh)
    set_optimizer_state_dict(fresh, its_optimizer, kept)
    assert_identical(frozen_copy(fresh), untouched)
    assert_identical(inner_state(its_optimizer), inner_state(optimizer))
    assert guides_in_a_cached_round(its_optimizer, fresh) == [(), ("image",)]


def test_a_checkpoint_in_mid_round_resumes_where_the_turns_before_it_are_skipped_before_loading():
    batches = reference.make_batches(4)

    def turn_on(turns):
        modality, stats = next(turns)
        return modality, stats.guides, [bool(flag) for flag in stats.intervened.values()]

    model, optimizer = build(rule=DEMANDING)
    reference.train(optimizer, model, batches[:2], recipe="cached")
    turns = reference.take_turns(optimizer, model, batches[2], recipe="cached")
    assert turn_on(turns)[:2] == ("image", ("table",))
    checkpoint = saved_and_loaded([model.state_dict(), optimizer.state_dict()])

    resumed, its_optimizer = build(rule=DEMANDING)
    round_ = its_optimizer.turns("image", "table")
    next(round_)
    for part, state in zip((resumed, its_optimizer), checkpoint, strict=True):
        part.load_state_dict(state)
    expected = turn_on(turns)
    for turn in round_:
        features, target = backward(resumed, batches[2], turn.modality)
        its_optimizer.step()
        its_optimizer.guide(turn.modality, features, target)
        its_optimizer.zero_grad()
        assert (turn.modality, its_optimizer.stats.guides) == expected[:2] == ("table", ("image",))
    assert reference.train(optimizer, model, batches[3:], recipe="cached") == reference.train(
        its_optimizer, resumed, batches[3:], recipe="cached"
    )
    assert_identical(frozen_copy(resumed, its_optimizer), frozen_copy(model, optimizer))


@pytest.mark.parametrize("how", [{"mmap": True}, {"map_location": "cpu"}, {"weights_only": False}], ids=str)
def test_a_checkpoint_may_be_read_in_any_way(how, trained, tmp_path):
    _, optimizer = trained
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
    its_optimizer = build()[1]
    its_optimizer.load_state_dict(torch.load(tmp_path / "checkpoint.pt", **how))
    assert_identical(frozen_copy(its_optimizer), frozen_copy(optimizer))


@ALIGN
def test_guides_of_a_modality_that_is_no_longer_trained_expire(align):
    model, optimizer = build(*MODALITIES, align=align, guides="others")
    reference.train(optimizer, model, reference.make_batches(2, *MODALITIES), recipe="cached")
    checkpoint = saved_and_loaded(optimizer.state_dict())
    assert set(checkpoint["gaal_surgery"]["guides"]) == set(MODALITIES)
    settings = {"align": align, "guides": "others", "fraction": {"image": 0.5, "table": 0.5}}
    its_optimizer = GradientAlignedAlternator(ADAMW(model.parameters()), model.head, **settings)
    its_optimizer.load_state_dict(checkpoint)
    assert guides_in_a_cached_round(its_optimizer, model) == [(), ("image",)]
    assert set(its_optimizer.state_dict()["gaal_surgery"]["guides"]) == {"image", "table"}


# Torch's distributed checkpoints, in one process.

ONE_PROCESS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def save_async(state, *, checkpoint_id):
    dcp.async_save(state, checkpoint_id=checkpoint_id).result()


@ONE_PROCESS
@pytest.mark.parametrize("save", [dcp.save, save_async])
@INNER
def test_fresh_training_resumes_from_a_distributed_checkpoint(inner, save, tmp_path):
    """Under names of parameters; guides are left out, which fresh guidance does not need."""
    batches = reference.make_batches(6)
    model, optimizer = build(inner=inner)
    reference.train(optimizer, model, batches[:3])
    save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)
    objected = reference.train(optimizer, model, batches[3:])
    assert any(objected)

    resumed, its_optimizer = build(inner=inner)
    state = dict(zip(("model", "optimizer"), get_state_dict(resumed, its_optimizer), strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(resumed, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert reference.train(its_optimizer, resumed, batches[3:]) == objected
    assert_identical(frozen_copy(resumed), frozen_copy(model))
    assert_identical(inner_state(its_optimizer), inner_state(optimizer))


@ONE_PROCESS
@pytest.mark.parametrize("stateful", [False, True], ids=["state_dict", "stateful"])
def test_cached_training_resumes_from_a_distributed_checkpoint_of_its_own_state(stateful, trained, tmp_path):
    """Such a checkpoint is read into what is there: an optimizer that has made its first round."""

    def state_of(*parts):
        return {str(number): part if stateful else part.state_dict() for number, part in enumerate(parts)}

    model, optimizer = trained
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path)
    resumed, its_optimizer = build()
    reference.train(its_optimizer, resumed, reference.make_batches(1, seed=1), recipe="cached")
    state = state_of(resumed, its_optimizer)
    dcp.load(state, checkpoint_id=tmp_path)
    if not stateful:
        for part, its_state in zip((resumed, its_optimizer), state.values(), strict=True):
            part.load_state_dict(its_state)
    assert_identical(frozen_copy(resumed, its_optimizer), frozen_copy(model, optimizer))
    objected = reference.train(optimizer, model, reference.make_batches(4, seed=2), recipe="cached")
    assert any(objected)
    assert reference.train(its_optimizer, resumed, reference.make_batches(4, seed=2), recipe="cached") == objected
    assert_identical(frozen_copy(resumed, its_optimizer), frozen_copy(model, optimizer))


# Checkpoints that do not fit.

MALFORMED = {
    "no_mapping": 3,
    "empty": {},
    "no_guides": {"turns_begun": 1},
    "turns_begun": {"turns_begun": "many", "guides": {}},
    "guides": {"turns_begun": 1, "guides": ["table"]},
    "guide": {"turns_begun": 1, "guides": {"table": {"features": torch.zeros(8, 4)}}},
    "features": {"turns_begun": 1, "guides": {"table": {"features": [1.0], "target": [1], "recorded": 1}}},
}


@pytest.mark.parametrize("entry", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_entry_of_guides_is_refused_by_name_and_changes_nothing(entry, trained):
    model, optimizer = trained
    before = frozen_copy(optimizer)
    foreign = build()[1]
    reference.train(foreign, model, reference.make_batches(1, seed=1))
    with pytest.raises(ValueError, match="gaal_surgery"):
        optimizer.load_state_dict({**foreign.state_dict(), "gaal_surgery": entry})
    assert_identical(frozen_copy(optimizer), before)


FOREIGN = {
    "empty": lambda model: {},
    "model": lambda model: model.state_dict(),
    "fewer_parameters": lambda model: SGD(model.head.parameters()).state_dict(),
    "more_groups": lambda model: SGD([{"params": [p]} for p in model.parameters()]).state_dict(),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_checkpoint_fails_as_in_the_inner_optimizer_and_changes_nothing(foreign, trained):
    model, optimizer = trained
    before = frozen_copy(optimizer)
    state_dict = {**foreign(model), "gaal_surgery": {"turns_begun": 9, "guides": {}}}
    with pytest.raises((KeyError, ValueError)) as expected:
        optimizer.base.load_state_dict(foreign(model))
    with pytest.raises(expected.type, match=str(expected.value)):
        optimizer.load_state_dict(state_dict)
    assert_identical(frozen_copy(optimizer), before)
