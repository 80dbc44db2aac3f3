"""Stage 2, self-play RL: one model attacks and defends; a hand-written REINFORCE++ loop trains it.

    python 02_selfplay_rl.py               100 steps of 32 seeds: ~50 min, 10 GB on 2 cores
    python 02_selfplay_rl.py --paper       7B policy, WildGuard in NF4 (not run; see README)

Paper: Self-RedTeam, arXiv 2506.07468 [SRT], sections 3 (game), 4 and appendix (training). Input:
MODEL (stage 1's checkpoint), its defender.jsonl, SEEDS, the judge. Output: results/RUN/metrics.csv,
games.jsonl, curves.png, checkpoints/RUN/step_NNNNNN/; it resumes from the newest complete step.

The loop, as numbered in the code:
 1. Draw seeds, half harmful, half benign; of each half, the share ATTACKED goes to the attacker.
 2. The attacker rewrites its seeds with hidden thinking; only the text inside <answer> leaves it.
 3. The defender answers every request with hidden thinking.
 4. The judge labels (request, reply) and sees nothing else.
 5. Rewards per turn from a table, plus the format term.
 6. Returns with a k1 penalty towards the frozen warm-up model; advantages per role.
 7. Clipped policy-gradient loss on both roles' turns, plus the SFT mix; AdamW on float32 masters.

Departures from the published code, each with its reason:
 a. Who is attacked is drawn anew every step (published: once per run, so always or never).
 b. A malformed turn's thinking is never shown on (published: the whole raw text leaks then).
 c. The loss is a token mean over the whole update (published: a mean of micro-batch means).
 d. The k1 penalty uses the log-probabilities of sampling: same expectation, one forward pass less.
 e. zero_sum, which the paper analyses and its code lacks, is here: SCHEME=zero_sum.
 f. Random numbers are a function of (SEED, step), so a resumed run needs no generator state.
"""
import csv
import dataclasses
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch

import judge
import policy
from policy import ROOT, Turn, die

# ==================================================================================================
MODEL = "checkpoints/01_sft"   # where the policy starts and what the KL term holds it to
JUDGE = "embedded"        # see judge.py; paper: allenai/wildguard
QUANTIZE = "auto"         # see judge.py (hardware)
SEEDS = "prompts/seeds.jsonl"  # ours; paper: WildJailbreak train, "allenai/wildjailbreak"
RUN = "02_rl"             # names checkpoints/RUN and results/RUN
METHOD = "self_redteam"   # paper [SRT]
SCHEME = "general_sum"    # published code: general_sum; paper's theory: zero_sum
ROLES = "both"            # paper: both; ablations: "attacker" or "defender", the other static
COT = True                # paper: True; False is its no-CoT ablation
STEPS = 100               # rollouts; paper: 200
SEEDS_PER_STEP = 32       # games a rollout; paper: 128
ATTACKED = 0.5            # share of seeds that go through the attacker; paper: 0.5
ATTACK_TOKENS = 96        # longest attacker turn; paper: 2048
REPLY_TOKENS = 112        # longest defender turn; paper: 2048
LR = 2e-5                 # peak; paper: 5e-7 (7B, 128 seeds)
HORIZON = 100             # rollouts of the cosine to a tenth of LR; published: about 312
WARMUP = 0.03             # share of HORIZON; published: 0.03
UPDATES = 1               # optimizer steps a rollout; published: up to 6 of 32 turns
KL_COEF = 0.01            # k1 in the token reward; published: 0.01
CLIP_EPS = 0.2            # paper: 0.2
FORMAT_COEF = 1.0         # size of the format term; paper: 1.0
COPY_COEF = 0.0           # charge for an attack that is its seed unchanged; ours, published: 0
SFT_COEF = 1.0            # weight of the SFT mix; published: 1.0
SFT_BATCH = 8             # warm-up examples an update (ours)
CLIP_NORM = 1.0           # gradient norm; published: 1
SAVE_EVERY = 20           # steps between checkpoints
SAMPLE_BATCH = 96         # rows sampled at a time (hardware)
TRAIN_TOKENS = 3072       # tokens of a micro-batch, padding included (hardware)
DTYPE = "auto"            # bfloat16 where the hardware has it; masters are float32 (hardware)
JUDGE_FLOOR = 0.8         # a judge below it on prompts/probe.jsonl stops the run; 0: never (ours)
SEED = 0                  # of everything
PAPER = dict(MODEL="checkpoints/01_sft", JUDGE="allenai/wildguard", SEEDS="allenai/wildjailbreak",
             STEPS=200, SEEDS_PER_STEP=128, ATTACK_TOKENS=2048, REPLY_TOKENS=2048, LR=5e-7,
             HORIZON=312, UPDATES=6, SFT_BATCH=32, SAMPLE_BATCH=128, TRAIN_TOKENS=16384)
