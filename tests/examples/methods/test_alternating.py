"""Alternation, GAAL and GAAL*: turns, guides, and what their settings change."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from tabular_image.methods.gaal import GAAL
from toy import Noting, batches, build, equal_states, fit


class Watched(Noting, GAAL):
    """The method, and what its steps moved."""


def without_statistics(state):
    return {name: value for name, value in state.items() if "running" not in name and "tracked" not in name}


ORDERS = {"table_first": ("table", "image"), "image_first": ("image", "table")}
ORDER = pytest.mark.parametrize("order", ORDERS)


@ORDER
@pytest.mark.parametrize("guidance", ["fresh", "cached"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_turn_leaves_the_idle_encoder_and_its_optimizer_state_bit_identical(guidance, optimizer, order):
    settings = {"guidance": guidance, "order": order}
    method = fit(build(Watched, settings=settings, optimizer=optimizer, weight_decay=0.1))
    assert len(method.notes) == 1 + 2 * len(batches())
    for position, (before, after) in enumerate(zip(method.notes, method.notes[1:], strict=False)):
        active, idle = ORDERS[order] if position % 2 == 0 else ORDERS[order][::-1]
        # Running statistics are counted where a pass is first asked for, which may be as a guide.
        assert equal_states(without_statistics(before[idle]), without_statistics(after[idle]))
        common = before[active].keys() & after[active].keys()
        assert not any(torch.equal(before[active][name], after[active][name]) for name in common if "weight" in name)


@ORDER
@pytest.mark.parametrize("align", ["gradient", "update"])
@pytest.mark.parametrize("guidance", ["fresh", "cached"])
def test_alternating_is_a_plain_loop_of_turns(guidance, align, order):
    settings = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.1}
    method = build("alternating", settings={"guidance": guidance, "align": align, "order": order}, **settings)
    plain = copy.deepcopy(method)
    fit(method)

    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=0.1)
    plain.train()
    for batch in batches():
        for modality in ORDERS[order]:
            logits = plain.head(plain.encoders[modality](batch[modality]))
            F.cross_entropy(logits, batch["target"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("encoders", "head"):
        assert equal_states(getattr(method, name).state_dict(), getattr(plain, name).state_dict())


def test_alternating_observes_and_gaal_intervenes():
    observed = fit(build("alternating")).monitor.history()
    steered = fit(build("gaal", settings={"rule": "orthogonal"})).monitor.history()
    assert len(observed["step"]) == len(steered["step"]) == 2 * len(batches())
    assert not any(observed["intervened"])
    assert all(steered["intervened"])
    assert observed["cosine_before"][0] == steered["cosine_before"][0] != 0
    assert steered["cosine_after"][0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, {"image": 1, "table": 2}),
        ({"order": "image_first"}, {"image": 2, "table": 1}),
        ({"guidance": "cached"}, {"image": 1, "table": 1}),
        ({"idle_moves": True}, {"image": 2, "table": 2}),
    ],
)
def test_the_encoder_of_the_last_turn_runs_once_a_round(settings, passes):
    method, calls = build("gaal", settings=settings), Counter()
    for name, encoder in method.encoders.items():
        encoder.register_forward_hook(lambda its, *_, name=name: calls.update([name] * its.training))
    fit(method)
    assert calls == {name: count * len(batches()) for name, count in passes.items()}


def test_random_guides_are_drawn_and_uncertain_ones_are_not():
    def cosines(uncertainty, seed):
        method = build("gaal", settings={"uncertainty": uncertainty})
        torch.manual_seed(seed)
        return fit(method).monitor.history()["cosine_before"]

    assert cosines("random", 1) != cosines("random", 2)
    assert cosines("entropy", 1) == cosines("entropy", 2)


def test_the_idle_encoder_moves_only_when_asked_to():
    encoders = [fit(build(Watched, settings={"idle_moves": moves}, optimizer="adam")).notes for moves in (False, True)]
    for notes, moves in zip(encoders, (False, True), strict=True):
        before, after_table = notes[0]["image"], notes[1]["image"]
        weights = [name for name in before if name.endswith("weight")]
        assert all(torch.equal(before[name], after_table[name]) != moves for name in weights)


def test_gaal_star_trains_as_gaal_and_never_looks_at_a_table():
    star, gaal = fit(build("gaal_star")), fit(build("gaal"))
    for name in ("encoders", "head"):
        assert equal_states(getattr(star, name).state_dict(), getattr(gaal, name).state_dict())
    batch = batches()[0]
    logits = star.eval()({"image": batch["image"]})
    assert list(logits) == ["image"]
    assert torch.equal(logits["image"], gaal.eval()(batch)["image"])
