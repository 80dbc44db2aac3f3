"""engine/slots.py and engine/library.py beside the plain way of sampling, chi-square and the
log-probabilities that are trained on. CUDA graphs themselves are checked by bench/gpu.py."""
import contextlib
import copy
import gc
import types
import weakref

import pytest
import torch
from engine_tools import chi_square_p, frequent_stops, ragged_prompts
from helpers import KINDS, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from engine import adapters, attention, sampling, slots
from engine.logprobs import token_logprobs
from engine.sampling import sample


def ids_of(pairs):
    return [ids for ids, _ in pairs]


def logps_of(pairs):
    return torch.tensor([x for _, logps in pairs for x in logps])


def both(model, tok, prompts, max_new, temperature, batch, **how):
    """The completions of the plain way, all rows at once, and of slots."""
    return [sample(model, tok, prompts, max_new, temperature, size, seeded(2), rollout=way, **how)
            for way, size in (("plain", len(prompts)), ("slots", batch))]


@pytest.mark.parametrize("batch", [1, 3, 8, 23])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_as_the_plain_way(loaded, kind, batch):
    model, tok = loaded[kind]
    tok = frequent_stops(tok)
    prompts = ragged_prompts(tok, 23, seed=3)
    want, got = both(model, tok, prompts, 30, 1.0, batch)
    assert ids_of(got) == ids_of(want) and len(set(map(len, ids_of(got)))) > 5
    torch.testing.assert_close(logps_of(got), logps_of(want), rtol=0, atol=2e-5)
    assert model.config._attn_implementation == "folded"


@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=0.7, top_p=0.8)])
def test_greedy_and_nucleus_are_those_of_the_plain_way(loaded, how):
    model, tok = loaded["qwen2"]
    tok = frequent_stops(tok, 40)
    want, got = both(model, tok, ragged_prompts(tok, 9), 20, batch=4, **how)
    assert ids_of(got) == ids_of(want)


@pytest.mark.parametrize("kind", KINDS)
def test_with_an_adapter(loaded, kind):
    model, tok = copy.deepcopy(loaded[kind][0]), frequent_stops(loaded[kind][1])
    prompts = ragged_prompts(tok, 9)
    plain = ids_of(sample(model, tok, prompts, 12, 1.0, 9, seeded(2)))
    adapters.choose_weights(model, 4, 8, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=seeded(1)))
    want, got = both(model, tok, prompts, 12, 1.0, 4)
    assert ids_of(got) == ids_of(want) != plain


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_a_sliding_window_counts_text_alone(loaded, kind):
    """Windows shorter than the text, in all layers and in half of them."""
    config = copy.deepcopy(loaded[kind][0].config)
    config.sliding_window = 6
    if kind == "qwen2":
        config.use_sliding_window, config.max_window_layers = True, 1
        config.layer_types = ["full_attention"] + ["sliding_attention"] * (
            config.num_hidden_layers - 1)
    model = type(loaded[kind][0])(config).eval()
    model.load_state_dict(loaded[kind][0].state_dict())
    model.set_attn_implementation("sdpa")
    tok = frequent_stops(loaded[kind][1], 3)
    prompts = ragged_prompts(tok, 8, seed=5)
    want, got = both(model, tok, prompts, 20, 1.0, 3)
    assert ids_of(got) == ids_of(want)
    assert ids_of(got) != ids_of(sample(*loaded[kind], prompts, 20, 1.0, 8, seeded(2)))


def test_a_straggler_does_not_hold_the_others(loaded, monkeypatch):
    """Two slots, one row of 40 tokens, 12 rows of a few: the token steps are those of the one. The
    plain way with two rows at a time needs more."""
    model, tok = loaded["llama"]
    prompts = [[5 + k, 6, 7] for k in range(13)]
    limit = {tuple(p): 3 + k % 3 for k, p in enumerate(prompts)} | {(5, 6, 7): 40}
    steps, real = [], slots.Slots.step
    monkeypatch.setattr(slots.Slots, "step", lambda s, b: steps.append(b) or real(s, b))
    owner = {}

    def count_down(s, rows, logits, live, moved):
        """Each row ends after as many tokens as `limit` says."""
        taken(s, rows, logits, live, moved)
        for r in rows.tolist():
            if not moved:
                owner[r] = int(s.uniform_ST[r, 0])
            s.done[r] |= bool(s.count[r] >= limit[tuple(prompts[owner[r]])])
    taken = slots.Slots.take
    monkeypatch.setattr(slots.Slots, "take", count_down)
    uniform = torch.zeros(13, 40, dtype=torch.float64) + torch.arange(13)[:, None]

    class Bar:
        total = 0

        def update(self, n):
            pass

    def pick(logits, uniform_b):
        return logits.argmax(-1), logits.float().amax(-1)
    with torch.no_grad():
        out = slots.complete(model, tok, prompts, uniform, 2, 1, pick, sampling.prefill, 100, Bar())
    assert [len(ids) for ids in ids_of(out)] == [limit[tuple(p)] for p in prompts]
    assert len(steps) == 39