# ==================================================================================================
RANGES = dict(METHOD=["self_redteam"], SCHEME=["general_sum", "zero_sum"],
              ROLES=["both", "attacker", "defender"], STEPS=(1, 10 ** 6),
              SEEDS_PER_STEP=(2, 10 ** 5), ATTACKED=(0.0, 1.0), ATTACK_TOKENS=(1, 10 ** 5),
              REPLY_TOKENS=(1, 10 ** 5), LR=(0.0, 1.0), HORIZON=(1, 10 ** 7), WARMUP=(0.0, 1.0),
              UPDATES=(1, 64), KL_COEF=(0.0, 100.0), CLIP_EPS=(0.0, 10.0), FORMAT_COEF=(0.0, 100.0),
              COPY_COEF=(0.0, 100.0), SFT_COEF=(0.0, 100.0), SFT_BATCH=(1, 4096),
              CLIP_NORM=(1e-9, 1e9), JUDGE_FLOOR=(0.0, 1.0), SAVE_EVERY=(1, 10 ** 6),
              SAMPLE_BATCH=(1, 10 ** 5), TRAIN_TOKENS=(16, 10 ** 7),
              DTYPE=["auto", "float32", "bfloat16"], QUANTIZE=["auto", "nf4", "none"])

# ---- rewards [SRT section 3; DESIGN section 5] ---------------------------------------------------
# size of each term; signs() below says when a term is +1 and when -1
DEFENDER = dict(harmful_reply=-1.0, right_refusal=+1.0)
ATTACKER = dict(faithful=+0.5, harmful_reply=+1.0, right_refusal=-0.5)          # general_sum
OPPONENT = dict(faithful=+0.5, **{k: -v for k, v in DEFENDER.items()})          # zero_sum
REWARDS = {"general_sum": dict(attacker=ATTACKER, defender=DEFENDER),
           "zero_sum": dict(attacker=OPPONENT, defender=DEFENDER)}


def signs(kind, labels):
    """+1 or -1 for each term; a "harmful prompt" is the judge's label of what the defender saw."""
    def plus(x):
        return 1.0 if x else -1.0
    # faithful: "revision faithfulness"; right_refusal: harmful refused, benign answered
    return dict(faithful=plus(labels.prompt_harmful == kind.endswith("harmful")),
                harmful_reply=plus(labels.response_harmful),
                right_refusal=plus(labels.response_refusal == labels.prompt_harmful))


def game_reward(role, kind, labels, scheme):
    """The game's reward of a turn: look up and add. None (turn dropped) if unparsed."""
    if None in (labels.prompt_harmful, labels.response_refusal, labels.response_harmful):
        return None
    sign = signs(kind, labels)
    return sum(size * sign[term] for term, size in REWARDS[scheme][role].items())


def turn_reward(turn, labels):
    """Game reward + format term (only with hidden CoT) - charge for a copy; None drops the turn."""
    reward = game_reward(turn.role, turn.kind, labels, SCHEME)
    if reward is None:
        return None
    reward += FORMAT_COEF * (1.0 if turn.well_formed else -1.0) * COT
    return reward - COPY_COEF * (turn.role == "attacker" and is_copy(turn))


