"""How long a turn lasts, and what is told to whom: rounds that are left, ended, overtaken; guides of the wrong name."""

import contextlib
import copy
import gc

import pytest
import reference
import torch
from wrapped import backward, build

from gaal_surgery import Turn


def leave_by_break(optimizer, model, batch):
    for turn in optimizer.turns("image", "table"):
        optimizer.guide(turn.guides[0], *backward(model, batch))
        break


def leave_by_an_error(optimizer, model, batch):
    with contextlib.suppress(KeyError):
        for turn in optimizer.turns("image", "table"):
            optimizer.guide(turn.guides[0], *backward(model, batch))
            raise KeyError


LEAVE = pytest.mark.parametrize("leave", [leave_by_break, leave_by_an_error])


@LEAVE
@pytest.mark.parametrize("collected", [True, False])
def test_a_turn_that_was_left_lasts_until_the_next_begins(leave, collected, batch):
    """Whoever holds the iterator, and whenever the garbage collector runs."""
    model, optimizer = build()
    turns = optimizer.turns
    held = []

    def holding(*modalities):
        held.append(turns(*modalities))
        return held[-1]

    if not collected:
        optimizer.turns = holding
    leave(optimizer, model, batch)
    gc.collect()
    optimizer.step()
    assert (optimizer.stats.modality, optimizer.stats.guides) == ("image", ("table",))
    optimizer.zero_grad()
    modalities = [modality for modality, _ in reference.take_turns(optimizer, model, batch)]
    assert modalities == ["image", "table"]
    optimizer.guide("anything", *backward(model, batch))  # the round is over
    optimizer.step()
    assert optimizer.stats.modality is None


def test_an_exhausted_round_has_ended(batch):
    model, optimizer = build()
    assert [turn.modality for turn in optimizer.turns("image", "table")] == ["image", "table"]
    optimizer.guide("sound", *backward(model, batch))
    optimizer.step()
    assert (optimizer.stats.modality, optimizer.stats.guides) == (None, ("sound",))


def test_a_round_is_ended_on_purpose(batch):
    model, optimizer = build()
    with contextlib.closing(optimizer.turns("image", "table")) as turns:
        next(turns)
        optimizer.guide("table", *backward(model, batch))
    optimizer.step()
    assert (optimizer.stats.modality, optimizer.stats.guides) == (None, ("table",))
    turns.close()


def test_an_abandoned_round_closed_late_does_not_end_the_next(batch):
    model, optimizer = build()
    abandoned = optimizer.turns("image", "table")
    next(abandoned)
    current = optimizer.turns("image", "table")
    next(current)
    abandoned.close()
    for modality in ("image", "table"):
        optimizer.guide(modality, *backward(model, batch))
    optimizer.step()
    assert (optimizer.stats.modality, optimizer.stats.guides) == ("image", ("table",))
    current.close()
    optimizer.step()
    assert optimizer.stats.modality is None


def test_rounds_that_are_interleaved_take_turns_as_they_are_asked(batch):
    model, optimizer = build()
    one, other = optimizer.turns("image", "table"), optimizer.turns("image", "table")
    assert next(one) == next(other) == Turn("image", ("table",))
    assert next(one) == Turn("table", ("image",))
    assert next(other) == Turn("table", ("image",))
    optimizer.guide("image", *backward(model, batch))
    assert next(one, None) is None  # it is the other round's turn
    optimizer.step()
    assert (optimizer.stats.modality, optimizer.stats.guides) == ("table", ("image",))


def test_a_turn_names_the_modality_and_its_guides():
    _, optimizer = build(guides="others")
    turns = list(optimizer.turns("image", "table", "audio"))
    assert turns[1] == Turn("table", ("audio", "image"))


@pytest.mark.parametrize("modality", ["Table", "tabel", ""])
@pytest.mark.parametrize("modalities", [("image", "table"), ("image",), ("image", "table", "audio")], ids=len)
def test_a_guide_of_another_name_is_refused_in_a_round(modalities, modality, batch):
    model, optimizer = build(*modalities)
    evidence = backward(model, batch)
    for turn in optimizer.turns(*modalities):
        before = optimizer.state_dict()["gaal_surgery"]
        with pytest.raises(ValueError, match=rf"one of the open round, .*'image'.*, not '{modality}'"):
            optimizer.guide(modality, *evidence)
        assert optimizer.state_dict()["gaal_surgery"] == before
        optimizer.guide(turn.modality, *evidence)
    optimizer.guide(modality, *evidence)  # outside a round a name is a name


def test_a_copy_in_a_turn_goes_on_by_itself(batch):
    model, optimizer = build()
    turns = optimizer.turns("image", "table")
    next(turns)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    next(turns)
    its_optimizer.guide("table", *backward(twin, batch))
    its_optimizer.step()
    assert its_optimizer.stats.modality == "image"
    optimizer.guide("image", *backward(model, batch))
    optimizer.step()
    assert optimizer.stats.modality == "table"


def test_evidence_is_kept_without_a_graph_and_without_a_copy(batch):
    model, optimizer = build()
    features = model.encoders["image"](batch[0]["image"])
    optimizer.guide("image", features, batch[1])
    kept = optimizer.state_dict()["gaal_surgery"]["guides"]["image"]
    assert not kept["features"].requires_grad
    assert kept["features"].data_ptr() == features.data_ptr()
    assert torch.equal(kept["target"], batch[1])
