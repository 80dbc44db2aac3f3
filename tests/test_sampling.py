"""engine/sampling.py against the library's generate, hand-made distributions and chi-square."""
import copy
import math
import types

import pytest
import torch
import transformers
from engine_tools import chi_square_p, float64_logprobs, frequent_stops, ragged_prompts
from helpers import KINDS, seeded
from transformers.generation.logits_process import TopPLogitsWarper

from engine import models, progress, sampling
from engine.logprobs import token_logprobs
from engine.sampling import draw, sample


def ids_of(pairs):
    return [ids for ids, _ in pairs]


def logps_of(pairs):
    """The log-probabilities of all rows, end to end."""
    return torch.tensor([x for _, logps in pairs for x in logps])


# ---- greedy --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_librarys_generate(loaded, kind):
    model, tok = loaded[kind]
    tok = frequent_stops(tok, 40)
    prompts = ragged_prompts(tok, 7)
    got = ids_of(sample(model, tok, prompts, 24, 0, 7))
    for prompt, ids in zip(prompts, got):
        want = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=24, eos_token_id=sorted(tok.stop_ids), pad_token_id=0)
        assert ids == want[0, len(prompt):].tolist()
    assert len(set(map(len, got))) > 1, "some row must stop early for this to test anything"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_equals_the_row_in_a_batch(loaded, kind):
    model, tok = loaded[kind]
    tok = frequent_stops(tok, 40)
    prompts = ragged_prompts(tok, 6, seed=1)
    together = sample(model, tok, prompts, 16, 0, 6)
    for prompt, (ids, logps) in zip(prompts, together):
        [(alone, alone_logps)] = sample(model, tok, [prompt], 16, 0, 1)
        assert ids == alone
        torch.testing.assert_close(torch.tensor(logps), torch.tensor(alone_logps),
                                   rtol=0, atol=2e-5)
    completions = ids_of(together)
    packed, _ = token_logprobs(model, prompts, completions)
    for prompt, ids, part in zip(prompts, completions, packed.split([len(c) for c in completions])):
        torch.testing.assert_close(part, token_logprobs(model, [prompt], [ids])[0],
                                   rtol=0, atol=2e-5)


def test_batch_size_changes_nothing_in_greedy_and_order_is_kept(loaded):
    model, tok = loaded["qwen2"]
    prompts = ragged_prompts(tok, 9, seed=2)
    want = ids_of(sample(model, tok, prompts, 8, 0, 9))
    for batch in (1, 2, 4):
        assert ids_of(sample(model, tok, prompts, 8, 0, batch)) == want
    assert ids_of(sample(model, tok, prompts[::-1], 8, 0, 4)) == want[::-1]


# ---- one draw ------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draw_follows_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5, -0.5, -3.0])
    n = 20_000
    token, logp = draw(logits.expand(n, 8), temperature, torch.rand(n, generator=seeded(0)))
    counts = torch.bincount(token, minlength=8)
    want = torch.log_softmax(logits.double() / temperature, -1)
    assert chi_square_p(counts, want.exp()) > 1e-4
    torch.testing.assert_close(logp.double(), want[token], rtol=0, atol=1e-6)
    # the test can tell the two temperatures apart
    other = torch.softmax(logits.double() / (1.7 - temperature), -1)
    assert chi_square_p(counts, other) < 1e-4


def test_draw_at_its_edges():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]] * 4)
    token, logp = draw(logits, 1.0, torch.tensor([0.0, 0.25, 0.75, 1 - 2 ** -24]))
    assert token.tolist() == [1, 1, 3, 3]  # never a word of probability zero, the last one included
    torch.testing.assert_close(logp, torch.full((4,), math.log(0.5)))
    rare = torch.tensor([[0.0, math.log(1e-6)]] * 2)  # no floor under rare words
    assert draw(rare, 1.0, torch.tensor([1 - 1.5e-6, 1 - 3e-7]))[0].tolist() == [0, 1]
    # no steps of 6e-8 in the uniform numbers, at the end of the distribution
    rarest = torch.tensor([[0.0, math.log(1e-9)]] * 3)
    uniform = 1 - torch.tensor([1.5e-9, 0.5e-9, 1e-12], dtype=torch.float64)
    assert draw(rarest, 1.0, uniform)[0].tolist() == [0, 1, 1]
    token, logp = draw(torch.tensor([[0.0, 3.0, 1.0]]), 0, torch.tensor([0.999]))
    assert token.tolist() == [1]
    assert logp.item() == pytest.approx(3 - math.log(1 + math.e ** 3 + math.e), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_nucleus_is_the_librarys(temperature, top_p):
    logits = 3 * torch.randn(200, 50, generator=seeded(0))
    got = sampling.nucleus(logits, temperature, top_p)
    want = TopPLogitsWarper(top_p)(None, logits / temperature) * temperature
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[got > -math.inf], logits[got > -math.inf])
    assert 1 <= (got > -math.inf).sum(-1).min() and got.isinf().any()