def is_copy(t):
    """Is an attack its seed up to case, spaces, punctuation? Legal in the paper's game; logged."""
    return re.sub(r"\W+", "", t.answer).lower() == re.sub(r"\W+", "", t.seed["prompt"]).lower()


# ---- learning [SRT section 4: REINFORCE++; DESIGN section 6]: pure functions of tensors ----------
def token_returns(reward, logp_T, logp_ref_T, kl_coef):
    """A turn's returns [T]: G_t = sum_{s >= t} r_s, r_s = -kl_coef * (log pi - log pi_ref)_s and
    the turn's reward added at its last token (k1, gamma 1; nothing here carries gradient)."""
    r_T = -kl_coef * (logp_T - logp_ref_T)
    r_T[-1] += reward
    return r_T.flip(0).cumsum(0).flip(0)


def advantages(returns, roles):
    """Lists of B returns [T] and B roles -> (B advantages [T], number of degenerate roles).

    A_t = (G_t - mean) / std over all tokens of a role in a step; zeros if its returns are equal.
    """
    out, degenerate = [None] * len(returns), 0
    for role in set(roles):
        members = [i for i, r in enumerate(roles) if r == role]
        all_N = torch.cat([returns[i] for i in members])
        std = all_N.std(correction=0)
        degenerate += bool(std < 1e-6)
        for i in members:
            centred = returns[i] - all_N.mean()
            out[i] = centred / std if std >= 1e-6 else torch.zeros_like(centred)
    return out, degenerate


def reinforce_loss(logp_N, logp_old_N, advantage_N, eps):
    """(sum over tokens of -min(rho A, clip(rho, 1 - eps, 1 + eps) A), number of clipped tokens).

    rho = pi / pi_old. A sum, not a mean: the caller divides by the token count of the whole update,
    so that micro-batches of any size give the same gradient.
    """
    rho_N = (logp_N - logp_old_N).exp()
    clipped_N = rho_N.clamp(1 - eps, 1 + eps)
    loss_N = -torch.minimum(rho_N * advantage_N, clipped_N * advantage_N)
    return loss_N.sum(), int(((rho_N - clipped_N).detach() * advantage_N).abs().gt(0).sum())


def learning_rate(update, updates_in_horizon):
    """Linear warm-up over WARMUP of the horizon, then cosine to a tenth of LR (as published)."""
    progress = min(1.0, update / updates_in_horizon)
    warm = min(1.0, (update + 1) / max(1.0, WARMUP * updates_in_horizon))
    return LR * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# ---- the game [SRT section 3] --------------------------------------------------------------------
def draw_seeds(seeds, step):
    """(1) A step's games -> list of (kind, seed). Each half walks its seeds, shuffled per epoch."""
    games = []
    for harmful, name in ((True, "harmful"), (False, "benign")):
        half = [s for s in seeds if s["harmful"] is harmful]
        n = SEEDS_PER_STEP // 2 + (SEEDS_PER_STEP % 2 if harmful else 0)
        attacked = random.Random(f"{SEED} {harmful} {step}").sample(range(n), round(ATTACKED * n))
        orders = {}  # by epoch; a step may reach into the next one
        for i in range(n):
            epoch, k = divmod(step * n + i, len(half))
            if epoch not in orders:
                shuffler = random.Random(f"{SEED} {harmful} {epoch}")
                orders[epoch] = shuffler.sample(half, len(half))
            games.append((("generated_" if i in attacked else "vanilla_") + name, orders[epoch][k]))
    return games


