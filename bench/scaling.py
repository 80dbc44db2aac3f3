"""Seconds of learning against real tokens, and how many tokens are padding, on a run's own lengths.

    python bench/scaling.py                 the last 256 turns of results/02_rl/games.jsonl
    python bench/scaling.py GAMES=results/ssp_reflect/games.jsonl TURNS=16,32

Prompts are rendered again, completions have the recorded number of tokens and random ids (only
their count matters here); then learn() of 02_selfplay_rl.py, reference and update with float32
masters and no SFT mix, on TURNS of them, the smallest first, once to warm up. A real token is a
turn's prompt or completion token; a padded one is what micro-batches make of them, before what
prompts share is taken out, which only happens to those of one instruction. Last line: padded over
real, of all sizes together.
"""
import importlib
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import optim  # noqa: E402
import policy  # noqa: E402
import stage  # noqa: E402
from stage import die  # noqa: E402

# ==================================================================================================
MODEL = policy.EMBEDDED   # a folder works too
DTYPE = "bfloat16"        # of the weights
GAMES = "results/02_rl/games.jsonl"  # of a run of 02 on the seeds that ship
TURNS = "32,64,128,256"   # sizes of a step
TRAIN_TOKENS = 3072       # of a micro-batch: what 02 ships with
ROUNDS = 1                # timed runs of each size, after one to warm up
# ==================================================================================================
RANGES = dict(DTYPE=["float32", "bfloat16"], TRAIN_TOKENS=(16, 10 ** 7), ROUNDS=(1, 99))


def recorded(tok, words):
    """Turns of GAMES, the newest first: real prompts, completions of the recorded lengths."""
    path = ROOT / GAMES
    if not path.is_file():
        die(f"GAMES={GAMES}: not found; python 02_selfplay_rl.py writes it")
    seeds = {s["id"]: s for s in stage.load_seeds("prompts/seeds.jsonl")}
    drawn, turns = torch.Generator().manual_seed(0), []
    for g in reversed(stage.read_rows(path)):
        for role in ("attacker", "defender"):
            if role not in g:
                continue
            prompt = (policy.attacker_prompt(tok, seeds[g["seed"]], True) if role == "attacker"
                      else policy.defender_prompt(tok, g["request"], True))
            n = g[role]["tokens"]
            turns.append(policy.Turn(
                role, g["kind"], seeds[g["seed"]], prompt, logps=[-1.0] * n, well_formed=True,
                ids=torch.randint(words, (n,), generator=drawn).tolist(), game=g["game"],
                reward=g[role]["reward"] or 0.0))
    return turns


def main(argv):
    """Time learn() on each size; print one row each."""
    stage.configure(globals(), argv)
    rl = importlib.import_module("02_selfplay_rl")
    rl.TRAIN_TOKENS, rl.SFT_COEF = TRAIN_TOKENS, 0.0
    model, tok = policy.load(MODEL, DTYPE)
    ref = policy.load(MODEL, DTYPE)[0].requires_grad_(False)
    optimizer = optim.MasterAdamW(model, (0.9, 0.95), 0.0)
    turns = recorded(tok, model.get_output_embeddings().weight.shape[0])
    sizes = sorted(int(x) for x in TURNS.split(","))
    if sizes[0] < 1 or sizes[-1] > len(turns):
        die(f"TURNS={TURNS}: {GAMES} has {len(turns)} turns")
    common.head(f"learning on the lengths of {GAMES}: {MODEL}, {DTYPE}, {TRAIN_TOKENS} a batch")
    rl.learn(model, ref, optimizer, turns[:sizes[0]], [], 0)
    real = padded = 0
    for size in sizes:
        part = turns[:size]
        lengths = [len(t.prompt_ids) + len(t.ids) for t in part]
        wide = sum(len(b) * max(lengths[i] for i in b) for b in rl.batches_of(part))
        took = min(common.seconds(lambda: rl.learn(model, ref, optimizer, part, [], 0))
                   for _ in range(ROUNDS))
        print(f"{size:5d} turns  {sum(lengths):7d} real tokens  {took:8.2f} s  "
              f"{1000 * took / sum(lengths):6.3f} ms a token  padded / real "
              f"{wide / sum(lengths):.3f}", flush=True)
        real, padded = real + sum(lengths), padded + wide
    print(f"ratio padding {padded / real:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
