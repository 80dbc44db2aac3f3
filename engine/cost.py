"""What a run takes in time and on disk, by arithmetic: bytes over a card's bandwidth, operations
over its rate. Nothing here is measured; bench/gpu.py prints it beside what it measures.

A pass over n tokens takes 2 operations a weight and token, backwards 4 (2 where only an adapter
learns), once more 2 under gradient checkpointing. A token step of the rollouts reads all weights
once, and the keys and values of its rows. Left out: attention's own operations, a tenth at these
lengths, and the replies by which SSP's pool tests new failures (FRESH in selfplay/replay.py)."""
import re
from collections import namedtuple

from engine.memory import GB, kv_bytes, weight_bytes
from engine.optim import BYTES, SAVED

# Vendors' data sheets: memory in GB, bandwidth in TB/s, rate in dense bfloat16 TFLOP/s
Card = namedtuple("Card", "memory bandwidth rate")
CARDS = {"RTX 3090": Card(24, 0.94, 71), "RTX 4090": Card(24, 1.01, 165),
         "RTX 5090": Card(32, 1.79, 209), "L4": Card(24, 0.30, 121), "A10": Card(24, 0.60, 125),
         "RTX A6000": Card(48, 0.77, 155), "RTX 6000 Ada": Card(48, 0.96, 364),
         "L40S": Card(48, 0.86, 362), "A100": Card(80, 2.04, 312), "H100": Card(80, 3.35, 989),
         "H200": Card(141, 4.80, 989), "B200": Card(180, 8.00, 2250)}
BANDWIDTH_USED = 0.6   # of a card's, in a token step (assumed)
RATE_USED = 0.4        # of a card's, in passes over many tokens (assumed)
TURN_USED = 0.5        # of the longest turn, on average (assumed)
UNPACKED = 0.4         # of NF4's weights: unpacked for each pass, so written and read (assumed)
EXCHANGE = 0.5         # of a turn's tokens are shown to the judge, the rest is thinking (assumed)
JUDGE_PROMPT = 250     # tokens of the judge's instructions around an exchange


def find_card(name):
    """The longest name of CARDS in a device's (A10 in A10G, not A1000) -> (name, Card) or None."""
    found = [known for known in CARDS if re.search(rf"(?<!\w){known}(?!\d)", name)]
    best = max(found, key=len, default=None)
    return best and (best, CARDS[best])


def seconds(card, model, judges, size, optimizer, turns, updates, rank=0, nf4=False,
            checkpointing=False, looks=0):
    """Seconds of a step -> {phase: seconds}. model, judges, size, optimizer, rank, nf4,
    checkpointing: as in memory.plan(). turns: {"attack" | "reply": (rows in all, rows at a time,
    prompt tokens, longest new)}. updates: optimizer steps. looks: evaluated seeds a step."""
    bandwidth, rate = card.bandwidth * 1e12 * BANDWIDTH_USED, card.rate * 1e12 * RATE_USED
    weights = weight_bytes(model, size, nf4)[0] + nf4 * UNPACKED * 2 * size * model.packed
    out, tokens, shown = {}, 0, 0
    for name, (rows, together, prompt, longest) in turns.items():
        if not rows:
            continue
        new, together = TURN_USED * longest, min(rows, together)
        context = together * (prompt + new / 2) * kv_bytes(model, size)
        every = rows + looks * (2 if name == "reply" else 1)
        steps = max(new * every / together, new)
        each = max((weights + context) / bandwidth, 2 * model.weights * together / rate)
        out[name] = steps * each + 2 * model.weights * every * prompt / rate
        tokens += rows * (prompt + new)
        shown += every * (JUDGE_PROMPT + 2 * EXCHANGE * new)
    out["judge"] = 2 * sum(judge.weights for judge, *_ in judges) * shown / rate
    out["reference"] = (4 if updates > 1 else 2) * model.weights * tokens / rate  # 4: both models
    work = (4 if rank else 6) + 2 * checkpointing
    learning = rank * model.ports or model.weights
    moved = learning * (2 * BYTES[optimizer, size] + 3 * size) * updates
    out["learn"] = work * model.weights * tokens / rate + moved / bandwidth
    return out


def disk_bytes(model, size, optimizer, steps, save_every, rank=0, adapters=1):
    """Bytes of a run's checkpoints at their most: weights of each, the optimizer's state of the
    newest and of the one that is being written. adapters: how many learn."""
    learning = adapters * rank * model.ports or model.weights
    kept = -(-steps // save_every)
    return kept * learning * size + 2 * learning * SAVED[optimizer, size]


def describe(name, card, phases, steps, disk):
    """The cost in two lines."""
    each = sum(phases.values())
    words = ", ".join(f"{phase} {s:.0f}" for phase, s in phases.items())
    return (f"time: {each:.1f} s a step on {name} ({words}), {steps} steps "
            f"{each * steps / 3600:.1f} hours, by arithmetic: {card.bandwidth} TB/s and "
            f"{card.rate} TFLOP/s, {BANDWIDTH_USED} and {RATE_USED} used; turns {TURN_USED} of "
            f"their longest\ndisk: {disk / GB:.1f} GB of checkpoints")