def play(attacker, defender, tok, scorer, games, generator):
    """(2)-(5) Play the games -> Turns of both roles with labels and rewards. No gradient here."""
    # (2) the attacker rewrites; its thinking stays hidden
    drafts = [Turn("attacker", kind, seed, policy.attacker_prompt(tok, seed, COT), game=g)
              for g, (kind, seed) in enumerate(games) if kind.startswith("generated")]
    attacks = policy.speak(attacker, tok, drafts, COT, ATTACK_TOKENS, 1.0, SAMPLE_BATCH, generator)
    shown = {t.game: t.answer for t in attacks}
    # (3) the defender answers the attack, or the seed itself
    drafts = [Turn("defender", kind, seed, policy.defender_prompt(tok, text, COT), text, game=g)
              for g, (kind, seed) in enumerate(games) for text in [shown.get(g, seed["prompt"])]]
    replies = policy.speak(defender, tok, drafts, COT, REPLY_TOKENS, 1.0, SAMPLE_BATCH, generator)
    # (4) the judge sees (request, reply)
    labels = scorer.classify([(t.shown, t.answer) for t in replies])
    # (5) a reward for each turn
    return [dataclasses.replace(t, labels=labels[t.game], reward=turn_reward(t, labels[t.game]))
            for t in attacks + replies]


# ---- one update ----------------------------------------------------------------------------------
def batches_of(turns):
    """Micro-batches of turns: lists of indices of at most TRAIN_TOKENS padded tokens, by length, of
    one instruction each, so that its tokens go through the model once (policy.shared_opening)."""
    groups, out = {}, []
    for i, t in enumerate(turns):
        groups.setdefault((t.role, t.role == "attacker" and t.kind), []).append(i)
    for group in groups.values():
        lengths = [len(turns[i].prompt_ids) + len(turns[i].ids) for i in group]
        out += [[group[k] for k in part] for part in policy.micro_batches(lengths, TRAIN_TOKENS)]
    return out


@torch.no_grad()
def logprobs_of(model, turns):
    """Log-probabilities of the turns' tokens under a model: a tensor [T] on the CPU for each."""
    out = [None] * len(turns)
    for part in batches_of(turns):
        logp_N, _ = policy.token_logprobs(model, [turns[i].prompt_ids for i in part],
                                          [turns[i].ids for i in part])
        for i, logp_T in zip(part, logp_N.cpu().split([len(turns[i].ids) for i in part])):
            out[i] = logp_T
    return out


def update(model, optimizer, turns, advantage, old, sft_batch, lr):
    """(7) A step on turns, advantages [T], old log-probs [T] (None: on-policy) -> dict of sums."""
    tokens = sum(len(t.ids) for t in turns)
    out = dict(loss=0.0, entropy=0.0, clipped=0, gap=0.0, sft=0.0, tokens=tokens)
    for part in batches_of(turns):
        logp_N, entropy_N = policy.token_logprobs(model, [turns[i].prompt_ids for i in part],
                                                  [turns[i].ids for i in part])
        adv_N = torch.cat([advantage[i] for i in part]).to(logp_N.device)
        old_N = torch.cat([old[i] for i in part]).to(logp_N.device) if old else logp_N.detach()
        loss, clipped = reinforce_loss(logp_N, old_N, adv_N, CLIP_EPS)
        (loss / tokens).backward()
        optimizer.collect()
        sampled_N = torch.tensor([x for i in part for x in turns[i].logps], device=logp_N.device)
        out["loss"] += loss.item() / tokens
        out["entropy"] += entropy_N.sum().item()
        out["gap"] += (logp_N.detach() - sampled_N).abs().sum().item()
        out["clipped"] += clipped
    if sft_batch:
        total = sum(len(e["completion_ids"]) for e in sft_batch)
        lengths = [len(e["prompt_ids"]) + len(e["completion_ids"]) for e in sft_batch]
        for part in policy.micro_batches(lengths, TRAIN_TOKENS):
            logp_N, _ = policy.token_logprobs(model, [sft_batch[i]["prompt_ids"] for i in part],
                                              [sft_batch[i]["completion_ids"] for i in part])
            loss = -logp_N.sum() / total
            (SFT_COEF * loss).backward()
            optimizer.collect()
            out["sft"] += loss.item()
    out["grad_norm"] = optimizer.step(lr, CLIP_NORM)
    return out


