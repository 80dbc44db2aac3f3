"""The plan of a run of 02: memory, time and disk by its constants, before weights are loaded."""
import types

import torch

from engine import cost, memory, parallel
from engine.run import die
from selfplay.turns import longest_prompts

USABLE = 0.95  # of a card's memory: the driver and the CUDA context have the rest


def plan_run(constants, config, tok, judges, judge_tokens, size, seeds, attacked):
    """Print the plan; on CUDA, stop if the run does not fit -> are gradients to be checkpointed?
    constants: those of 02. config, tok: the policy's. judges: [(Shape, bytes of a number, NF4?)].
    judge_tokens: of a batch. size: bytes of a weight. attacked: seeds that get an attack."""
    c, shape = types.SimpleNamespace(**constants), memory.shape(config)
    evaluated = 2 * c.EVAL_SEEDS if c.EVAL_EVERY else 0  # asked plainly, and attacked
    replayed = c.METHOD == "ssp" and c.REPLAY != "off" and c.ROLES != "attacker"
    # each replay brings at most one benign game along
    games = c.SEEDS_PER_STEP + 2 * replayed * round(c.REPLAY_FRACTION * c.SEEDS_PER_STEP)
    most = dict(attack=max(attacked, evaluated), reply=max(games, 2 * evaluated))
    reflect = c.REPLY_TOKENS if replayed and c.REPLAY == "reflect" else None
    attack, reply = longest_prompts(tok, seeds, c.COT, c.ATTACK_TOKENS * (most["attack"] > 0),
                                    reflect)
    gpu, (free, where) = torch.cuda.is_available(), memory.free_bytes()
    card = cost.find_card(c.CARD or where)
    if c.CARD and not card:
        die(f"CARD={c.CARD}: none of {', '.join(cost.CARDS)}")
    if card and c.PLAN_ONLY and not gpu:  # a plan for another machine
        gpu, free, where = True, USABLE * card[1].memory * memory.GB, f"{card[0]} when it is empty"
    players = 2 if c.ADAPTERS == "per_role" else 1
    how = dict(rank=c.LORA_RANK, nf4=c.BASE_QUANT == "nf4")
    shares = parallel.number_of() if c.SHARD == "fsdp" else 1

    def plan(together, checkpointing):
        turns = {}
        for name, prompt, new in (("attack", attack, c.ATTACK_TOKENS),
                                  ("reply", reply, c.REPLY_TOKENS)):
            if most[name]:
                turns[name] = (min(together, most[name]), prompt, new)
        return memory.plan(shape, judges, size, c.OPTIMIZER, turns, c.TRAIN_TOKENS, judge_tokens,
                           eager=not gpu, checkpointing=checkpointing, players=players,
                           reference=c.REFERENCE, shares=shares, **how)

    together, checkpointing = c.SAMPLE_BATCH, c.CHECKPOINTING == "on"
    slots = gpu and c.ROLLOUT in ("auto", "slots")  # they take fewer rows at a time if they must
    fewest = min(8, together) if slots else together
    if c.CHECKPOINTING == "auto":
        checkpointing = memory.needed(plan(fewest, False), gpu)[0] > free
    while together > fewest and memory.needed(plan(together, checkpointing), gpu)[0] > free:
        together = max(fewest, together - 8)
    stop = c.MEMORY_CHECK and gpu and not c.PLAN_ONLY
    memory.print_plan(plan(together, checkpointing), stop, free, where, gpu)
    if card:
        work = dict(attack=(attacked, together, attack, c.ATTACK_TOKENS),
                    reply=(games, together, reply, c.REPLY_TOKENS))
        phases = cost.seconds(card[1], shape, judges, size, c.OPTIMIZER, work, c.UPDATES,
                              checkpointing=checkpointing, **how,
                              looks=evaluated / max(1, c.EVAL_EVERY))
        disk = cost.disk_bytes(shape, size, c.OPTIMIZER, c.STEPS, c.SAVE_EVERY, c.LORA_RANK,
                               players)
        print(cost.describe(*card, phases, c.STEPS, disk))
    return checkpointing
