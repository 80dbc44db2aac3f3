"""engine/optim.py: small steps against float32 AdamW, clipping, resume bit for bit on a CPU, bytes,
the schedule against the library's."""
import copy
import importlib
import itertools
import math
import re
import typing

import pytest
import torch
import transformers
from helpers import stops

from engine import optim, run
from selfplay.turns import Turn

BETAS = (0.9, 0.95)  # of 01 and 02


# ---- small steps ---------------------------------------------------------------------------------

def start():
    """Weights as models have them, exact in bfloat16: a matrix of std .02 and a norm's ones."""
    g = torch.Generator().manual_seed(0)
    weights = dict(matrix=torch.randn(64, 64, generator=g) * 0.02, norm=torch.ones(64))
    return {k: v.bfloat16().float() for k, v in weights.items()}


def model_of(weights, dtype):
    return torch.nn.ParameterDict({k: torch.nn.Parameter(v.to(dtype, copy=True))
                                   for k, v in weights.items()})


def gradients(steps, pieces):
    """For each step, `pieces` micro-batches' gradients, exact in bfloat16: a direction that stays
    and noise three times as large."""
    g = torch.Generator().manual_seed(1)
    stays = {k: torch.randn(v.shape, generator=g) for k, v in start().items()}
    for _ in range(steps):
        yield [{k: (v + 3 * torch.randn(v.shape, generator=g)).bfloat16().float()
                for k, v in stays.items()} for _ in range(pieces)]


def flat(tensors):
    return torch.cat([x.detach().float().flatten() for x in tensors])


def cosine(a, b):
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()).clamp_min(1e-30))


def backward(model, piece):
    sum((model[k] * g.to(model[k].dtype)).sum() for k, g in piece.items()).backward()


def held(optimizer):
    """The weights that an optimizer goes on from, float32."""
    if isinstance(optimizer, optim.MasterAdamW):
        return flat(optimizer.master)
    return flat(optimizer.params) + flat(optimizer.lost)


@pytest.mark.parametrize("lr", [5e-7, 1e-5])
def test_small_steps_are_not_lost(lr):
    """100 steps of 4 micro-batches on bfloat16 weights move as float32 AdamW does on the same
    gradients; plain AdamW on bfloat16 weights, the control, does not."""
    began, exact = start(), model_of(start(), torch.float32)
    plain = model_of(start(), torch.bfloat16)
    peers = [torch.optim.AdamW(m.parameters(), lr=lr, betas=BETAS, weight_decay=0.0)
             for m in (exact, plain)]
    models, ours = {}, {}
    for kind, optimizer_of in optim.OPTIMIZERS.items():
        models[kind] = model_of(start(), torch.bfloat16)
        ours[kind] = optimizer_of(models[kind], BETAS, 0.0)
    for pieces in gradients(100, 4):
        for model, peer in zip((exact, plain), peers):
            for k in model:
                model[k].grad = sum(p[k] for p in pieces).to(model[k].dtype)
            peer.step()
        for kind, model in models.items():
            for piece in pieces:
                backward(model, piece)
                ours[kind].collect()
            assert ours[kind].step(lr, 1e9) > 0
    want = flat(exact.values()) - flat(began.values())
    assert want.abs().max() > 20 * lr
    for kind, optimizer in ours.items():
        assert cosine(held(optimizer) - flat(began.values()), want) >= 0.99, kind
        # what the model computes with is that, rounded (2^-8 at most; tiny weights a little more)
        torch.testing.assert_close(flat(models[kind].values()), held(optimizer), rtol=2 ** -7,
                                   atol=0)
    assert cosine(flat(plain.values()) - flat(began.values()), want) < 0.9