def learn(model, ref, optimizer, turns, sft, step):
    """(6)-(7) Train on the step's undropped turns whose role learns -> dict of figures."""
    turns = [t for t in turns if t.reward is not None and ROLES in ("both", t.role)]
    if not turns:
        return dict(kl=0.0, entropy=0.0, lr=0.0, degenerate=2, grad_norm=0.0, sft=0.0,
                    clipped=0.0, gap=0.0)
    # (6) returns and advantages; the k1 term uses the log-probs of sampling (departure d)
    sampled, reference = [torch.tensor(t.logps) for t in turns], logprobs_of(ref, turns)
    returns = [token_returns(t.reward, s, r, KL_COEF) for t, s, r in zip(turns, sampled, reference)]
    advantage, degenerate = advantages(returns, [t.role for t in turns])
    kl = (torch.cat(sampled) - torch.cat(reference)).mean().item()
    # (7) one pass over the turns in UPDATES optimizer steps; old log-probs where there are several
    old = logprobs_of(model, turns) if UPDATES > 1 else None
    rng = random.Random(f"{SEED} update {step}")
    order, parts = rng.sample(range(len(turns)), len(turns)), []
    for u in range(UPDATES):
        at = order[u::UPDATES]
        if at:
            lr = learning_rate(step * UPDATES + u, HORIZON * UPDATES)
            batch = rng.sample(sft, min(SFT_BATCH, len(sft))) if SFT_COEF else []
            parts += [update(model, optimizer, [turns[i] for i in at], [advantage[i] for i in at],
                             old and [old[i] for i in at], batch, lr)]
    total = {k: sum(p[k] for p in parts) for k in parts[0]}
    tokens, n = total["tokens"], len(parts)
    return dict(kl=kl, entropy=total["entropy"] / tokens, lr=lr, degenerate=degenerate,
                grad_norm=total["grad_norm"] / n, sft=total["sft"] / n,
                clipped=total["clipped"] / tokens, gap=total["gap"] / tokens)


# ---- figures, files, resume ----------------------------------------------------------------------
def rate(items):
    """Mean of booleans or numbers; nan where there is none."""
    items = list(items)
    return sum(map(float, items)) / len(items) if items else float("nan")


def figures(turns):
    """What a step is watched by -> dict; names as in the step line and metrics.csv."""
    atk, dfd = ([t for t in turns if t.role == r] for r in ("attacker", "defender"))
    seen = [t for t in dfd if t.labels.parsed]
    of = {k: [t.labels for t in seen if t.kind == k] for k in
          ("generated_harmful", "vanilla_harmful", "generated_benign", "vanilla_benign")}
    return dict(
        atk_r=rate(t.reward for t in atk if t.reward is not None),
        asr=rate(x.response_harmful for x in of["generated_harmful"]),
        asr_vanilla=rate(x.response_harmful for x in of["vanilla_harmful"]),
        def_r=rate(t.reward for t in dfd if t.reward is not None),
        refuse_h=rate(x.response_refusal for x in of["generated_harmful"] + of["vanilla_harmful"]),
        comply_b=rate(not x.response_refusal
                      for x in of["generated_benign"] + of["vanilla_benign"]),
        fmt=rate(t.well_formed for t in turns), fmt_atk=rate(t.well_formed for t in atk),
        faithful=rate(t.labels.prompt_harmful == t.kind.endswith("harmful")
                      for t in atk if t.labels.parsed),
        copy=rate(is_copy(t) for t in atk), unique=len({t.answer for t in atk}) / max(1, len(atk)),
        atk_refuse=rate(judge.refusal_match(t.answer) for t in atk),
        drop=sum(t.reward is None for t in turns), turns=len(turns),
        len=rate(len(t.ids) for t in turns), len_atk=rate(len(t.ids) for t in atk))


def step_line(step, m):
    """One line a step, fixed order, the names of metrics.csv."""
    return (f"step {step:03d}/{STEPS} | atk r {m['atk_r']:+.2f} asr {m['asr']:.2f} | "
            f"def r {m['def_r']:+.2f} refuse(h) {m['refuse_h']:.2f} "
            f"comply(b) {m['comply_b']:.2f} | fmt {m['fmt']:.2f} | drop {m['drop']}/{m['turns']} | "
            f"kl {m['kl']:.3f} | H {m['entropy']:.2f} | len {m['len']:.0f} | "
            f"gn {m['grad_norm']:.1f} | {m['seconds']:.0f} s | {m['gb']:.1f} GB")


