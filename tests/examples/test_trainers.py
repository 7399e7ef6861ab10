"""The scripts of examples/trainers against the plain loop, with the trainers' own checkpoints, in two processes."""

from __future__ import annotations

import os
import runpy
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import lightning.fabric.plugins
import lightning.pytorch.plugins
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from processes import run_in_group
from reference import assert_identical
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import default_collate
from trainers import with_accelerate, with_fabric, with_lightning, with_torchrun, with_transformers
from trainers.problem import MODALITIES, Model, rows

from gaal_surgery import GradientAlignedAlternator, HalfSpace

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "trainers"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
GUIDANCE = ["fresh", "cached"]
MARGIN = 0.9  # at 0 the digits' first epochs meet no conflict, and guides would change nothing


@pytest.fixture(autouse=True)
def _accelerate_starts_anew():
    """Accelerate keeps device and precision in singletons, which Hugging Face's Trainer shares."""
    yield
    forget_accelerate()


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def lightning_trainer(folder, **options):
    return with_lightning.main(margin=MARGIN, accelerator="cpu", default_root_dir=folder, **QUIET, **options)


def fabric(folder, **options):
    return with_fabric.main(margin=MARGIN, accelerator="cpu", **options)


def accelerate(folder, **options):
    return with_accelerate.main(margin=MARGIN, cpu=True, **options)


def transformers(folder, **options):
    options = {"save_strategy": "no", "disable_tqdm": True, **options}
    return with_transformers.main(margin=MARGIN, output_dir=str(folder), use_cpu=True, **options)


TRAINERS = {
    "lightning": lightning_trainer,
    "fabric": fabric,
    "accelerate": accelerate,
    "transformers": transformers,
}