@pytest.mark.parametrize("way", ["slots", "library"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_are_those_of_the_whole_distribution(loaded, way, temperature):
    """Whatever generation_config says; chi-square against float64."""
    model, tok = copy.deepcopy(loaded["qwen2"][0]), loaded["qwen2"][1]
    for name, value in dict(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=2.0,
                            do_sample=True, min_new_tokens=3).items():
        setattr(model.generation_config, name, value)
    prompt, n = ragged_prompts(tok, 1)[0][:6], 3000
    pairs = sample(model, tok, [prompt] * n, 1, temperature, 500, seeded(1), rollout=way)
    counts = torch.bincount(torch.tensor(ids_of(pairs))[:, 0], minlength=model.config.vocab_size)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([prompt])).logits[0, -1]
    assert chi_square_p(counts, torch.softmax(logits / temperature, -1)) > 1e-4


@pytest.mark.parametrize("way", ["slots", "library"])
@pytest.mark.parametrize("kind", KINDS)
def test_logps_are_those_that_are_trained_on(loaded, kind, way):
    model, tok = loaded[kind]
    tok = frequent_stops(tok)
    prompts = ragged_prompts(tok, 24, seed=3)
    runs = []
    for _ in range(2):
        runs.append(sample(model, tok, prompts, 30, 0.7, 6, seeded(2), rollout=way))
    assert ids_of(runs[0]) == ids_of(runs[1])
    lengths = list(map(len, ids_of(runs[0])))
    assert min(lengths) < 5 and max(lengths) > 15
    assert all(ids[-1] in tok.stop_ids or len(ids) == 30 for ids in ids_of(runs[0]))
    with torch.no_grad():
        logp, _ = token_logprobs(model, prompts, ids_of(runs[0]), 0.7)
    torch.testing.assert_close(logps_of(runs[0]), logp, rtol=0, atol=1e-4)
    assert model.config._attn_implementation == "folded"


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_pieces_are_prompts_at_once(loaded, kind, monkeypatch):
    """Pieces of one token, and of two rows' prompts at a time, change nothing."""
    model, tok = loaded[kind]
    prompts = ragged_prompts(tok, 7, seed=4)
    want = both(model, tok, prompts, 6, 1.0, 3)
    for tokens in (5, 40):
        monkeypatch.setattr(sampling, "PREFILL_TOKENS", dict(cpu=tokens))
        for a, b in zip(want, both(model, tok, prompts, 6, 1.0, 3)):
            assert ids_of(a) == ids_of(b)
            torch.testing.assert_close(logps_of(a), logps_of(b), rtol=0, atol=2e-5)


def test_a_token_step_waits_for_no_device(loaded):
    """On the meta device, which has no numbers to wait for, as CUDA would refuse a tensor of the
    CPU."""
    model = copy.deepcopy(loaded["qwen2"][0]).to("meta")
    s = slots.Slots(model, [1, 2], 4, 12, 5, lambda logits, u: sampling.draw(logits, 1.0, u))
    attention.register("slots", s.attend, lambda *args, **kwargs: None)
    model.set_attn_implementation("slots")
    with torch.no_grad():
        s.step(3)
    assert {x.device.type for x in (s.logits, *s.state(), *s.keys)} == {"meta"}


def test_a_step_has_no_operation_that_waits(loaded):
    """With many stop ids, too: there isin() would sort on CUDA, and ask how many it found."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            seen.add(call.overloadpacket.__name__)
            return call(*args, **(kwargs or {}))

    model, seen = copy.deepcopy(loaded["qwen2"][0]), set()
    s = slots.Slots(model, range(40), 4, 12, 5, lambda logits, u: sampling.draw(logits, 1.0, u))
    attention.register("slots", s.attend, lambda *args, **kwargs: None)
    model.set_attn_implementation("slots")
    s.done[:] = False
    with torch.no_grad(), Watch():
        s.step(3)
    assert "index_put_" in seen
    for name in ("isin", "unique", "nonzero", "masked_select", "_local_scalar_dense", "item"):
        assert not [x for x in seen if name in x], seen


def test_all_captures_share_a_stream(loaded, monkeypatch):
    """cuBLAS keeps memory for each stream that it has worked on."""
    made = []
    cuda = types.SimpleNamespace(
        Stream=lambda: made.append(FakeStream()) or made[-1], current_stream=FakeStream,
        stream=lambda s: contextlib.nullcontext(), CUDAGraph=FakeGraph,
        graph=lambda *args, **kwargs: contextlib.nullcontext(), graph_pool_handle=lambda: (0, 1))
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(slots.Slots, "side", None)
    monkeypatch.setattr(slots.Slots, "step", lambda s, b: None)
    for _ in range(2):
        s = slots.Slots(loaded["qwen2"][0], [1], 4, 12, 5, None)
        for b in (1, 2):
            s.capture(b)
    assert len(made) == 1 and s.pool == (0, 1)


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeGraph:
    def replay(self):
        pass


def test_a_graph_that_fails_is_said_and_left_out(loaded, monkeypatch, capsys):
    """As where CUDA refuses to capture: one line, and the same tokens without graphs. The pool that
    torch 2.11 leaves open is closed, and nobody tries again."""
    model, tok = copy.deepcopy(loaded["llama"][0]), loaded["llama"][1]
    prompts = ragged_prompts(tok, 5)
    want = sample(model, tok, prompts, 8, 1.0, 2, seeded(2), rollout="slots")
    tries, closed, real = [], [], slots.Slots.__init__

    def with_graphs(s, *args):
        real(s, *args)
        s.graphs = None if hasattr(model, "no_graphs") else {}

    def refuse(s, b):
        tries.append(b)
        s.pool = (0, 7)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(slots.Slots, "__init__", with_graphs)
    monkeypatch.setattr(slots.Slots, "capture", refuse)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *x: closed.append(x) or 1 / 0,
                        raising=False)
    for _ in range(2):
        assert sample(model, tok, prompts, 8, 1.0, 2, seeded(2), rollout="slots") == want
    assert len(tries) == 1 and closed == [(None, (0, 7))]
    assert "rollouts without CUDA graphs: operation not permitted" in capsys.readouterr().out


def test_nothing_holds_the_keys_and_values_afterwards(loaded, monkeypatch):
    """The library's table of attentions would: on a GPU the judge and the update need the memory."""
    model, tok = copy.deepcopy(loaded["llama"][0]), loaded["llama"][1]
    made, real = [], slots.Slots.__init__

    def watched(s, *args):
        real(s, *args)
        made.append(weakref.ref(s))
    monkeypatch.setattr(slots.Slots, "__init__", watched)
    sample(model, tok, ragged_prompts(tok, 5), 8, 1.0, 2, seeded(2), rollout="slots")
    made.append(weakref.ref(model))
    del model
    gc.collect()
    assert [x() for x in made] == [None, None]


def test_auto_is_slots_on_a_gpu_alone():
    assert sampling.choose_rollout("auto", "cuda:0") == "slots"
    assert sampling.choose_rollout("auto", "cpu") == "plain"
    assert sampling.choose_rollout("library", "cpu") == "library"


def test_no_more_slots_than_the_batch_on_cuda(monkeypatch):
    """SAMPLE_BATCH is what the plan of memory counts with, and what a user lowers."""
    def fits(model, length, most):
        raise StopIteration((length, most))

    monkeypatch.setattr(slots, "slots_that_fit", fits)
    model = types.SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(StopIteration) as found:
        slots.complete(model, None, [[1, 2, 3]] * 50, torch.rand(50, 7), 8, 1, None, None, 100, None)
    assert found.value.value == (10, 8)
