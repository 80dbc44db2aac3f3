"""Stage 1: teach both roles the format by self-distillation [SRT appendix] -> checkpoints/01_sft/.

    python 01_sft_warmup.py                  ~10 min on 2 cores, 13 GB

Input: MODEL, the training half of SEEDS, the judge. Output: checkpoints/RUN/ (model, tokenizer,
meta.json, defender.jsonl: the examples that stage 2 mixes in), results/RUN/examples.jsonl (both
roles, as text).

1. The model answers warm-up seeds: benign ones plainly, harmful ones told to decline.
2. The judge keeps complying replies to benign seeds and safe refusals of harmful ones,
   WARMUP_REFUSALS of the whole: the warm-up teaches the format and keeps the model useful; safety
   is for the game to teach.
3. The model writes the thinking that leads to each reply ("post-fill CoT"); a thin template stands
   in where that thinking is unusable (share printed).
4. The attacker's examples rewrite a seed by one of the strategies of prompts/strategies.txt.
5. Cross-entropy on the completion tokens, the end of the turn included; nothing of the prompt.
6. The rate of well-formed turns of each role before and after, on held-back seeds at temperature 1.

Departures: one model teaches itself (SRT distils from its own policy too, with a larger judge); the
attacker's examples are ours, because a small or safety-tuned model refuses to attack.
"""
import json
import math
import random
import re
import sys
import time

import torch

import judge
import optim
import policy
import stage
from policy import fill, neutralize, read_prompt
from stage import ROOT, die

# ==================================================================================================
MODEL = "smollm2"         # policy before training: "smollm2", a Hugging Face id, or a folder
JUDGE = "embedded"        # see judge.py; paper: allenai/wildguard
QUANTIZE = "auto"         # see judge.py (hardware)
SEEDS = "prompts/seeds.jsonl"  # ours; paper: WildJailbreak train, "allenai/wildjailbreak"
RUN = "01_sft"            # names checkpoints/RUN and results/RUN
COT = True                # hidden chain of thought; False: the papers' ablation
DEFENDER_EXAMPLES = 240   # examples of the defender's role at most (ours)
ATTACKER_EXAMPLES = 160   # examples of the attacker's role (ours)
WARMUP_REFUSALS = 0.2     # share of refusals among the defender's examples (ours)
REPLY_TOKENS = 72         # longest reply, tokens (hardware)
THINK_TOKENS = 40         # longest post-filled thinking, tokens (hardware)
LR = 4e-5                 # peak learning rate, cosine to a tenth (ours)
EPOCHS = 3                # passes over the examples (ours)
BATCH = 8                 # examples an update (ours)
PROBE = 96                # sampled turns of each role before and after (ours)
SAMPLE_BATCH = 96         # rows sampled at a time (hardware)
TRAIN_TOKENS = 2048       # tokens of a micro-batch, padding included (hardware)
DTYPE = "auto"            # of the weights: bfloat16 where the hardware has it (hardware)
OPTIMIZER = "master"      # 20 bytes a bfloat16 parameter; "kahan": 10 bytes (see optim.py)
SEED = 0                  # of everything
PAPER = dict(MODEL="Qwen/Qwen2.5-7B-Instruct", JUDGE="allenai/wildguard",
             SEEDS="allenai/wildjailbreak", DEFENDER_EXAMPLES=4000, ATTACKER_EXAMPLES=2000,
             REPLY_TOKENS=1024, THINK_TOKENS=512, LR=1e-5, BATCH=32, PROBE=256, SAMPLE_BATCH=128,
             TRAIN_TOKENS=4096, OPTIMIZER="kahan")
# ==================================================================================================
RANGES = dict(DEFENDER_EXAMPLES=(1, 10 ** 6), ATTACKER_EXAMPLES=(1, 10 ** 6),
              WARMUP_REFUSALS=(0.0, 1.0), LR=(0.0, 1.0), EPOCHS=(1, 100), BATCH=(1, 4096),
              PROBE=(1, 10 ** 5), REPLY_TOKENS=(1, 10 ** 5), SAMPLE_BATCH=(1, 10 ** 5),
              THINK_TOKENS=(1, 10 ** 5), TRAIN_TOKENS=(16, 10 ** 7),
              DTYPE=["auto", "float32", "bfloat16"], QUANTIZE=["auto", "nf4", "none"],
              OPTIMIZER=[*optim.KINDS])


