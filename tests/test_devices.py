"""A tensor that was left on the CPU fails here: the models lie on torch's "meta" device, which has
no data and, as CUDA does, refuses tensors of another device. What needs numbers of the device
(`.item()`, `.tolist()`) fails too, so none of these steps waits for the device."""
import copy

import pytest
import torch
from helpers import KINDS

import judge
from engine import adapters, logprobs
from engine.optim import OPTIMIZERS
from judge_adapter import train

PROMPTS, COMPLETIONS = [[5, 6, 7, 8], [5, 6, 9]], [[10, 11], [12, 13, 14]]


def on_meta(loaded, kind, rank=0):
    model = copy.deepcopy(loaded[kind][0]).requires_grad_(True)
    adapters.choose_weights(model, rank, 4, 0)
    return model.to("meta")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_their_gradients(loaded, kind, rank):
    model = on_meta(loaded, kind, rank)
    logp_N, entropy_N = logprobs.token_logprobs(model, PROMPTS, COMPLETIONS)
    assert logp_N.device.type == entropy_N.device.type == "meta" and len(logp_N) == 5
    logp_N.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(g.device.type == "meta" for g in grads)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_collecting_gradients(loaded, name):
    model = on_meta(loaded, "llama")
    optimizer = OPTIMIZERS[name](model, (0.9, 0.95), 0.0)
    logprobs.token_logprobs(model, PROMPTS, COMPLETIONS)[0].sum().backward()
    optimizer.collect()
    assert {t.device.type for t in optimizer.tensors().values()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge(loaded, kind):
    model, tok = on_meta(loaded, kind), loaded[kind][1]
    scorer = judge.Judge(model, tok)
    rows = [scorer.encode("a request", "a reply"), scorer.encode("another request", None)]
    assert scorer.answer_logits(rows).device.type == "meta"
    labels = [dict(prompt_harmful=True, response_refusal=False), dict(prompt_harmful=False)]
    _, loss = train.loss_of(scorer, labels, rows, [[True, False], [False, True]])
    loss.backward()


def test_the_meta_device_does_refuse_tensors_of_another():
    with pytest.raises(RuntimeError):
        torch.ones(2, device="meta")[torch.tensor([0, 1])] @ torch.ones(2)
    with pytest.raises(RuntimeError):
        torch.ones(2, device="meta").sum().item()