def test_kahan_keeps_small_weight_decay():
    """lr x decay = 1e-5 of the weight: 100 steps without gradient shrink it by 1e-3, as far as 8
    bits of compensation tell (equal steps are rounded alike, by 14 % in the last half for 1.0)."""
    model = model_of(start(), torch.bfloat16)
    optimizer, began = optim.KahanAdamW(model, BETAS, 0.1), flat(start().values())
    for _ in range(100):
        backward(model, {k: torch.zeros_like(v) for k, v in start().items()})
        optimizer.step(1e-4, 1.0)
    change = held(optimizer) - began
    assert cosine(change, -began) > 0.99
    assert float(change.norm() / began.norm()) == pytest.approx(1e-3, rel=0.1)


# ---- the interface -------------------------------------------------------------------------------

def toy(dtype):
    """A linear layer of 64 x 64 whose float32 weights are exact in bfloat16."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16().float())
    return layer.to(dtype)


def toy_steps(layer, n):
    """n losses of the toy problem, one at a time: the caller calls backward on each."""
    g = torch.Generator().manual_seed(1)
    target = torch.randn(64, 64, generator=g)
    for _ in range(n):
        x = torch.randn(32, 64, generator=g)
        yield ((layer(x.to(layer.weight.dtype)).float() - x @ target) ** 2).mean()


@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_float32_is_adamw_with_clipping(kind):
    """float32: equal to torch's AdamW with clip_grad_norm_, two collected halves to their sum."""
    layer, want = toy(torch.float32), toy(torch.float32)
    mine = optim.OPTIMIZERS[kind](layer, BETAS, 0.1)
    adamw = torch.optim.AdamW(want.parameters(), lr=1.0, betas=BETAS, weight_decay=0.1)
    g = torch.Generator().manual_seed(2)
    for step in range(5):
        lr, halves = 1e-3 * (step + 1), [torch.randn(8, 64, generator=g) for _ in range(2)]
        adamw.param_groups[0]["lr"] = lr
        adamw.zero_grad()
        sum((want(x) ** 2).sum() for x in halves).backward()
        norm = torch.nn.utils.clip_grad_norm_(want.parameters(), 0.5)
        adamw.step()
        for x in halves:
            (layer(x) ** 2).sum().backward()
            mine.collect()
        assert mine.step(lr, 0.5) == pytest.approx(float(norm), rel=1e-5)
        assert norm > 0.5 and layer.weight.grad is None
        torch.testing.assert_close(layer.weight, want.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_bfloat16_gradients_are_clipped(kind):
    """A gradient of norm 640 (64 x 64 tens) is a gradient of norm 1 for the moments."""
    layer = toy(torch.bfloat16)
    optimizer = optim.OPTIMIZERS[kind](layer, BETAS, 0.0)
    layer.weight.grad = torch.full_like(layer.weight, 10.0)
    optimizer.collect()
    assert optimizer.step(1e-3, 1.0) == pytest.approx(640.0, rel=1e-4)
    assert float(optimizer.tensors()["exp_avg.0"].float().norm()) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("kind, dtype, count", [
    ("master", torch.bfloat16, 4), ("master", torch.float32, 4),  # master, step, two moments
    ("kahan", torch.bfloat16, 5), ("kahan", torch.float32, 4)])   # weight, lost, the same
def test_state_continues_bit_for_bit(kind, dtype, count, tmp_path):
    from safetensors.torch import load_file, save_file

    def run(layer, optimizer, losses):
        for loss in losses:
            loss.backward()
            optimizer.collect()
            optimizer.step(1e-3, 1.0)

    layer = toy(dtype)
    optimizer = optim.OPTIMIZERS[kind](layer, BETAS, 0.01)
    losses = toy_steps(layer, 6)
    run(layer, optimizer, itertools.islice(losses, 3))
    save_file({k: v.detach().contiguous() for k, v in optimizer.tensors().items()},
              tmp_path / "state.safetensors")
    run(layer, optimizer, losses)
    fresh = toy(dtype)
    with torch.no_grad():
        fresh.weight.zero_()  # restore() brings the weights too
    again = optim.OPTIMIZERS[kind](fresh, BETAS, 0.01)
    again.restore(load_file(tmp_path / "state.safetensors"))
    g = toy_steps(fresh, 6)
    for _ in range(3):
        next(g)
    run(fresh, again, g)
    assert torch.equal(fresh.weight, layer.weight)
    left, right = optimizer.tensors(), again.tensors()
    assert left.keys() == right.keys() and len(left) == count
    assert all(torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left)
    assert not torch.equal(layer.weight, toy(dtype).weight)


@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_restored_step_count_is_where_the_fused_kernel_wants_it(kind):
    """torch keeps `step` on the parameter's device when fused
    (Optimizer._process_value_according_to_param_policy)."""
    optimizer = optim.OPTIMIZERS[kind](toy(torch.float32).to("meta"), BETAS, 0.0)
    optimizer.restore({"step.0": torch.tensor(3.0), **dict.fromkeys(
        (*optimizer.kept, "exp_avg.0", "exp_avg_sq.0"), torch.zeros(64, 64))})
    [state] = optimizer.adamw.state.values()
    assert optimizer.adamw.defaults["fused"] and state["step"].device.type == "meta"


# ---- what is not restored, what is not applied ---------------------------------------------------

@pytest.mark.parametrize("change, said", [
    (lambda t, kept: t.pop(kept), "None, not [64, 64]"),
    (lambda t, kept: t.update({kept: torch.ones(1)}), "[1], not [64, 64]"),  # would be broadcast
    (lambda t, kept: t.update({"exp_avg.0": torch.ones(64)}), "exp_avg.0 has the shape [64], not"),
    (lambda t, kept: t.update({"step.0": torch.ones(1)}), "step.0 has the shape [1], not []"),
    (lambda t, kept: t.pop("exp_avg_sq.0"), "exp_avg_sq.0 has the shape None, not [64, 64]"),
    (lambda t, kept: t.pop("step.0"), "exp_avg.0 has the shape [64, 64], not None"),
    (lambda t, kept: t.update({"lost.7": torch.ones(2)}), "lost.7 has the shape [2], not None")])
@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_the_state_of_another_model_stops(kind, change, said):
    layer = toy(torch.float32)
    optimizer = optim.OPTIMIZERS[kind](layer, BETAS, 0.0)
    next(toy_steps(layer, 1)).backward()
    optimizer.collect()
    optimizer.step(1e-3, 1.0)
    tensors = {name: t.clone() for name, t in optimizer.tensors().items()}
    change(tensors, next(iter(optimizer.kept)))
    before = layer.weight.clone()
    assert said in stops(optimizer.restore, tensors)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(kind, dtype, bad):
    """One bad number in one gradient, before the first step and after it: weights and state stay
    those of a twin without it, and the next step moves both alike."""
    layers = [toy(dtype), toy(dtype)]
    optimizers = [optim.OPTIMIZERS[kind](layer, BETAS, 0.1) for layer in layers]

    def step(which, *values):
        grad = torch.full_like(layers[which].weight, 0.1)
        grad[3, :len(values)] = torch.tensor(values)
        layers[which].weight.grad = grad
        optimizers[which].collect()
        return optimizers[which].step(1e-2, 1.0)

    for _ in range(3):
        assert not math.isfinite(step(0, bad))
        left, right = [optimizer.tensors() for optimizer in optimizers]
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
        assert torch.equal(layers[0].weight, layers[1].weight)
        assert layers[0].weight.grad is None
        assert step(0) == step(1) == pytest.approx(6.4, rel=0.01)


@pytest.mark.parametrize("bad, skipped", [("", 0), ("reward", 2), ("gradient", 2), ("no turns", 0)])
def test_self_play_leaves_out_updates_that_are_not_finite(loaded, monkeypatch, capsys, bad,
                                                          skipped):
    """Two updates on two turns each; a bad reward makes all returns of its role bad."""
    rl, start = importlib.import_module("02_selfplay_rl"), loaded["llama"][0]
    for name, value in dict(UPDATES=2, LR=1e-3, WARMUP=0.0, SFT_COEF=0.0).items():
        monkeypatch.setattr(rl, name, value)
    model, turns = copy.deepcopy(start), []
    for i in range(4):
        reward = math.nan if (i, bad) == (0, "reward") else float(i % 2)
        turns.append(Turn(("attacker", "defender")[i // 2], "vanilla_harmful", {}, [5, 6],
                          ids=[7, 8 + i], logps=[-1.0, -2.0], reward=reward))
    if bad == "gradient":
        model.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    m = rl.learn(model, start, optim.MasterAdamW(model, BETAS, 0.0),
                 [] if bad == "no turns" else turns, [], 0)
    assert m["skipped"] == skipped and type(m["skipped"]) is int
    assert capsys.readouterr().out.count("an update was left out") == skipped
    assert all(p.isfinite().all() for p in model.parameters())
    moved = not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert moved == (bad == "")


# ---- the schedule --------------------------------------------------------------------------------

@pytest.mark.parametrize("total, warmup", [
    (10, 0), (10, 3), (100, 1), (1000, 30), (7, 6), (5, 5), (3, 5), (1, 0)])
def test_cosine_with_warmup_is_the_librarys(total, warmup):
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        adamw, warmup, total, min_lr_rate=0.1)
    factors = [optim.cosine_with_warmup(update, total, warmup) for update in range(total + 50)]
    for factor in factors[:total + 1]:
        assert factor == adamw.param_groups[0]["lr"]
        adamw.step()
        schedule.step()
    assert (factors[0] == 0) == (warmup > 0)
    assert factors[warmup] == 1  # the cosine begins where the warm-up has ended
    assert set(factors[max(total, warmup + 1):]) == {0.1}  # the library's would rise again


# ---- bytes a parameter ---------------------------------------------------------------------------

SAID = {"master": (20, 24), "kahan": (10, 16)}  # by hand: the table of optim.py's docstring, summed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_bytes_a_parameter(kind, dtype):
    """All tensors that exist between a backward pass and the step; the step count's 4 bytes for a
    whole tensor are left out."""
    layer = toy(dtype)
    optimizer = optim.OPTIMIZERS[kind](layer, BETAS, 0.0)
    for step, loss in enumerate(toy_steps(layer, 2)):
        loss.backward()
        if step == 0:
            optimizer.collect()
            optimizer.step(1e-3, 1.0)
    there = [layer.weight, layer.weight.grad, *optimizer.tensors().values()]
    there += [x.grad for x in getattr(optimizer, "master", [])]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in there if x.numel() > 1}
    size = dtype.itemsize
    want = SAID[kind][size == 4]
    assert sum(storages.values()) / layer.weight.numel() == want
    assert optim.BYTES[kind, size] + 2 * size == want  # what memory.py counts with
    saved = sum(x.untyped_storage().nbytes() for x in optimizer.tensors().values() if x.numel() > 1)
    assert saved / layer.weight.numel() == optim.SAVED[kind, size]  # cost.disk_bytes


def test_the_bytes_that_are_written_down():
    for kind, (half, full) in SAID.items():
        assert re.search(rf'"{kind}" .* {half} \({full}\)$', optim.__doc__, re.MULTILINE)


@pytest.mark.parametrize("script", ["01_sft_warmup", "02_selfplay_rl"])
def test_both_stages_offer_both(script):
    source = (run.ROOT / f"{script}.py").read_text(encoding="utf-8")
    line = re.search(r"^OPTIMIZER: .*$", source, re.MULTILINE).group()
    assert re.search(r"# 20 or 10 bytes a parameter", line)
    assert [half for half, _ in SAID.values()] == [20, 10]
    module = importlib.import_module(script)
    allowed = typing.get_args(module.__annotations__["OPTIMIZER"])
    assert list(allowed) == list(optim.OPTIMIZERS)
    assert module.OPTIMIZER in allowed and module.PAPER["OPTIMIZER"] in allowed
