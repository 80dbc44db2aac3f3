"""engine/logprobs.py against the plain form in float64, values and gradients."""
import copy

import pytest
import torch
from engine_tools import float64_logprobs, ragged_prompts
from helpers import KINDS

from engine import logprobs
from engine.batching import micro_batches


def some_turns(tok):
    """Five prompts and completions of 1, 3, 2, 9 and 4 tokens."""
    completions = ragged_prompts(tok, 5, seed=5)
    for c, n in zip(completions, (1, 3, 2, 9, 4)):
        del c[n:]
    return ragged_prompts(tok, 5, seed=4), completions


# ---- token_logprobs ------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [512, 3])
def test_values_and_gradients_against_float64(loaded, monkeypatch, kind, temperature, chunk):
    monkeypatch.setattr(logprobs, "LOGPROB_CHUNK", chunk)
    model, tok = copy.deepcopy(loaded[kind][0]), loaded[kind][1]
    exact = copy.deepcopy(model).double()
    prompts, completions = some_turns(tok)
    logp, entropy = logprobs.token_logprobs(model, prompts, completions, temperature)
    want, want_entropy = float64_logprobs(exact, prompts, completions, temperature)
    assert logp.dtype == torch.float32 and len(logp) == sum(map(len, completions))
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=2e-5)
    assert logp.requires_grad and not entropy.requires_grad
    weights = torch.randn(len(logp), generator=torch.Generator().manual_seed(6))
    (logp * weights).sum().backward()
    (want * weights.double()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert q.grad.norm() > 0, name
        assert (p.grad.double() - q.grad).norm() <= 1e-4 * q.grad.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_one_opening_against_float64(loaded, kind):
    """The shared opening goes through the model once; its gradient is that of all rows."""
    model, tok = copy.deepcopy(loaded[kind][0]), loaded[kind][1]
    exact = copy.deepcopy(model).double()
    prompts, completions = some_turns(tok)
    opening = (prompts[0] * 20)[:20]
    prompts = [opening + p for p in prompts]
    logp, _ = logprobs.token_logprobs(model, prompts, completions)
    want, _ = float64_logprobs(exact, prompts, completions, 1.0)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=2e-5)
    logp.sum().backward()
    want.sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert (p.grad.double() - q.grad).norm() <= 1e-4 * q.grad.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(loaded, kind):
    """Values and gradients of rows with one opening, in training mode, without dropout."""
    plain, tok = copy.deepcopy(loaded[kind][0]), loaded[kind][1]
    checkpointed = copy.deepcopy(plain).train()
    checkpointed.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert checkpointed.config.attention_dropout == 0
    prompts, completions = some_turns(tok)
    prompts = [(prompts[0] * 20)[:20] + p for p in prompts]
    logps = []
    for model in (plain, checkpointed):
        logps.append(logprobs.token_logprobs(model, prompts, completions)[0])
        logps[-1].sum().backward()
    torch.testing.assert_close(logps[1], logps[0], rtol=0, atol=2e-5)
    for (name, p), q in zip(checkpointed.named_parameters(), plain.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() and q.grad.norm() > 0, name


def test_bfloat16_model_gives_float32_logprobs(loaded):
    """Log-softmax over words is in float32 whatever the model: all probabilities sum to 1."""
    model, tok = copy.deepcopy(loaded["mistral"][0]).bfloat16(), loaded["mistral"][1]
    prompt, V = ragged_prompts(tok, 1)[0], model.config.vocab_size
    words = list(range(0, V, V // 40))[:40]
    with torch.no_grad():
        logp, _ = logprobs.token_logprobs(model, [prompt] * 40, [[w] for w in words])
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1:]
        want = torch.log_softmax(model.lm_head(hidden).double(), -1)[0, words]
        every, _ = logprobs.token_logprobs(model, [prompt] * V, [[w] for w in range(V)])
    assert logp.dtype == torch.float32
    # the batch's bf16 logits, not its softmax
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=0.03)
    assert (want.max() - want.min()) > 1
    assert every.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


# ---- the head ------------------------------------------------------------------------------------

def test_head_with_a_bias_and_where_the_head_is_frozen(monkeypatch):
    """Autograd in float64 has the same gradients; several chunks, pieces of rows and of words
    (4096); a frozen head."""
    monkeypatch.setattr(logprobs, "LOGPROB_CHUNK", 20)  # pieces of 16 and 4
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, scale = (torch.randn(*shape, generator=g)
                                   for shape in ((50, 8), (5000, 8), (5000,), (50,)))
    target = torch.randint(0, 5000, (50,), generator=g)
    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logp, entropy = logprobs._HeadLogprobs.apply(*ours, target, 0.7)
    (logp * scale).sum().backward()
    plain = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    all_logp = torch.log_softmax((plain[0] @ plain[1].T + plain[2]) / 0.7, -1)
    want = all_logp.gather(1, target[:, None])[:, 0]
    (want * scale).sum().backward()
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(all_logp.exp() * all_logp).sum(-1), rtol=0,
                               atol=1e-5)
    for x, y in zip(ours, plain):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)
    alone = hidden.clone().requires_grad_()
    logp, _ = logprobs._HeadLogprobs.apply(alone, weight, bias, target, 0.7)
    (logp * scale).sum().backward()
    torch.testing.assert_close(alone.grad, ours[0].grad)
    assert weight.grad is None and bias.grad is None


