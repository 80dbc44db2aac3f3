"""Seconds of learning against real tokens, and how many tokens are padding, on a run's own lengths.

    python bench/scaling.py                 the last 256 turns of results/runs/02_rl/games.jsonl
    python bench/scaling.py GAMES=results/runs/ssp/games.jsonl TURNS=16,32

Prompts are rendered again, completions have the recorded number of tokens and random ids (only
their count matters here); then learn() of 02_selfplay_rl.py, reference and update with float32
masters and no SFT mix, on TURNS of them, the smallest first, once to warm up. A real token is a
turn's prompt or completion token; a padded one is what micro-batches make of them, before what
prompts share is taken out, which only happens to those of one instruction. Last line: padded over
real, of all sizes together.

The share of the matrix rate: the floating-point operations of learn(), as torch counts them, over
its seconds, beside those of one product of the model's widest layer for TRAIN_TOKENS tokens, which
is what this machine's matrix products reach."""
import sys
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from engine import adapters, models, run  # noqa: E402
from engine.optim import MasterAdamW  # noqa: E402
from engine.run import die  # noqa: E402
from selfplay.data import load_seeds, read_rows  # noqa: E402
from selfplay.turns import Turn, attacker_prompt, batches_of, defender_prompt  # noqa: E402

# ==================================================================================================
MODEL = "smollm2"         # a folder works too
DTYPE: Literal["float32", "bfloat16"] = "bfloat16"  # of the weights
GAMES = "results/runs/02_rl/games.jsonl"  # of a run of 02 on the seeds that ship
TURNS = "32,64,128,256"   # sizes of a step
TRAIN_TOKENS = 3072       # of a micro-batch: what 02 ships with
LORA_RANK = 0             # of an adapter that learns instead of all weights
ROUNDS = 1                # timed runs of each size, after one to warm up
# ==================================================================================================


def recorded(tok, words):
    """Turns of GAMES, the newest first: real prompts, completions of the recorded lengths."""
    path = run.locate(GAMES)
    if path is None:
        die(f"GAMES={GAMES}: not found; python 02_selfplay_rl.py writes it")
    seeds = {}
    for seed in load_seeds("prompts/seeds.jsonl"):
        seeds[seed["id"]] = seed
    drawn, turns = torch.Generator().manual_seed(0), []
    for game in reversed(read_rows(path)):
        seed = seeds[game["seed"]]
        for role in ("attacker", "defender"):
            if role not in game:
                continue
            if role == "attacker":
                prompt = attacker_prompt(tok, seed, True)
            else:
                prompt = defender_prompt(tok, game["request"], True)
            n = game[role]["tokens"]
            ids = torch.randint(words, (n,), generator=drawn).tolist()
            turns.append(Turn(role, game["kind"], seed, prompt, ids=ids, logps=[-1.0] * n,
                              well_formed=True, game=game["game"],
                              reward=game[role]["reward"] or 0.0))
    return turns


def matrix_rate(model):
    """Floating-point operations a second of one matrix product: TRAIN_TOKENS tokens through the
    model's widest layer. The best of 20."""
    layers = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    weight = max((m.weight for m in layers), key=torch.numel).detach()
    x = torch.randn(TRAIN_TOKENS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return 2 * TRAIN_TOKENS * weight.numel() / min(common.repeat(lambda: x @ weight.t(), 20))


def main(argv):
    """Time learn() on each size; print one row each."""
    run.configure(globals(), argv)
    stage = common.stage("02_selfplay_rl.py", f"TRAIN_TOKENS={TRAIN_TOKENS}", "SFT_COEF=0")
    learn = stage["learn"]
    model, tok = models.load_model(MODEL, DTYPE)
    ref, _ = models.load_model(MODEL, DTYPE)
    ref.requires_grad_(False)
    adapters.choose_weights(model, LORA_RANK, 2 * LORA_RANK, 0)
    optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
    turns = recorded(tok, model.get_output_embeddings().weight.shape[0])
    sizes = sorted(map(int, TURNS.split(",")))
    if sizes[0] < 1 or sizes[-1] > len(turns):
        die(f"TURNS={TURNS}: {GAMES} has {len(turns)} turns")
    common.head(f"learning on the lengths of {GAMES}: {MODEL}, {DTYPE}, {TRAIN_TOKENS} a batch")
    learn(model, ref, optimizer, turns[:sizes[0]], [], 0)
    most = matrix_rate(model)
    print(f"matrix products: {most / 1e9:.0f} GFLOP/s")
    all_real = all_padded = 0
    for size in sizes:
        part = turns[:size]
        lengths, padded = [len(t.prompt_ids) + len(t.ids) for t in part], 0
        for batch in batches_of(part, TRAIN_TOKENS):
            padded += len(batch) * max(lengths[i] for i in batch)
        with FlopCounterMode(display=False) as counter:
            learn(model, ref, optimizer, part, [], 0)
        took = min(common.repeat(lambda: learn(model, ref, optimizer, part, [], 0), ROUNDS))
        real, share = sum(lengths), counter.get_total_flops() / took / most
        print(f"{size:5d} turns  {real:7d} real tokens  {took:8.2f} s  "
              f"{1000 * took / real:6.3f} ms a token  {share:.0%} of the matrix rate  "
              f"padded / real {padded / real:.3f}", flush=True)
        all_real, all_padded = all_real + real, all_padded + padded
    print(f"ratio padding {all_padded / all_real:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