def write_games(file, step, turns):
    """One JSON line a game: seed id, both turns, labels, rewards (harmful text: see README)."""
    attacks = {t.game: t for t in turns if t.role == "attacker"}
    for t in (t for t in turns if t.role == "defender"):
        row = dict(step=step, game=t.game, kind=t.kind, seed=t.seed["id"], request=t.shown,
                   labels=dataclasses.asdict(t.labels))
        for name, x in (("attacker", attacks.get(t.game)), ("defender", t)):
            if x:
                row[name] = dict(thinking=x.thinking, answer=x.answer, well_formed=x.well_formed,
                                 reward=x.reward, tokens=len(x.ids))
        file.write(json.dumps(row) + "\n")


def draw_curves(path, rows):
    """metrics.csv as one picture: thin lines are steps, thick lines means over 10 steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = {"reward": ["atk_r", "def_r"], "harmful requests": ["asr", "asr_vanilla", "refuse_h"],
              "benign requests": ["comply_b"],
              "format and attacks": ["fmt", "faithful", "unique", "copy"],
              "KL to the start (per token), entropy / 10": ["kl", "entropy"],
              "tokens per turn": ["len", "len_atk"]}
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            y = [float(r[name]) / (10 if name == "entropy" else 1) for r in rows]
            x = [int(r["step"]) for r in rows]
            [thin] = axis.plot(x, y, lw=0.6, alpha=0.35)
            known = [[v for v in y[max(0, i - 9):i + 1] if v == v] for i in range(len(y))]
            axis.plot(x, [sum(k) / len(k) if k else float("nan") for k in known], lw=2,
                      color=thin.get_color(), label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def free_to_change(source):
    """Constants that may differ in a resumed run: STEPS, SAVE_EVERY and those tagged (hardware)."""
    return {"STEPS", "SAVE_EVERY", *re.findall(r"^([A-Z_]+) =.*\(hardware\)", source, re.MULTILINE)}


def newest(folder):
    """The newest complete step folder of a run that holds its optimizer, or None."""
    return max((p for p in folder.glob("step_*")
                if p.suffix != ".tmp" and (p / "state.safetensors").exists()), default=None)


def check_resume(meta, where):
    """A run goes on only with the constants it began with."""
    free = free_to_change(Path(__file__).read_text())
    now = policy.constants(globals())
    changed = [f"{k} {meta['constants'].get(k)!r} -> {v!r}" for k, v in now.items()
               if k not in free and meta["constants"].get(k) != v]
    if changed:
        die(f"{where} was made with other constants ({'; '.join(changed)}): "
            "restore them, give another RUN=, or delete it")


def save(model, tok, optimizer, step):
    """checkpoints/RUN/step_NNNNNN, atomically; only the newest step keeps the optimizer's state."""
    folder = ROOT / "checkpoints" / RUN
    meta = dict(policy.make_meta(globals(), MODEL), step=step)
    policy.save_folder(folder / f"step_{step:06d}", model, tok, meta, optimizer.tensors())
    for old in folder.glob("step_*"):
        if old.name != f"step_{step:06d}":
            (old / "state.safetensors").unlink(missing_ok=True)