def test_the_gradient_of_a_bfloat16_head_adds_up_in_float32(monkeypatch):
    """256 chunks: what is left is the rounding of each chunk and of the result. The control adds
    the same chunks up in bfloat16."""
    monkeypatch.setattr(logprobs, "LOGPROB_CHUNK", 8)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 16, generator=g).add(0.5).bfloat16()
    weight, bias = torch.randn(30, 16, generator=g).bfloat16(), torch.randn(30, generator=g)
    target = torch.randint(0, 30, (2048,), generator=g)
    ours = [x.clone().requires_grad_() for x in (weight, bias.bfloat16())]
    logprobs._HeadLogprobs.apply(hidden, *ours, target, 1.0)[0].sum().backward()
    exact = [x.detach().double().requires_grad_() for x in ours]
    logits = torch.nn.functional.linear(hidden.double(), *exact)
    all_logp = torch.log_softmax(logits, -1)
    all_logp.gather(1, target[:, None]).sum().backward()
    d_logits = torch.nn.functional.one_hot(target, 30) - all_logp.detach().exp()
    coarse = [torch.zeros_like(weight), torch.zeros_like(weight[:, 0])]
    for k in range(0, 2048, 8):
        part = d_logits[k:k + 8].bfloat16()
        coarse[0] += part.t() @ hidden[k:k + 8]
        coarse[1] += part.sum(0)
    for x, y, control in zip(ours, exact, coarse):
        assert x.grad.dtype == torch.bfloat16
        error = (x.grad.double() - y.grad).norm() / y.grad.norm()
        assert error < 4e-3  # 2^-9 is half a step of bfloat16
        assert (control.double() - y.grad).norm() / y.grad.norm() > 5 * error


# ---- cross-entropy -------------------------------------------------------------------------------

class Sums:
    """An optimizer that only collects, as MasterAdamW does, and counts how often."""

    def __init__(self, model):
        self.model, self.calls = model, 0
        self.sums = [torch.zeros_like(p) for p in model.parameters()]

    def collect(self):
        self.calls += 1
        for p, total in zip(self.model.parameters(), self.sums):
            total += p.grad
            p.grad = None


@pytest.mark.parametrize("max_tokens", [10 ** 6, 60, 1])
def test_cross_entropy_step(loaded, max_tokens):
    """The mean over all completion tokens and its gradient, times coef; the same in any
    micro-batches; prompts carry no loss of their own."""
    model, tok = copy.deepcopy(loaded["qwen2"][0]), loaded["qwen2"][1]
    exact = copy.deepcopy(model).double()
    prompts, completions = some_turns(tok)
    examples = [dict(prompt_ids=p, completion_ids=c) for p, c in zip(prompts, completions)]
    optimizer = Sums(model)
    mean = logprobs.cross_entropy_step(model, optimizer, examples, max_tokens, coef=0.3)
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions)]
    assert optimizer.calls == len(micro_batches(lengths, max_tokens))
    want = -float64_logprobs(exact, prompts, completions, 1.0)[0].mean()
    assert mean == pytest.approx(want.item(), abs=2e-5)
    (0.3 * want).backward()
    for ours, q in zip(optimizer.sums, exact.parameters()):
        assert (ours.double() - q.grad).norm() <= 1e-4 * q.grad.norm()
