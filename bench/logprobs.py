"""Log-probabilities of given tokens, forward and backward: token_logprobs against the plain form.

    python bench/logprobs.py                32 turns, 5.8k tokens, three rounds
    python bench/logprobs.py ROUNDS=5

ours    engine.logprobs: logits at completion positions only, a chunk at a time, not kept
plain   the model's logits at every position, log_softmax in float32, gather

Same model, same attention, same rows, one micro-batch, mean of the completions' log-probabilities
as the loss. Ours also returns the entropy. "above the model" is the peak less what the process held
once the model was loaded: activations, logits and gradients.
"""
import sys
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from engine import models, run  # noqa: E402
from engine.batching import pad  # noqa: E402
from engine.logprobs import token_logprobs  # noqa: E402

# ==================================================================================================
MODEL = "smollm2"         # a folder or hub id works too
DTYPE: Literal["auto", "float32", "bfloat16"] = "bfloat16"  # of the weights
TURNS = 32                # rows
PROMPT_TOKENS = 85        # of a row, about: defender prompts nearest to it
TOKENS = 96               # of a completion
ROUNDS = 3                # processes of each side, in turn
REPEATS = 2               # timed runs in a process, after one to warm up
SIDE: Literal["all", "ours", "plain"] = "all"  # one of them: that side alone, in this process
# ==================================================================================================


def plain(model, prompts, completions):
    """The plain form -> logp_N, rows end to end: logits [B, L, V] at every position are kept."""
    ids_BL, length_B = pad([p + c for p, c in zip(prompts, completions)], model.device)
    mask_BL = torch.arange(ids_BL.shape[1], device=model.device) < length_B[:, None]
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).logits
    logp_BLV = torch.log_softmax(logits_BLV[:, :-1].float(), -1)
    logp_BL = logp_BLV.gather(2, ids_BL[:, 1:, None])[..., 0]
    rows = []
    for b, (prompt, completion) in enumerate(zip(prompts, completions)):
        start = len(prompt) - 1  # a token is predicted at the position before it
        rows.append(logp_BL[b, start:start + len(completion)])
    return torch.cat(rows)


def one_side():
    """Time forward and backward of this process' side."""
    model, tok = models.load_model(MODEL, DTYPE)
    prompts = common.prompts(tok, TURNS, PROMPT_TOKENS)
    words = model.get_output_embeddings().weight.shape[0]
    drawn = torch.randint(words, (TURNS, TOKENS), generator=torch.Generator().manual_seed(0))
    completions, loaded, mean = drawn.tolist(), run.peak_gb(), []

    def work():
        model.zero_grad(set_to_none=True)
        if SIDE == "plain":
            logp_N = plain(model, prompts, completions)
        else:
            logp_N, _ = token_logprobs(model, prompts, completions)
        (-logp_N.mean()).backward()
        mean[:] = [logp_N.mean().item()]

    work()
    times = common.repeat(work, REPEATS)
    common.report(times, sum(map(len, prompts)) + TURNS * TOKENS, mean=mean[0],
                  above=run.peak_gb() - loaded)


def main(argv):
    """Both sides in turn, or the one that is named."""
    run.configure(globals(), argv)
    if SIDE != "all":
        return one_side()
    common.make_base(MODEL)
    common.head(f"log-probabilities, forward and backward: {MODEL}, {DTYPE}, {TURNS} turns, "
                f"prompts ~{PROMPT_TOKENS}, completions {TOKENS} tokens")
    sides = {}
    for name in ("ours", "plain"):
        sides[name] = (sys.executable, [*argv, f"SIDE={name}"])
    results = common.alternate(__file__, sides, ROUNDS)
    medians = common.table(results, "ours", "tokens")
    for side, reports in results.items():
        above = max(report["above"] for report in reports)
        print(f"{side}: {reports[0]['count']} tokens, peak above the model {above:.2f} GB, "
              f"mean log-probability {reports[0]['mean']:.4f}")
    common.ratio("logprobs", medians["plain"], medians["ours"])


if __name__ == "__main__":
    main(sys.argv[1:])