@cache
def plain_loop(
    epochs=1, guidance="fresh", *, batch=50, micro_batches=1,
    autocast=None, dtype=torch.float32, outputs=None, init_scale=None,
):  # fmt: skip
    """What the scripts do, in plain PyTorch with every guide's encoder run anew.

    Returns:
        The model, and the number of steps that the scaler skipped.
    """
    torch.manual_seed(0)
    model = Model().to(dtype)
    samples = default_collate(rows("train"))
    samples = {name: column.to(dtype) if column.is_floating_point() else column for name, column in samples.items()}
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = GradientAlignedAlternator(sgd, model.head, rule=HalfSpace(MARGIN, relative=True))
    scaler = torch.amp.GradScaler("cpu", enabled=init_scale is not None, init_scale=init_scale or 1.0)
    skipped = []

    def run(*given):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return model(*given).to(outputs or dtype)

    for epoch in range(epochs):
        order = torch.randperm(len(samples["labels"]), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(batch):
            parts = chosen.chunk(micro_batches)
            group = [{name: column[part] for name, column in samples.items()} for part in parts]
            labels = samples["labels"][chosen]
            for turn in optimizer.turns(*MODALITIES):
                features = []
                for micro in group:
                    part = run(micro, turn.modality)
                    features.append(part.detach())
                    logits = run(part.to(dtype))
                    scaler.scale(F.cross_entropy(logits, micro["labels"]) / micro_batches).backward()
                if guidance == "fresh":
                    for guide in turn.guides:
                        with torch.no_grad():
                            optimizer.guide(guide, torch.cat([run(micro, guide) for micro in group]), labels)
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                skipped.append(scaler.get_scale() < scale)
                optimizer.zero_grad()
                if guidance == "cached":
                    optimizer.guide(turn.modality, torch.cat(features), labels)
    return model, sum(skipped)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_ends_where_the_plain_loop_does(trainer, guidance, tmp_path):
    model = TRAINERS[trainer](tmp_path, epochs=2, guidance=guidance)
    assert_identical(model.state_dict(), plain_loop(2, guidance)[0].state_dict())


def test_guidance_changes_what_is_learned():
    """Or equality with the plain loop would say nothing of it."""
    fresh, cached = (plain_loop(1, guidance)[0].head.weight for guidance in GUIDANCE)
    unguided = plain_loop(1, guidance="none")[0].head.weight
    assert not torch.equal(fresh, cached)
    assert not torch.equal(fresh, unguided)
    assert not torch.equal(cached, unguided)


ACCUMULATION = {"accelerate": {"accumulate": 2}, "transformers": {"gradient_accumulation_steps": 2}}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("trainer", ACCUMULATION)
def test_accumulated_micro_batches_are_one_step_of_every_turn(trainer, guidance, tmp_path):
    model = TRAINERS[trainer](tmp_path, epochs=1, guidance=guidance, batch=25, **ACCUMULATION[trainer])
    assert_identical(model.state_dict(), plain_loop(1, guidance, micro_batches=2)[0].state_dict())


BFLOAT16 = {
    "lightning": {"precision": "bf16-mixed"},
    "fabric": {"precision": "bf16-mixed"},
    "accelerate": {"mixed_precision": "bf16"},
    "transformers": {"bf16": True},
}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_mixed_precision_is_that_of_the_plain_loop(trainer, guidance, tmp_path):
    model = TRAINERS[trainer](tmp_path, epochs=1, guidance=guidance, **BFLOAT16[trainer])
    assert_identical(model.state_dict(), plain_loop(1, guidance, autocast=torch.bfloat16)[0].state_dict())


PLUGINS = {
    "lightning": lightning.pytorch.plugins.MixedPrecision,
    "fabric": lightning.fabric.plugins.MixedPrecision,
}
SCALE = 2.0**20  # large enough for gradients to overflow in the first steps


def half_precision(trainer):
    """The plugin of precision="16-mixed", which on a CPU is bf16-mixed to Lightning and an error to Hugging Face."""
    return PLUGINS[trainer]("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=SCALE))


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("trainer", PLUGINS)
def test_scaled_gradients_that_overflow_skip_the_steps_of_the_plain_loop(trainer, guidance, tmp_path):
    model = TRAINERS[trainer](tmp_path, epochs=1, guidance=guidance, plugins=half_precision(trainer))
    expected, skipped = plain_loop(1, guidance, autocast=torch.float16, init_scale=SCALE)
    assert 0 < skipped < 10
    assert_identical(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("trainer", PLUGINS)
def test_double_precision_is_that_of_the_plain_loop(trainer, guidance, tmp_path):
    model = TRAINERS[trainer](tmp_path, epochs=1, guidance=guidance, precision="64-true")
    outputs = torch.float32 if trainer == "fabric" else None  # Fabric hands out float32 whatever goes on inside
    expected, _ = plain_loop(1, guidance, dtype=torch.float64, outputs=outputs)
    assert model.head.weight.dtype is torch.float64
    assert_identical(model.state_dict(), expected.state_dict())


# Checkpoints: the options of a run that stops, and of one that goes on.

STOPS = {
    "lightning": lambda folder: {},
    "fabric": lambda folder: {"checkpoint": folder / "state.ckpt"},
    "accelerate": lambda folder: {"save": folder},
    "transformers": lambda folder: {"save_strategy": "epoch"},
}
GOES_ON = {
    "lightning": lambda folder: {"resume": next(folder.glob("checkpoints/*.ckpt"))},
    "fabric": lambda folder: {"checkpoint": folder / "state.ckpt"},
    "accelerate": lambda folder: {"resume": max(folder.glob("epoch_*"))},
    "transformers": lambda folder: {"resume": max(folder.glob("checkpoint-*"))},
}


def train_in_two_runs(trainer, folder, *, options_of_run=dict, **options):
    """Stopped after one epoch of two, and resumed from the trainer's own checkpoint."""
    train = TRAINERS[trainer]
    train(folder, epochs=1, **STOPS[trainer](folder), **options_of_run(), **options)
    return train(folder, epochs=2, **GOES_ON[trainer](folder), **options_of_run(), **options)


def test_lightning_counts_turns_and_hugging_face_rounds(tmp_path):
    for trainer in ("lightning", "transformers"):
        TRAINERS[trainer](tmp_path, epochs=1, **STOPS[trainer](tmp_path))
    assert (tmp_path / "checkpoints" / "epoch=0-step=20.ckpt").exists()
    assert (tmp_path / "checkpoint-10").exists()


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_hugging_faces_trainer_resumes_amid_an_epoch(guidance, tmp_path):
    transformers(tmp_path, guidance=guidance, max_steps=13, save_strategy="steps", save_steps=13)
    model = transformers(tmp_path, epochs=2, guidance=guidance, resume=tmp_path / "checkpoint-13")
    assert_identical(model.state_dict(), plain_loop(2, guidance)[0].state_dict())


resumes_in_its_folder = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty"  # Lightning's, of the run that is resumed
)


@resumes_in_its_folder
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_resumed_run_equals_the_uninterrupted_one(trainer, guidance, tmp_path):
    model = train_in_two_runs(trainer, tmp_path, guidance=guidance)
    assert_identical(model.state_dict(), plain_loop(2, guidance)[0].state_dict())


@resumes_in_its_folder
@pytest.mark.parametrize("trainer", PLUGINS)
def test_a_resumed_run_goes_on_with_the_scale_it_had(trainer, tmp_path):
    def scaled():
        return {"plugins": half_precision(trainer)}

    model = train_in_two_runs(trainer, tmp_path, options_of_run=scaled, guidance="cached")
    expected, _ = plain_loop(2, "cached", autocast=torch.float16, init_scale=SCALE)
    assert_identical(model.state_dict(), expected.state_dict())


# Two processes, as torchrun would start them.

# With other batches rounding may exchange two samples at the border of the selection, which is felt from then on. In
# float64 several processes end where one does to 1e-12, whatever the batches: tests/test_distributed.py.
BATCH = 25
DISTRIBUTED = {
    "lightning": {"devices": 2, "strategy": "ddp_find_unused_parameters_true"},
    "fabric": {"devices": 2, "strategy": "ddp_find_unused_parameters_true"},
    "accelerate": {},
    "transformers": {},
}


def train_on_this_rank(folder):
    """By trainer and recipe, the weights after an uninterrupted run, and after a resumed one of two epochs."""
    rank = str(dist.get_rank())
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    weights = {}
    with mock.patch.dict(os.environ, ranks, TORCHELASTIC_RUN_ID="1"):
        for trainer, train in TRAINERS.items():
            options = {"batch": BATCH, **DISTRIBUTED[trainer]}
            for guidance in GUIDANCE:
                own = folder / f"{trainer}_{guidance}"
                through = train(own / "through", epochs=2, guidance=guidance, **options)
                resumed = train_in_two_runs(trainer, own, guidance=guidance, **options)
                weights[trainer, guidance] = arrays(through), arrays(resumed)
            if trainer in ACCUMULATION:
                weights[trainer, "accumulated"] = arrays(train(folder, epochs=1, **options, **ACCUMULATION[trainer]))
            forget_accelerate()
    return weights


def arrays(model):
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


@pytest.fixture(scope="module")
def weights_of_ranks(tmp_path_factory):
    return run_in_group(2, train_on_this_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_equal_one_on_the_joint_batch(trainer, guidance, weights_of_ranks):
    first, second = (weights[trainer, guidance][0] for weights in weights_of_ranks)
    np.testing.assert_equal(first, second)
    for name, weight in plain_loop(2, guidance, batch=2 * BATCH)[0].state_dict().items():
        np.testing.assert_allclose(first[name], weight, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ACCUMULATION)
def test_two_processes_accumulate_as_one_does(trainer, weights_of_ranks):
    first, second = (weights[trainer, "accumulated"] for weights in weights_of_ranks)
    np.testing.assert_equal(first, second)
    for name, weight in plain_loop(1, batch=4 * BATCH)[0].state_dict().items():
        np.testing.assert_allclose(first[name], weight, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_with_fresh_guides_resume_to_the_bit(trainer, weights_of_ranks):
    for weights in weights_of_ranks:
        through, resumed = weights[trainer, "fresh"]
        np.testing.assert_equal(resumed, through)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_with_cached_guides_resume_with_those_of_rank_0(trainer, weights_of_ranks):
    """The first turn is guided by half the batch, on both ranks: they agree, with each other alone."""
    (through, resumed), (_, others) = (weights[trainer, "cached"] for weights in weights_of_ranks)
    np.testing.assert_equal(resumed, others)
    assert not np.array_equal(resumed["head.weight"], through["head.weight"])
    np.testing.assert_allclose(resumed["head.weight"], through["head.weight"], atol=0.05)


# Plain PyTorch in two processes.


def train_in_plain_pytorch_on_this_rank(folder, parallel, guidance):
    """The weights after an uninterrupted run, and after one that a checkpoint of torch resumes."""
    settings = {"parallel": parallel, "guidance": guidance, "margin": MARGIN, "epochs": 2, "batch": BATCH}
    through = with_torchrun.main(save=folder, **settings)
    resumed = with_torchrun.main(resume=folder / "epoch_1", **settings)
    return whole_arrays(through), whole_arrays(resumed)


def whole_arrays(model):
    """As arrays, the shards put together."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: weight.numpy() for name, weight in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_plain_pytorch_in_two_processes_equals_one_on_the_joint_batch(parallel, guidance, tmp_path):
    ranks = run_in_group(2, train_in_plain_pytorch_on_this_rank, tmp_path, parallel, guidance)
    through, resumed = ranks[0]
    for name, weight in plain_loop(2, guidance, batch=2 * BATCH)[0].state_dict().items():
        np.testing.assert_allclose(through[name], weight, rtol=0, atol=1e-6)
    if guidance == "fresh":
        np.testing.assert_equal(resumed, through)
    else:  # such a checkpoint has no guides: the first turn after it is unguided
        assert not np.array_equal(resumed["head.weight"], through["head.weight"])
        np.testing.assert_allclose(resumed["head.weight"], through["head.weight"], atol=0.05)


# The command line.

COMMANDS = {
    "lightning": ["--accelerator", "cpu", "--enable_progress_bar", "false", "--enable_model_summary", "false"],
    "fabric": ["--accelerator", "cpu", "--devices", "1"],
    "accelerate": ["--cpu", "true", "--mixed_precision", "bf16"],
    "transformers": ["--use_cpu", "true", "--max_grad_norm", "2.0", "--save_strategy", "no", "--output_dir", "out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_script_runs_by_itself(trainer, tmp_path, monkeypatch, capsys):
    script = SCRIPTS / f"with_{trainer}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--epochs", "6", *COMMANDS[trainer]])
    runpy.run_path(str(script), run_name="__main__")
    assert float(capsys.readouterr().out.split("test accuracy")[1]) > 0.9
