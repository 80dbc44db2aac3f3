"""Log-probabilities of given tokens, without ever keeping the logits of a whole batch.
Shapes: see engine/sampling.py."""
import torch

from engine import parallel, shards
from engine.batching import micro_batches, pad, shared_opening

LOGPROB_CHUNK = 512  # tokens whose V float32 logits exist at a time (hardware: at V = 49k, 100 MB)


def token_logprobs(model, prompts, completions, temperature=1.0):
    """Log-probability of every completion token -> (logp_N, entropy_N), float32, rows end to end.
    prompts, completions: lists of B lists of token ids. temperature: as in sampling. entropy_N
    carries no gradient. The opening that all prompts share is computed once."""
    shared, cache = shared_opening(model, prompts)
    rows, row_N, at_N = [], [], []
    for b, (prompt, completion) in enumerate(zip(prompts, completions)):
        rows.append(prompt[shared:] + completion)
        row_N.append(torch.full((len(completion),), b))
        # a token is predicted at the position before it
        at_N.append(torch.arange(len(completion)) + len(prompt) - shared - 1)
    ids_BL, _ = pad(rows, model.device)
    hidden = model.base_model(input_ids=ids_BL, past_key_values=cache,
                              use_cache=True).last_hidden_state
    row_N, at_N = torch.cat(row_N).to(model.device), torch.cat(at_N).to(model.device)
    head = model.get_output_embeddings()
    return _HeadLogprobs.apply(hidden[row_N, at_N], head.weight, head.bias,
                               ids_BL[row_N, at_N + 1], temperature)


def cross_entropy_step(model, optimizer, examples, max_tokens, coef=1.0):
    """Backward pass of coef * the mean cross-entropy over the completion tokens of `examples`
    (dicts with prompt_ids and completion_ids), in micro-batches of at most `max_tokens` padded
    tokens -> that mean without coef. Processes share them; optimizer.step sums the gradients."""
    total = sum(len(e["completion_ids"]) for e in examples)
    lengths, mean = [len(e["prompt_ids"]) + len(e["completion_ids"]) for e in examples], 0.0
    for part, weight in shards.rounds(micro_batches(lengths, max_tokens), lengths, model):
        logp_N, _ = shards.call(token_logprobs, model, [examples[i]["prompt_ids"] for i in part],
                                [examples[i]["completion_ids"] for i in part])
        loss = -logp_N.sum() / total
        (weight * coef * loss).backward()
        optimizer.collect()
        mean += loss.item() if weight else 0.0
    return parallel.total(dict(mean=mean))["mean"]


class _HeadLogprobs(torch.autograd.Function):
    """(log p(target)_N, entropy_N), float32, of a linear head whose logits are never kept: made for
    LOGPROB_CHUNK tokens at a time, and again in the backward pass, where the chunk's own buffer
    turns into the gradient: (onehot - softmax) / temperature. bench/logprobs.py measures it."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, temperature):
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        ctx.temperature = temperature
        logp_N = torch.empty(len(hidden_ND), device=hidden_ND.device)
        entropy_N = torch.empty_like(logp_N)
        for at, logits in _head_chunks(hidden_ND, weight_VD, bias_V):
            for few, part in _few(at.start, logits):
                x = part.float() / temperature
                x -= x.amax(-1, keepdim=True)
                picked = x.gather(1, target_N[few, None])[:, 0]
                e = x.exp()
                total = e.sum(-1)
                logp_N[few] = picked - total.log()
                entropy_N[few] = total.log() - e.mul_(x).sum(-1) / total
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, _):
        hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        grad_N = grad_N / ctx.temperature
        kinds = hidden_ND.dtype, torch.float32, torch.float32  # the head's are sums over chunks
        d_hidden, d_weight, d_bias = [
            torch.zeros_like(x, dtype=kind) if needed else None
            for x, kind, needed in zip(ctx.saved_tensors, kinds, ctx.needs_input_grad)]
        for at, logits in _head_chunks(hidden_ND, weight_VD, bias_V):
            for few, part in _few(at.start, logits):
                p = (part.float() / ctx.temperature).softmax(-1).mul_(-grad_N[few, None])
                part.copy_(p.scatter_add_(1, target_N[few, None], grad_N[few, None]))
            if d_hidden is not None:
                torch.mm(logits, weight_VD, out=d_hidden[at])
            if d_weight is not None:  # in pieces: a sum of two types first converts one of them
                for words, part in zip(d_weight.split(4096), logits.split(4096, 1)):
                    words += part.t() @ hidden_ND[at]
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=d_bias.dtype)
        return d_hidden, d_weight, d_bias, None, None  # autograd rounds them to the weights' type


def _head_chunks(hidden_ND, weight_VD, bias_V):
    """(rows, their logits), LOGPROB_CHUNK rows at a time."""
    for start in range(0, len(hidden_ND), LOGPROB_CHUNK):
        at = slice(start, min(start + LOGPROB_CHUNK, len(hidden_ND)))
        yield at, torch.nn.functional.linear(hidden_ND[at], weight_VD, bias_V)


def _few(start, logits):
    """(rows, their logits), on a CPU 16 at a time: 3 MB at V = 49k, which stay in its cache."""
    for part in logits.split(16 if logits.device.type == "cpu" else LOGPROB_CHUNK):
        yield slice(start, start + len(part)), part
        start += len(part)