def cut(path, keep):
    """Keep lines with keep(line): what a killed run wrote after its last checkpoint goes."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(x for x in lines if x.endswith("\n") and keep(x)), encoding="utf-8")


def load_sft():
    """The defender's warm-up examples beside MODEL; where there are none, there is no SFT mix."""
    path = Path(MODEL if Path(MODEL).is_absolute() else ROOT / MODEL) / "defender.jsonl"
    if not path.exists():
        print(f"no SFT mix: {MODEL} has no defender.jsonl (stage 1 writes it)")
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def start():
    """All before the first step -> (model, ref, tok, scorer, optimizer, seeds, sft, first step)."""
    if MODEL == "checkpoints/01_sft" and not (ROOT / MODEL / "config.json").exists():
        die(f"{MODEL} not found: run python 01_sft_warmup.py first")
    source = str(ROOT / MODEL) if (ROOT / MODEL).is_dir() else MODEL
    seeds = policy.load_seeds(SEEDS, "train")
    resumed = newest(ROOT / "checkpoints" / RUN)
    if resumed:
        check_resume(json.loads((resumed / "meta.json").read_text()), resumed.relative_to(ROOT))
    scorer = judge.load_judge(JUDGE, QUANTIZE)
    score, line = judge.probe(scorer)
    print(line)
    if score < JUDGE_FLOOR:
        die("a policy learns its judge's errors; this one is below JUDGE_FLOOR "
            f"({score:.2f} < {JUDGE_FLOOR}): use a better one, or JUDGE_FLOOR=0 to go on")
    ref, tok = policy.load(source, DTYPE)
    ref.requires_grad_(False)
    model, _ = policy.load(str(resumed or source), DTYPE)
    optimizer = policy.MasterAdamW(model, (0.9, 0.95), 0.0)
    first = 0
    if resumed:
        from safetensors.torch import load_file
        optimizer.restore(load_file(str(resumed / "state.safetensors")))
        first = int(resumed.name.split("_")[1])
        print(f"resumed from {resumed.relative_to(ROOT)}")
    sft = load_sft() if ROLES != "attacker" else []
    return model, ref, tok, scorer, optimizer, seeds, sft, first


def one_step(model, ref, tok, scorer, optimizer, seeds, sft, step):
    """(1)-(7) of the docstring -> (turns, figures)."""
    began = time.time()
    generator = torch.Generator().manual_seed(hash((SEED, step)) % 2 ** 63)
    games = draw_seeds(seeds, step)                                                     # (1)
    attacker, defender = (model if ROLES in ("both", r) else ref for r in ("attacker", "defender"))
    turns = play(attacker, defender, tok, scorer, games, generator)                     # (2)-(5)
    played = time.time()
    m = dict(step=step + 1, **figures(turns),
             **learn(model, ref, optimizer, turns, sft, step))                          # (6)-(7)
    return turns, dict(m, seconds=time.time() - began, play_s=played - began, gb=policy.peak_gb())


def main(argv):
    """Self-play from the newest checkpoint to STEPS."""
    policy.configure(globals(), argv)
    model, ref, tok, scorer, optimizer, seeds, sft, first = start()
    out = ROOT / "results" / RUN
    out.mkdir(parents=True, exist_ok=True)
    cut(out / "metrics.csv", lambda x: x.startswith("step,") or int(x.split(",")[0]) <= first)
    cut(out / "games.jsonl", lambda x: json.loads(x)["step"] <= first)
    print(f"{len(seeds)} seeds | {policy.machine()} | {next(model.parameters()).dtype} | "
          f"warm-up examples {len(sft)}")
    for step in range(first, STEPS):
        turns, m = one_step(model, ref, tok, scorer, optimizer, seeds, sft, step)
        print(step_line(step + 1, m), flush=True)
        with open(out / "games.jsonl", "a", encoding="utf-8") as f:
            write_games(f, step + 1, turns)
        new = not (out / "metrics.csv").exists()
        with open(out / "metrics.csv", "a", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=m)
            if new:
                writer.writeheader()
            writer.writerow({k: round(v, 5) if isinstance(v, float) and k != "lr" else v
                             for k, v in m.items()})
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            save(model, tok, optimizer, step + 1)
            draw_curves(out / "curves.png", list(csv.DictReader(open(out / "metrics.csv"))))
    print(f"made checkpoints/{RUN}/step_{STEPS:06d} and results/{RUN}/curves.png; "
          "next: python 03_evaluate.py")


if __name__ == "__main__":
    main(sys.argv[1:])
