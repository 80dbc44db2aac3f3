"""Helpers of the tests of engine/: random prompts, stop ids that come often, log-probabilities in
float64, the chi-square test."""
import copy

import torch


def ragged_prompts(tok, n, seed=0):
    """n prompts of 3 to 40 random token ids of the tokenizer, all different lengths if n <= 38."""
    g = torch.Generator().manual_seed(seed)
    lengths = (torch.randperm(38, generator=g) + 3).tolist()
    return [torch.randint(10, len(tok), (lengths[i % 38],), generator=g).tolist() for i in range(n)]


def frequent_stops(tok, share=12):
    """A copy of the tokenizer with every `share`th id as a stop id: rows leave the batch often."""
    tok = copy.copy(tok)
    tok.stop_ids = set(range(5, len(tok), share))
    return tok


def float64_logprobs(model, prompts, completions, temperature):
    """The plain form, one unpadded row at a time: (logp_N, entropy_N) of a float64 model."""
    logp, entropy = [], []
    for p, c in zip(prompts, completions):
        logits = model(torch.tensor([p + c])).logits[0, len(p) - 1:-1]
        all_logp = torch.log_softmax(logits / temperature, -1)
        logp.append(all_logp[torch.arange(len(c)), torch.tensor(c)])
        entropy.append(-(all_logp.exp() * all_logp).sum(-1))
    return torch.cat(logp), torch.cat(entropy)


def chi_square_p(counts, probabilities):
    """p value of counts against probabilities (float64); cells that expect under 5 are pooled."""
    counts, expected = counts.double(), probabilities.double() * counts.sum()
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp_min(1e-300)).sum()
    half_df = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_df, statistic / 2))
