"""What only a GPU can show; the rest of the suite stands for the mathematics."""

import copy

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from heads import KINDS
from processes import run_in_group
from wrapped import ALIGN

from gaal_surgery import GradientAlignedAlternator, HalfSpace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def build(inner=torch.optim.SGD, *, align="gradient", **settings):
    model = reference.make_model().cuda()
    settings = {"lr": 0.01, **settings}
    return model, GradientAlignedAlternator(
        inner(model.parameters(), **settings), model.head, align=align, rule=HalfSpace(0.5, relative=True)
    )


def on_gpu(batch):
    inputs, target = batch
    return {name: value.cuda() for name, value in inputs.items()}, target.cuda()


def batches(count):
    return [on_gpu(batch) for batch in reference.make_batches(count, size=32)]


@ALIGN
@pytest.mark.parametrize("recipe", ["fresh", "cached"])
def test_a_turn_never_waits_for_the_device(align, recipe):
    model, optimizer = build(align=align)
    rounds = batches(4)
    reference.train(optimizer, model, rounds[:1], recipe=recipe)  # torch's own first calls may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in rounds[1:]:
            list(reference.take_turns(optimizer, model, batch, recipe=recipe))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.stats.guides == ("image",)


@ALIGN
def test_a_round_is_captured_in_a_graph(align):
    model, optimizer = build(torch.optim.Adam, align=align, capturable=True)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    rounds = batches(6)
    inputs, target = copy.deepcopy(rounds[0])

    def turn_by_turn():
        list(reference.take_turns(optimizer, model, (inputs, target)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            turn_by_turn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn_by_turn()
    for fresh, its_target in rounds[1:]:
        for name, value in fresh.items():
            inputs[name].copy_(value)
        target.copy_(its_target)
        graph.replay()
    reference.train(its_optimizer, twin, [*[rounds[0]] * 3, *rounds[1:]])
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


@ALIGN
@pytest.mark.parametrize("fused", [False, True])
def test_half_precision_with_scaling(align, fused):
    model, optimizer = build(torch.optim.AdamW, align=align, fused=fused)
    scaler = torch.amp.GradScaler("cuda")
    first = None
    for inputs, target in batches(1) * 60:
        for turn in optimizer.turns(*inputs):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = F.cross_entropy(model.head(model.encoders[turn.modality](inputs[turn.modality])), target)
                with torch.no_grad():
                    optimizer.guide(turn.guides[0], model.encoders[turn.guides[0]](inputs[turn.guides[0]]), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        first = first or float(loss)
    assert float(loss) < 0.9 * first
    assert optimizer.stats.guides == ("image",)


@ALIGN
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn with dropout"])
def test_recurrent_heads_are_guided_by_cudnn(name, max_norm, align):
    """As on the CPU, but for dropout, which the head has in its own turns alone."""
    kind, moved = KINDS[name], {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        head = kind.build().to(device).eval()
        inner = torch.optim.SGD(head.parameters(), lr=0.1)
        rule = HalfSpace(0.9, relative=True)
        optimizer = GradientAlignedAlternator(inner, head, align=align, rule=rule, max_norm=max_norm)
        with torch.backends.cudnn.flags(enabled=False):  # the user's own backward pass in eval mode
            features, target = kind.batch(seed=1)
            F.cross_entropy(head(features.to(device)), target.to(device)).backward()
        features, target = kind.batch(seed=2)
        optimizer.guide("other", features.to(device), target.to(device))
        optimizer.step()
        moved[device] = [parameter.detach().cpu() for parameter in head.parameters()]
    torch.testing.assert_close(moved["cuda"], moved["cpu"], rtol=1e-4, atol=1e-5)


def train_on_own_gpu():
    torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="nccl")
    model, _ = build()
    optimizer = GradientAlignedAlternator(torch.optim.SGD(model.parameters(), lr=0.1), model.head, process_group=group)
    for inputs, target in batches(3):
        rows = torch.arange(len(target)).chunk(2)[dist.get_rank()]
        for turn in optimizer.turns(*inputs):
            features = model.encoders[turn.modality](inputs[turn.modality][rows])
            F.cross_entropy(model.head(features), target[rows]).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, dist.ReduceOp.AVG, group=group)
            guide = turn.guides[0]
            optimizer.guide(guide, model.encoders[guide](inputs[guide][rows]), target[rows])
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_stay_alike():
    reference.assert_identical(*run_in_group(2, train_on_own_gpu))