def test_nucleus_by_hand():
    """The smallest set whose probability reaches top_p: it may be reached exactly."""
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    for top_p, want in ((0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1e-9, 1)):
        assert (sampling.nucleus(logits, 1.0, top_p) > -math.inf).sum() == want, top_p


# ---- sampling ------------------------------------------------------------------------------------

def test_same_generator_same_sample(loaded):
    model, tok = loaded["llama"]
    prompts = ragged_prompts(tok, 4)
    runs = [sample(model, tok, prompts, 8, 1.0, 4, seeded(s)) for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_ignores_the_generation_config(loaded, temperature):
    model, tok = copy.deepcopy(loaded["qwen2"][0]), loaded["qwen2"][1]
    for name, value in dict(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=2.0,
                            do_sample=True, min_new_tokens=3).items():
        setattr(model.generation_config, name, value)
    prompt = ragged_prompts(tok, 1)[0][:6]
    pairs = sample(model, tok, [prompt] * 6000, 1, temperature, 1000, seeded(1))
    counts = torch.bincount(torch.tensor(ids_of(pairs))[:, 0], minlength=model.config.vocab_size)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([prompt])).logits[0, -1]
    assert chi_square_p(counts, torch.softmax(logits / temperature, -1)) > 1e-4
    assert (counts > 0).sum() > 100  # words of the whole vocabulary


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_from_the_nucleus(loaded, temperature):
    """Its words in their shares, with the log-probabilities of the truncated distribution."""
    model, tok = loaded["qwen2"]
    prompt = ragged_prompts(tok, 1)[0][:6]
    pairs = sample(model, tok, [prompt] * 6000, 1, temperature, 1000, seeded(1), top_p=0.6)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([prompt])).logits[:, -1] / temperature
    want = torch.log_softmax(TopPLogitsWarper(0.6)(None, logits), -1)[0]
    token = torch.tensor(ids_of(pairs))[:, 0]
    counts = torch.bincount(token, minlength=model.config.vocab_size)
    assert 10 < (want > -math.inf).sum() < 400 and counts[want.isinf()].sum() == 0
    assert chi_square_p(counts, want.exp()) > 1e-4
    torch.testing.assert_close(logps_of(pairs).double(), want[token], rtol=0, atol=1e-4)


def test_without_top_p_nothing_is_truncated(loaded, monkeypatch):
    model, tok = loaded["llama"]
    prompts = ragged_prompts(tok, 4)
    want = sample(model, tok, prompts, 8, 1.0, 4, seeded(3))
    assert sample(model, tok, prompts, 8, 1.0, 4, seeded(3), top_p=0.5) != want
    monkeypatch.setattr(sampling, "nucleus", None)
    assert sample(model, tok, prompts, 8, 1.0, 4, seeded(3), top_p=1.0) == want
    with pytest.raises(AssertionError):
        sample(model, tok, prompts, 8, 1.0, 4, seeded(3), top_p=0.0)


def test_uniform_numbers_are_float64(loaded, monkeypatch):
    """Nearly none of 4,000 is a multiple of 2^-24, as each float32 one is; logps stay float32."""
    model, tok = loaded["llama"]
    seen, real = [], sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda logits, temperature, uniform: seen.append(
        uniform) or real(logits, temperature, uniform))
    pairs = sample(model, tok, [[5, 6]] * 4000, 1, 1.0, 4000, seeded(0))
    assert seen[0].dtype == torch.float64
    assert ((seen[0] * 2 ** 24) % 1 != 0).sum() > 3990
    assert len(seen[0].unique()) == 4000 and 0 <= seen[0].min() and seen[0].max() < 1
    logps = logps_of(pairs).double()
    assert torch.equal(logps, logps.float().double())


