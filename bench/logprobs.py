"""Log-probabilities of given tokens, forward and backward: policy.token_logprobs, the plain form.

    python bench/logprobs.py                32 turns, 5.8k tokens, three rounds
    python bench/logprobs.py ROUNDS=5

ours    policy.token_logprobs: logits at completion positions only, a chunk at a time, not kept
plain   the model's logits at every position, log_softmax in float32, gather

Same model, same attention, same rows, one micro-batch, mean of the completions' log-probabilities
as the loss. Ours also returns the entropy. "above the model" is the peak less what the process held
once the model was loaded: activations, logits and gradients.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import policy  # noqa: E402
import stage  # noqa: E402

# ==================================================================================================
MODEL = policy.EMBEDDED   # a folder or hub id works too
DTYPE = "bfloat16"        # of the weights
TURNS = 32                # rows
PROMPT_TOKENS = 85        # of a row, about: defender prompts nearest to it
TOKENS = 96               # of a completion
ROUNDS = 3                # processes of each side, in turn
REPEATS = 2               # timed runs in a process, after one to warm up
SIDE = "all"              # or "ours", "plain": that side alone, in this process
# ==================================================================================================
RANGES = dict(SIDE=["all", "ours", "plain"], DTYPE=["auto", "float32", "bfloat16"],
              TURNS=(1, 4096), PROMPT_TOKENS=(1, 10 ** 5), TOKENS=(1, 10 ** 5), ROUNDS=(1, 99),
              REPEATS=(1, 99))


def plain(model, prompts, completions):
    """The plain form -> logp_N, rows end to end: logits [B, L, V] at every position are kept."""
    ids_BL, length_B = policy.pad([p + c for p, c in zip(prompts, completions)], model.device)
    mask_BL = torch.arange(ids_BL.shape[1], device=model.device) < length_B[:, None]
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).logits
    logp_BLV = torch.log_softmax(logits_BLV[:, :-1].float(), -1)
    logp_BL = logp_BLV.gather(2, ids_BL[:, 1:, None])[..., 0]
    return torch.cat([logp_BL[b, len(p) - 1:len(p) + len(c) - 1]
                      for b, (p, c) in enumerate(zip(prompts, completions))])


def one_side():
    """Time forward and backward of this process' side."""
    model, tok = policy.load(MODEL, DTYPE)
    prompts = common.prompts(tok, TURNS, PROMPT_TOKENS)
    words = model.get_output_embeddings().weight.shape[0]
    drawn = torch.randint(words, (TURNS, TOKENS), generator=torch.Generator().manual_seed(0))
    completions, loaded, mean = drawn.tolist(), stage.peak_gb(), []

    def work():
        model.zero_grad(set_to_none=True)
        logp_N = (plain(model, prompts, completions) if SIDE == "plain"
                  else policy.token_logprobs(model, prompts, completions)[0])
        (-logp_N.mean()).backward()
        mean[:] = [logp_N.mean().item()]

    work()
    times = [common.seconds(work) for _ in range(REPEATS)]
    common.report(times, sum(map(len, prompts)) + TURNS * TOKENS, mean=mean[0],
                  above=stage.peak_gb() - loaded)


def main(argv):
    """Both sides in turn, or the one that is named."""
    stage.configure(globals(), argv)
    if SIDE != "all":
        return one_side()
    common.make_base(MODEL)
    common.head(f"log-probabilities, forward and backward: {MODEL}, {DTYPE}, {TURNS} turns, "
                f"prompts ~{PROMPT_TOKENS}, completions {TOKENS} tokens")
    sides = {s: (sys.executable, [*argv, f"SIDE={s}"]) for s in ("ours", "plain")}
    results = common.alternate(__file__, sides, ROUNDS)
    medians = common.table(results, "ours", "tokens")
    for side, reports in results.items():
        print(f"{side}: {reports[0]['count']} tokens, "
              f"peak above the model {max(r['above'] for r in reports):.2f} GB, "
              f"mean log-probability {reports[0]['mean']:.4f}")
    common.ratio("logprobs", medians["plain"], medians["ours"])


if __name__ == "__main__":
    main(sys.argv[1:])