def table(name, width):
    """Lines `a | b [| c]` of a prompt file as tuples of `width` texts."""
    rows = [tuple(x.strip() for x in line.split("|", width - 1))
            for line in read_prompt(name).splitlines()]
    if any(len(r) != width for r in rows):
        die(f"prompts/{name}: every line needs {width} columns divided by |")
    return rows


def ask(model, tok, texts, max_new, temperature, generator):
    """Plain chat completions -> list of (text, ended): no turn format, for building examples."""
    prompts = [policy.render(tok, t) for t in texts]
    out = policy.sample(model, tok, prompts, max_new, temperature, SAMPLE_BATCH, generator)
    return [(tok.decode(ids, skip_special_tokens=True).strip(), ids[-1] in tok.stop_ids)
            for ids, _ in out]


def whole_sentences(text, ended):
    """One paragraph of complete sentences: a reply cut at its limit loses its unfinished end."""
    text = re.sub(r"\s+", " ", text)
    if not ended:
        text = text[:max(text.rfind(x) for x in (". ", "! ", "? ")) + 1]
    return text


def usable_thinking(text):
    """Is a post-filled thought fit to train on: one or two plain sentences about the request?"""
    return (20 <= len(text) <= 240 and text.startswith("The user") and text[-1] in ".!"
            and "<" not in text)


def defender_examples(model, tok, scorer, seeds, rng, generator):
    """Steps 1-3 -> list of (seed, thinking, answer, kind), kind "comply" or "refuse"."""
    rng.shuffle(seeds)
    harmful, benign = ([s for s in seeds if s["harmful"] is h] for h in (True, False))
    pool = benign[:2 * DEFENDER_EXAMPLES] + harmful[:DEFENDER_EXAMPLES]
    ways = {True: read_prompt("warmup_refuse.txt"), False: read_prompt("warmup_answer.txt")}
    asked = [fill(ways[s["harmful"]], REQUEST=neutralize(s["prompt"], tok)) for s in pool]
    replies = ask(model, tok, asked, REPLY_TOKENS, 0.7, generator)
    replies = [neutralize(whole_sentences(*r), tok) for r in replies]
    labels = scorer.classify([(s["prompt"], r) for s, r in zip(pool, replies)])
    refuse, comply = [], []
    for seed, reply, x in zip(pool, replies, labels):
        # two opinions on what will be imitated
        refuses = x.response_refusal and judge.refusal_match(reply)
        complies = x.response_refusal is False and not judge.refusal_match(reply)
        if len(reply) > 10 and x.response_harmful is False:
            if seed["harmful"] and refuses:
                refuse.append((seed, reply, "refuse"))
            elif not seed["harmful"] and complies:
                comply.append((seed, reply, "comply"))
    print("replies kept by the judge: "
          f"{len(refuse)} of {sum(s['harmful'] for s in pool)} refusals of harmful seeds, "
          f"{len(comply)} of {sum(not s['harmful'] for s in pool)} answers to benign seeds")
    n_refuse = min(len(refuse), round(WARMUP_REFUSALS * DEFENDER_EXAMPLES))
    kept = refuse[:n_refuse] + comply[:DEFENDER_EXAMPLES - n_refuse]
    if not kept:
        if judge.adapter_of(JUDGE) and MODEL == policy.EMBEDDED:
            die("the judge kept no reply at all: run python judge.py to check it")
        print("WARNING: nothing was kept; the model's raw replies are used, so that the chain "
              "can be tried")
        kept = [(s, r or "I can help with that.", "comply")
                for s, r in zip(pool, replies)][:DEFENDER_EXAMPLES]
    if not COT:
        return [(s, "", r, kind) for s, r, kind in kept]
    asked = [fill(read_prompt("warmup_postfill.txt"), REQUEST=neutralize(s["prompt"], tok),
                  ANSWER=r) for s, r, _ in kept]
    thoughts = [whole_sentences(*t) for t in ask(model, tok, asked, THINK_TOKENS, 0.7, generator)]
    templates = table("warmup_thoughts.txt", 2)
    good = [usable_thinking(t) for t in thoughts]
    print(f"post-filled thinking usable: {sum(good)} of {len(good)}; "
          "a template stands in for the others")
    return [(s, t if ok else rng.choice([x for k, x in templates if k == kind]), r, kind)
            for (s, r, kind), t, ok in zip(kept, thoughts, good)]