@pytest.mark.parametrize("training", [False, True])
def test_what_fails_leaves_the_model_as_it_was(loaded, monkeypatch, training):
    model, tok = copy.deepcopy(loaded["llama"][0]).train(training), loaded["llama"][1]

    def fails(*args):
        assert model.config._attn_implementation == "grouped" and not model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sampling, "_decode", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model, tok, [[5, 6]], 4, 1.0, 1)
    assert model.config._attn_implementation == "folded" and model.training == training


def test_sampling_under_gradient_checkpointing(loaded):
    """In training mode transformers would drop the cache."""
    model, tok = copy.deepcopy(loaded["llama"][0]), loaded["llama"][1]
    prompts = ragged_prompts(tok, 4)
    want = sample(model, tok, prompts, 8, 1.0, 4, seeded(3))
    model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    assert sample(model, tok, prompts, 8, 1.0, 4, seeded(3)) == want and model.training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logps_equal_token_logprobs(loaded, kind, temperature):
    model, tok = loaded[kind]
    tok = frequent_stops(tok)
    prompts = ragged_prompts(tok, 24, seed=3)
    pairs = sample(model, tok, prompts, 40, temperature, 12, seeded(2))
    assert model.config._attn_implementation == "folded"  # as it was loaded
    lengths = [len(ids) for ids, _ in pairs]
    assert min(lengths) < 5 and max(lengths) > 15 and len(set(lengths)) > 8
    assert all(len(ids) == len(logps) for ids, logps in pairs)
    with torch.no_grad():
        logp, _ = token_logprobs(model, prompts, ids_of(pairs), temperature)
    torch.testing.assert_close(logps_of(pairs), logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_opening_is_sampled_from_once(loaded, kind):
    """30 tokens that all prompts open with go through the model once, and what is drawn has the
    log-probability of the whole prompts; also where nothing but one token is left of each, or
    all prompts are equal, and no mask is made."""
    model, tok = loaded[kind]
    opening, seen = (ragged_prompts(tok, 1)[0] * 30)[:30], []
    ends = [r[:n] for r, n in zip(ragged_prompts(tok, 6, seed=8), (1, 3, 2, 5, 1, 4))]
    for prompts, count in (([opening + r for r in ends], 30 + 6 * 5),
                           ([opening + [t] for t in (3, 4, 5, 6)], 30 + 4),
                           ([opening] * 5, 29 + 5)):
        handle = model.base_model.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
        pairs = sample(model, tok, prompts, 3, 1.0, 8, seeded(1))
        handle.remove()
        assert sum(seen[:2]) == count
        seen.clear()
        alone = [token_logprobs(model, [p], [ids])[0] for p, ids in zip(prompts, ids_of(pairs))]
        torch.testing.assert_close(logps_of(pairs), torch.cat(alone), rtol=0, atol=1e-4)


def test_every_step_is_drawn_anew(loaded):
    """Each token as its place in the distribution it came from: uniform at every step, and not
    correlated over steps, also in rows that stay when others have left."""
    model, tok = loaded["llama"]
    tok = frequent_stops(tok, 4)
    prompt, n, g = ragged_prompts(tok, 1)[0][:5], 3000, seeded(7)
    rows = [ids for ids in ids_of(sample(model, tok, [prompt] * n, 3, 1.0, 500, g))
            if len(ids) == 3]
    assert n // 4 < len(rows) < n * 3 // 4
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids for ids in rows])).logits
    p = torch.softmax(logits[:, len(prompt) - 1:-1].double(), -1)
    # given that the row went on, its first two tokens were drawn from the words that are no stop
    p[:, :2, sorted(tok.stop_ids)] = 0
    p = p / p.sum(-1, keepdim=True)
    ids = torch.tensor(rows)[..., None]
    high, own = p.cumsum(-1).gather(-1, ids)[..., 0], p.gather(-1, ids)[..., 0]
    place = high - own * torch.rand(high.shape, generator=g, dtype=torch.float64)
    for t in range(3):
        counts = torch.histc(place[:, t], 20, 0, 1)
        assert chi_square_p(counts, torch.full((20,), 1 / 20)) > 1e-4, t
    together = torch.corrcoef(place.T)
    assert (together - torch.eye(3)).abs().max() < 4.5 / math.sqrt(len(rows))


def test_the_first_stop_id_is_the_last_token(loaded):
    model, tok = loaded["llama"]
    tok = frequent_stops(tok)
    rows = ids_of(sample(model, tok, ragged_prompts(tok, 30), 12, 1.0, 30, seeded(0)))
    for ids in rows:
        assert not set(ids[:-1]) & tok.stop_ids
        assert ids[-1] in tok.stop_ids or len(ids) == 12
    stopped = [ids for ids in rows if ids[-1] in tok.stop_ids]
    assert 0 < len(stopped) < len(rows) and min(map(len, stopped)) < 12
    # the loss sees it: one log-probability for each id, the stop included
    logp, entropy = token_logprobs(model, [[5, 6]] * 30, rows)
    assert len(logp) == len(entropy) == sum(map(len, rows))


def test_a_row_that_has_ended_has_ended(loaded, monkeypatch):
    """One row of 20 is too few for the batch to shrink, so it goes on; what it draws is dropped."""
    model, tok = loaded["llama"]
    steps = []

    def scripted(logits_BV, temperature, uniform_B):
        steps.append(len(logits_BV))
        token_B = torch.full((20,), 7)
        if len(steps) in (2, 4):  # the first row stops, and "stops" again
            token_B[0] = tok.turn_end
        return token_B, torch.zeros(20)

    monkeypatch.setattr(sampling, "draw", scripted)
    rows = ids_of(sample(model, tok, [[5, 6]] * 20, 5, 1.0, 20))
    assert steps == [20] * 5
    assert rows == [[7, tok.turn_end]] + [[7] * 5] * 19


def test_the_bar_counts_the_tokens_that_were_sampled(loaded, monkeypatch):
    """Rows that ended leave its total: it ends full, at as many tokens as came out."""
    model, tok = loaded["llama"]
    tok, bars, real = frequent_stops(tok), [], progress.bar
    monkeypatch.setattr(progress, "bar", lambda *a, **k: bars.append(real(*a, **k)) or bars[-1])
    rows = ids_of(sample(model, tok, ragged_prompts(tok, 20), 12, 1.0, 8, seeded(0)))
    [bar] = bars
    assert bar.n == bar.total == sum(map(len, rows)) < 20 * 12


# ---- what a model may need more ------------------------------------------------------------------

def special_model(kind, tok):
    """A tiny random model with a short window (Gemma, Mistral v0.1), or one whose logits are
    changed after the head (Granite, Gemma 2, Cohere)."""
    size = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
                bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = {"sliding window": lambda: transformers.MistralConfig(sliding_window=8, **size),
              "scaled logits": lambda: transformers.GraniteConfig(logits_scaling=4.0, **size),
              "other scale": lambda: transformers.CohereConfig(logit_scale=0.25, **size),
              "capped logits": lambda: transformers.Gemma2Config(
                  final_logit_softcapping=1.0, head_dim=16, sliding_window=4096, **size)}[kind]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["sliding window", "scaled logits", "other scale",
                                  "capped logits"])
def test_models_that_need_more_are_right_or_refused(loaded, tmp_path, kind):
    """Either sample and token_logprobs equal the model's own forward, or one line says that the
    model is not supported."""
    tok = loaded["mistral"][1]
    special_model(kind, tok).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    try:
        model, tok = models.load_model(str(tmp_path), "float32")
        prompts = ragged_prompts(tok, 4)
        pairs = sample(model, tok, prompts, 16, 1.0, 4, seeded(0))
    except SystemExit as problem:
        text = str(problem.code)
        assert text.startswith("error: ") and "\n" not in text
        return
    with torch.no_grad():
        logp, _ = token_logprobs(model, prompts, ids_of(pairs))
        want, _ = float64_logprobs(model.double(), prompts, ids_of(pairs), 1.0)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(logps_of(pairs).double(), want, rtol=0, atol=1e-4)