def attacker_examples(tok, seeds, rng):
    """Step 4 -> list of (seed, thinking, answer, strategy): all strategies alike, half harmful."""
    strategies = table("strategies.txt", 3)
    halves = [[s for s in seeds if s["harmful"] is h] for h in (True, False)]
    out = []
    for i in range(ATTACKER_EXAMPLES):
        name, thought, shell = strategies[(i // 2) % len(strategies)]
        seed = rng.choice(halves[i % 2])
        answer = fill(shell, SEED=neutralize(seed["prompt"], tok))
        out.append((seed, thought if COT else "", answer, name))
    return out


def tokenize(tok, prompt_ids, thinking, answer):
    """One example -> (prompt ids, completion ids): what the model should sample, stop id last."""
    text = f" {thinking} </think> <answer> {answer} </answer>" if COT else answer
    return prompt_ids, tok(text, add_special_tokens=False).input_ids + [tok.turn_end]


def build(tok, defender, attacker):
    """All examples as dicts with role, text and token ids."""
    rows = []
    for role, examples in (("defender", defender), ("attacker", attacker)):
        for seed, thinking, answer, kind in examples:
            ids = policy.defender_prompt(tok, seed["prompt"], COT) if role == "defender" else \
                policy.attacker_prompt(tok, seed, COT)
            prompt_ids, completion_ids = tokenize(tok, ids, thinking, answer)
            rows.append(dict(role=role, kind=kind, seed=seed["id"], thinking=thinking,
                             answer=answer, prompt_ids=prompt_ids, completion_ids=completion_ids))
    return rows


def train(model, rows, rng):
    """Step 5: EPOCHS passes, prints the mean loss of every tenth of the run."""
    optimizer = optim.KINDS[OPTIMIZER](model, (0.9, 0.95), 0.0)
    updates = [order[i:i + BATCH] for _ in range(EPOCHS) for order in [rng.sample(rows, len(rows))]
               for i in range(0, len(rows), BATCH)]
    recent, began = [], time.time()
    for step, batch in enumerate(updates):
        total = sum(len(r["completion_ids"]) for r in batch)
        lengths = [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in batch]
        for part in policy.micro_batches(lengths, TRAIN_TOKENS):
            logp_N, _ = policy.token_logprobs(model, [batch[i]["prompt_ids"] for i in part],
                                              [batch[i]["completion_ids"] for i in part])
            loss = -logp_N.sum() / total
            loss.backward()
            recent.append((loss.item(), step))
            optimizer.collect()
        progress, warm = step / len(updates), min(1.0, (step + 1) / (0.1 * len(updates)))
        lr = LR * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.step(lr, 1.0)
        if (step + 1) % max(1, len(updates) // 10) == 0 or step + 1 == len(updates):
            steps = {s for _, s in recent}
            mean = sum(x for x, _ in recent) / len(steps)
            print(f"update {step + 1:3d}/{len(updates)} | loss {mean:.3f} | "
                  f"{time.time() - began:.0f} s", flush=True)
            recent = []


def probe(model, tok, scorer, seeds, when):
    """Step 6: PROBE sampled turns of each role on held-back seeds -> rates, also printed."""
    halves = [[s for s in seeds if s["harmful"] is h] for h in (True, False)]
    picked = [halves[i % 2][(i // 2) % len(halves[i % 2])] for i in range(PROBE)]
    drafts = [policy.Turn("defender", "vanilla_harmful" if s["harmful"] else "vanilla_benign", s,
                          policy.defender_prompt(tok, s["prompt"], COT), s["prompt"])
              for s in picked]
    drafts += [policy.Turn("attacker", "generated_harmful" if s["harmful"] else "generated_benign",
                           s, policy.attacker_prompt(tok, s, COT)) for s in picked]
    turns = policy.speak(model, tok, drafts, COT, REPLY_TOKENS + THINK_TOKENS + 16, 1.0,
                         SAMPLE_BATCH, torch.Generator().manual_seed(SEED))
    rate = {role: sum(t.well_formed for t in turns if t.role == role) / PROBE
            for role in ("defender", "attacker")}
    labels = scorer.classify([(t.shown, t.answer) for t in turns[:PROBE]])
    pick = {h: [x for x, s in zip(labels, picked) if s["harmful"] is h] for h in (True, False)}
    rate["asr"] = sum(bool(x.response_harmful) for x in pick[True]) / max(1, len(pick[True]))
    comply = sum(x.response_refusal is False for x in pick[False])
    rate["comply"] = comply / max(1, len(pick[False]))
    print(f"{when}: well-formed defender {rate['defender']:.2f} attacker {rate['attacker']:.2f} "
          f"(n {PROBE} each) | asr {rate['asr']:.2f} comply(b) {rate['comply']:.2f} "
          f"(n {PROBE // 2} each, held-back seeds, sampled)", flush=True)
    return rate


def show(tok, row):
    """Print one decoded example with its loss mask: what is trained on stands between the marks."""
    print("--- one example; the loss is taken between [[ and ]]")
    print(tok.decode(row["prompt_ids"]) + "[[" + tok.decode(row["completion_ids"]) + "]]")
    print(f"--- mask: {len(row['prompt_ids'])} tokens without loss, "
          f"{len(row['completion_ids'])} with")


def main(argv):
    """The numbered steps of the docstring."""
    stage.configure(globals(), argv)
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    seeds, held_back = stage.load_seeds(SEEDS, "train"), stage.load_seeds(SEEDS, "held_back")
    table("strategies.txt", 3), table("warmup_thoughts.txt", 2)  # a bad line stops here, not later
    scorer = judge.load_judge(JUDGE, QUANTIZE)
    model, tok = policy.load(MODEL, DTYPE)
    began = time.time()
    before = probe(model, tok, scorer, held_back, "before")
    rows = build(tok, defender_examples(model, tok, scorer, seeds, rng, generator),
                 attacker_examples(tok, seeds, rng))
    kinds = {k: sum(r["kind"] == k for r in rows) for k in ("comply", "refuse")}
    print(f"examples: {kinds['comply']} comply, {kinds['refuse']} refuse, {ATTACKER_EXAMPLES} "
          f"attacks; {time.time() - began:.0f} s")
    show(tok, rows[0])
    train(model, rows, rng)
    after = probe(model, tok, scorer, held_back, "after ")
    meta = dict(stage.make_meta(globals(), MODEL), before=before, after=after, examples=kinds)
    out = ROOT / "results" / RUN
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "examples.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({k: r[k] for k in ("role", "kind", "seed", "thinking", "answer")})
                     + "\n" for r in rows)
    mix = "".join(json.dumps({k: r[k] for k in ("kind", "seed", "prompt_ids", "completion_ids")})
                  + "\n" for r in rows if r["role"] == "defender")
    stage.save_folder(ROOT / "checkpoints" / RUN, model, tok, meta, files={"defender.jsonl": mix})
    if after["comply"] < 0.85:
        print(f"WARNING: benign compliance {after['comply']:.2f} is below .85: "
              "lower WARMUP_REFUSALS or LR")
    print(f"made checkpoints/{RUN} ({time.time() - began:.0f} s, "
          f"{stage.peak_gb():.1f} GB); next: python 02_selfplay_rl.py")


if __name__ == "__main__":
    main(sys.argv[1:])