def windowed_model(kind, tok, window):
    """A tiny random model all of whose layers have a sliding window (Mistral v0.1), or every other
    (Qwen 2, Gemma 3)."""
    size = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
                sliding_window=window)
    config = {"all": lambda: transformers.MistralConfig(**size),
              "qwen2": lambda: transformers.Qwen2Config(use_sliding_window=True,
                                                        max_window_layers=1, **size),
              "gemma3": lambda: transformers.Gemma3TextConfig(
                  head_dim=16, layer_types=["sliding_attention", "full_attention"], **size)}[kind]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                         attn_implementation="eager").eval()


@pytest.mark.parametrize("opening", [0, 20])
@pytest.mark.parametrize("kind", ["all", "qwen2", "gemma3"])
def test_a_window_counts_the_text_and_not_the_padding(loaded, kind, opening):
    """Rows of 3 to 40 tokens and a window of 16, with and without a shared opening: as the
    library's own forward of each row alone; the same weights without a window differ."""
    tok = frequent_stops(loaded["mistral"][1], 40)
    model = windowed_model(kind, tok, 16)
    prompts = [list(range(10, 10 + opening)) + p for p in ragged_prompts(tok, 12, seed=3)]
    pairs = sample(model, tok, prompts, 30, 1.0, 12, seeded(0))
    completions = ids_of(pairs)
    assert max(map(len, completions)) == 30 > 3 * min(map(len, completions))
    with torch.no_grad():
        logp, _ = token_logprobs(model, prompts, completions)
        want, _ = float64_logprobs(copy.deepcopy(model).double(), prompts, completions, 1.0)
        other, _ = token_logprobs(windowed_model(kind, tok, 4096), prompts, completions)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(logps_of(pairs).double(), want, rtol=0, atol=1e-4)
    assert (other - want).abs().max() > 0.1


def test_without_a_short_window_the_mask_is_the_plain_one(loaded):
    mask = torch.ones(2, 8, dtype=torch.long)
    for window in (None, 8):
        config = types.SimpleNamespace(sliding_window=window)
        assert sampling._step_mask(config, mask) is mask
    config = types.SimpleNamespace(sliding_window=3)
    mask[1, 2:6] = 0  # two tokens, four of padding, two new tokens
    assert sampling._step_mask(config, mask).tolist() == [
        [[[False] * 5 + [True] * 3]], [[[False, True] + [False] * 4 + [True] * 2]]]


def test_the_cache_has_room_and_never_copies(loaded):
    """Keys and values of all positions lie in one storage that is made once."""
    model, _ = loaded["qwen2"]
    cache = sampling._kv_cache(model, 6)
    with torch.no_grad():
        model.base_model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
        places = [layer.all_keys.data_ptr() for layer in cache.layers]
        model.base_model(input_ids=torch.tensor([[8]]), past_key_values=cache, use_cache=True)
    assert [layer.all_keys.data_ptr() for layer in cache.layers] == places
    assert all(layer.keys.shape == (1, 2, 4, 16) for layer in cache.layers)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_in_eight_tokens_gives_the_same(loaded, monkeypatch, kind):
    """As on a GPU: rows that have ended go on until the next look, and nothing of it is kept. In a
    token step nothing waits for the device, so there are two looks in 16 tokens, not 16."""
    model, tok = loaded[kind][0], copy.copy(loaded[kind][1])
    tok.stop_ids = set(range(0, 800, 9))  # a turn ends after about nine tokens
    prompts, out, looks = [[5 + i] * (3 + i) for i in range(9)], [], []
    real = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: looks.append(1) or real(self))
    for every in (1, 8):
        monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", every)
        looks.clear()
        out.append(sampling.sample(model, tok, prompts, 16, 1.0, 9,
                                   torch.Generator().manual_seed(3)))
    assert [ids for ids, _ in out[0]] == [ids for ids, _ in out[1]]
    for (_, a), (_, b) in zip(*out):
        assert a == pytest.approx(b, abs=1e-5)
    assert len(looks) <= 2
    assert len({len(ids) for ids, _ in out[0]}) > 3  # of many lengths
