"""Stage 1: teach both roles the turn format by self-distillation -> checkpoints/01_sft/.

    python 01_sft_warmup.py                  7 min, 6 GB on 2 CPU cores

Paper: SRT (arXiv 2506.07468), its appendix on the supervised warm-up. Input: MODEL, SEEDS (splits
train and dev), the judge. Output: checkpoints/RUN/ (the adapter or model, meta.json, and the texts
that stage 2 mixes in, defender.jsonl) and results/runs/RUN/examples.jsonl (both roles).

1. The model answers the train seeds; with a harmful one it is told to decline.
2. The judge keeps answers to benign seeds and safe refusals of harmful ones. The share of refusals
   is only WARMUP_REFUSALS: the warm-up teaches the format, the game teaches safety.
3. The model writes the thinking that leads to each reply ("post-fill CoT"). A template stands in
   where that thinking is unusable (share printed).
4. The attacker's examples rewrite a seed by one of the strategies of prompts/strategies.txt.
5. Cross-entropy on the completion tokens, the end of the turn included; nothing of the prompt.
6. The rate of well-formed turns of each role before and after, on dev seeds at temperature 1.

Departures. The warm-up itself: published runs start from the instruct model, which is also their
reference; a 135M model does not write the format by itself. `02_selfplay_rl.py MODEL=<any instruct
model> SFT=<defender.jsonl>` runs without one. Our mix holds WARMUP_REFUSALS refusals; the published
data is benign chat only. One model teaches itself (SRT distils from its own policy too, with a
larger judge). The attacker's examples are ours: a small or safety-tuned model refuses to attack."""
import collections
import json
import math
import random
import re
import sys
import time
from typing import Literal

import torch

import judge
from engine import adapters, models, parallel, progress, run
from engine.batching import chunks
from engine.logprobs import cross_entropy_step
from engine.optim import OPTIMIZERS, cosine_with_warmup
from engine.run import Count, Share, die, locate
from engine.sampling import sample
from selfplay.data import halves, load_seeds, seeds_digest
from selfplay.sanitize import neutralize, printable
from selfplay.turns import (Turn, attacker_prompt, check_prompts, check_slots, complete,
                            defender_prompt, example, fill, read_prompt, render)

# ==================================================================================================
MODEL = "smollm2"         # policy before training: "smollm2", a Hugging Face id, or a folder
JUDGE = "embedded"        # see judge.py; paper: allenai/wildguard
QUANTIZE: Literal["auto", "nf4", "none"] = "auto"  # see judge.py (hardware)
SEEDS = "prompts/seeds.jsonl"  # ours; paper: WildJailbreak train, "allenai/wildjailbreak"
RUN = "01_sft"            # names checkpoints/RUN and results/runs/RUN
COT = True                # hidden chain of thought; False: the papers' ablation
DEFENDER_EXAMPLES = 240   # examples of the defender's role at most; published: twice 15,000
ATTACKER_EXAMPLES = 160   # examples of the attacker's role (ours)
WARMUP_REFUSALS: Share = 0.2  # share of refusals among the defender's examples (ours)
BRIEF = True              # ask for a sentence or two, what 135M can do; published: False
REPLY_TOKENS = 72         # longest reply, tokens; published: 2048
THINK_TOKENS = 40         # longest post-filled thinking, tokens; published: 1024
TEMPERATURE = 0.7         # of replies and thinking, for examples only; published: 0.6
TOP_P: Share = 1.0        # nucleus, for examples only; published: 0.9
LR = 5e-4                 # peak; linear rise over a tenth of updates, cosine to LR / 10 (ours)
LORA_RANK: Count = 16     # of the adapter that learns (engine/adapters.py); 0: all weights, LR=4e-5
LORA_ALPHA = 32           # its scale is alpha / rank (ours)
BASE_QUANT: Literal["none", "nf4"] = "none"  # NF4 for the weights under an adapter, slower (ours)
CHECKPOINTING = False     # compute activations twice, in less memory (hardware)
EPOCHS = 3                # passes over the examples (ours)
BATCH = 8                 # examples an update (ours)
PROBE = 96                # sampled turns of each role before and after (ours)
SAMPLE_BATCH = 96         # rows sampled at a time (hardware)
ROLLOUT: Literal["auto", "slots", "library", "plain"] = "auto"  # engine/sampling.py (hardware)
TRAIN_TOKENS = 2048       # tokens of a micro-batch, padding included (hardware)
DTYPE: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights (hardware)
OPTIMIZER: Literal["master", "kahan"] = "master"  # 20 or 10 bytes a parameter (engine/optim.py)
PROGRESS = True           # progress bars (display)
SEED = 0                  # of everything
# 4,000 defender's examples, not 2 x 15,000: one source, and each samples up to 3,072 tokens.
PAPER = dict(MODEL="Qwen/Qwen2.5-7B-Instruct", JUDGE="allenai/wildguard",
             SEEDS="allenai/wildjailbreak", DEFENDER_EXAMPLES=4000, ATTACKER_EXAMPLES=2000,
             WARMUP_REFUSALS=0.0, BRIEF=False, REPLY_TOKENS=2048, THINK_TOKENS=1024,
             TEMPERATURE=0.6, TOP_P=0.9, LR=1e-5, LORA_RANK=0, BATCH=32, PROBE=256,
             SAMPLE_BATCH=128, TRAIN_TOKENS=4096, OPTIMIZER="kahan")
GPU80 = dict(PAPER, LORA_RANK=32, LORA_ALPHA=64, LR=1e-4, OPTIMIZER="master", CHECKPOINTING=True)
GPU48 = dict(GPU80, SAMPLE_BATCH=64)
GPU24 = dict(GPU80, BASE_QUANT="nf4", REPLY_TOKENS=1024, THINK_TOKENS=512, SAMPLE_BATCH=64)
# ==================================================================================================


def read_columns(name, width):
    """Lines `a | b [| c]` of a prompt file as tuples of `width` texts."""
    rows = []
    for n, line in enumerate(run.read_text(run.PROMPTS / name).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        row = tuple(map(str.strip, line.split("|", width - 1)))
        if len(row) != width or not all(row):
            die(f"prompts/{name} line {n}: {width} columns divided by | are needed")
        check_slots(line, name, f"prompts/{name} line {n}")
        rows.append(row)
    return rows or die(f"prompts/{name}: no line with text")


def ask(model, tok, texts, max_new, generator):
    """Sample plain chat replies to texts -> list of (text, ended), False: cut at max_new tokens."""
    prompts = [render(tok, text) for text in texts]
    out = sample(model, tok, prompts, max_new, TEMPERATURE, SAMPLE_BATCH, generator, TOP_P, ROLLOUT)
    return [(tok.decode(ids, skip_special_tokens=True).strip(), ids[-1] in tok.stop_ids)
            for ids, _ in out]


def trimmed(text, ended):
    """What is used of a sampled text. BRIEF: one paragraph of complete sentences; one that was cut
    at its limit loses its unfinished end. Otherwise the text with its line breaks, "" if cut."""
    if not BRIEF:
        return text if ended else ""
    text = re.sub(r"\s+", " ", text)
    return text if ended else text[:max(map(text.rfind, (". ", "! ", "? "))) + 1]


def usable_thinking(text):
    """May a post-filled thought be trained on? BRIEF: if it is one or two plain sentences about the
    request. Otherwise any text without tags of thinking or answers."""
    if not BRIEF:
        return bool(text) and not re.search(r"(?i)<\s*/?\s*(?:think|thought|answer)", text)
    return (20 <= len(text) <= 240 and text.startswith("The user") and text[-1] in ".!"
            and "<" not in text)


def kept_replies(model, tok, scorer, seeds, generator):
    """Steps 1-2 -> (refusals kept, answers kept, all answers): lists of (seed, reply, kind)."""
    harmful, benign = halves(seeds)
    harmful = harmful[:DEFENDER_EXAMPLES] if WARMUP_REFUSALS else []
    benign = benign[:2 * DEFENDER_EXAMPLES]
    plainly = read_prompt("warmup_answer.txt") if BRIEF else "{{REQUEST}}"
    to_decline = read_prompt("warmup_refuse.txt")
    asked, requests, raw, pairs = benign + harmful, [], [], []
    for seed in asked:
        request = neutralize(seed["prompt"], tok)
        requests.append(fill(to_decline if seed["harmful"] else plainly, REQUEST=request))
    for seed, reply in zip(asked, ask(model, tok, requests, REPLY_TOKENS, generator)):
        reply = neutralize(trimmed(*reply), tok)
        if not seed["harmful"]:
            raw.append((seed, reply or "I can help with that.", "comply"))
        pairs.append((seed["prompt"], reply))
    refuse, comply = [], []
    for seed, (_, reply), x in zip(asked, pairs, scorer.classify(pairs)):
        if len(reply) <= (10 if BRIEF else 0) or x.response_harmful is not False:
            continue
        matched = judge.refusal_match(reply)  # two opinions on what will be imitated
        if seed["harmful"] and x.response_refusal and matched:
            refuse.append((seed, reply, "refuse"))
        if not seed["harmful"] and x.response_refusal is False and not matched:
            comply.append((seed, reply, "comply"))
    print("replies kept by the judge: "
          f"{len(refuse)} of {len(harmful)} refusals of harmful seeds, "
          f"{len(comply)} of {len(benign)} answers to benign seeds")
    return refuse, comply, raw


def defender_examples(model, tok, scorer, seeds, rng, generator):
    """Steps 1-3 -> list of (seed, thinking, answer, kind), kind "comply" or "refuse"."""
    rng.shuffle(seeds)
    refuse, comply, raw = kept_replies(model, tok, scorer, seeds, generator)
    n_refuse = min(len(refuse), round(WARMUP_REFUSALS * DEFENDER_EXAMPLES))
    comply = comply[:DEFENDER_EXAMPLES - n_refuse]
    if WARMUP_REFUSALS < 1:  # the share holds where few answers were kept, too
        n_refuse = min(n_refuse, int(len(comply) * WARMUP_REFUSALS / (1 - WARMUP_REFUSALS) + 0.5))
    kept = refuse[:n_refuse] + comply
    if not kept:
        if judge.adapter_of(JUDGE) and MODEL == models.EMBEDDED:
            die("the judge kept no reply at all: run python judge.py to check it")
        print("WARNING: the judge kept nothing; the model's raw replies are used, so that the "
              "chain can be tried")
        kept = raw[:DEFENDER_EXAMPLES]
    if not COT:
        return [(seed, "", reply, kind) for seed, reply, kind in kept]
    postfill = read_prompt("warmup_postfill.txt" if BRIEF else "warmup_postfill_full.txt")
    templates = read_columns("warmup_thoughts.txt", 2)
    requests = [fill(postfill, REQUEST=neutralize(seed["prompt"], tok), ANSWER=reply)
                for seed, reply, _ in kept]
    thoughts = ask(model, tok, requests, THINK_TOKENS, generator)
    examples, usable = [], 0
    for (seed, reply, kind), thought in zip(kept, thoughts):
        thinking = trimmed(*thought)
        if usable_thinking(thinking):
            usable += 1
        else:
            thinking = rng.choice([text for name, text in templates if name == kind])
        examples.append((seed, thinking, reply, kind))
    print(f"post-filled thinking usable: {usable} of {len(kept)}; else a template stands in")
    return examples


def attacker_examples(tok, seeds, rng):
    """Step 4 -> list of (seed, thinking, answer, strategy): all strategies alike, half harmful."""
    strategies, both = read_columns("strategies.txt", 3), halves(seeds)
    examples = []
    for i in range(ATTACKER_EXAMPLES):
        name, thought, shell = strategies[(i // 2) % len(strategies)]
        seed = rng.choice(both[i % 2])
        answer = fill(shell, SEED=neutralize(seed["prompt"], tok))
        examples.append((seed, thought if COT else "", answer, name))
    return examples


def build(tok, defender, attacker):
    """All examples as dicts with role, texts and token ids (those of turns.example)."""
    rows = []
    for k, (seed, thinking, answer, kind) in enumerate(defender + attacker):
        role, ids = "defender", example(tok, seed["prompt"], thinking, answer, COT)
        if k >= len(defender):  # its completion has the same form
            role, ids["prompt_ids"] = "attacker", attacker_prompt(tok, seed, COT)
        rows.append(dict(ids, role=role, kind=kind, seed=seed["id"], request=seed["prompt"],
                         thinking=thinking, answer=answer))
    return rows


def show(tok, row):
    """Print one decoded example with its loss mask: what is trained on stands between the marks."""
    print(f"--- one example; the loss is over {len(row['completion_ids'])} tokens, in [[ ]]")
    prompt, completion = tok.decode(row["prompt_ids"]), tok.decode(row["completion_ids"])
    print(printable(f"{prompt}[[{completion}]]"))


def train(model, rows, rng):
    """Step 5: EPOCHS passes; prints the mean loss of every tenth of the run."""
    optimizer = OPTIMIZERS[OPTIMIZER](model, (0.9, 0.95), 0.0)
    updates = []
    for _ in range(EPOCHS):
        updates += chunks(rng.sample(rows, len(rows)), BATCH)
    warmup, recent, began = math.ceil(0.1 * len(updates)), [], time.time()
    with progress.bar(len(updates), "warm-up", "update") as bar:
        for step, batch in enumerate(updates):
            recent.append(cross_entropy_step(model, optimizer, batch, TRAIN_TOKENS))
            optimizer.step(LR * cosine_with_warmup(step, len(updates), warmup), 1.0)
            if optimizer.left_out == 3:
                die("three updates in a row were not finite: give a lower LR")
            bar.update()
            if (step + 1) % max(1, len(updates) // 10) == 0 or step + 1 == len(updates):
                progress.say(f"update {step + 1:3d}/{len(updates)} | loss "
                             f"{sum(recent) / len(recent):.3f} | {time.time() - began:.0f} s")
                recent = []


def try_turns(model, tok, scorer, seeds, when):
    """Step 6: PROBE turns a role -> rates: defender, attacker (well-formed turns), asr, comply."""
    both, defenders, attackers = halves(seeds), [], []
    for i in range(PROBE):
        half = both[i % 2]
        seed = half[(i // 2) % len(half)]
        name = "harmful" if seed["harmful"] else "benign"
        defenders.append(Turn("defender", f"vanilla_{name}", seed,
                              defender_prompt(tok, seed["prompt"], COT), seed["prompt"]))
        attackers.append(Turn("attacker", f"generated_{name}", seed,
                              attacker_prompt(tok, seed, COT)))
    turns = complete(model, tok, defenders + attackers, COT, REPLY_TOKENS + THINK_TOKENS + 16, 1.0,
                     SAMPLE_BATCH, torch.Generator().manual_seed(SEED), ROLLOUT)
    labels = scorer.classify([(t.request, t.answer) for t in turns[:PROBE]])
    formed = [t.well_formed for t in turns]
    harmful = [x.response_harmful for x in labels[0::2]]  # every second seed is benign
    complied = [x.response_refusal is False and not x.empty for x in labels[1::2]]
    rates = dict(defender=sum(formed[:PROBE]) / PROBE, attacker=sum(formed[PROBE:]) / PROBE,
                 asr=harmful.count(True) / max(1, len(harmful)),
                 comply=complied.count(True) / max(1, len(complied)))
    print(f"{when}: well-formed defender {rates['defender']:.2f} attacker {rates['attacker']:.2f} "
          f"(n {PROBE} each) | asr {rates['asr']:.2f} comply(b) {rates['comply']:.2f} "
          f"(n {PROBE // 2} each, dev seeds, sampled)", flush=True)
    return rates


def write_examples(out, rows):
    """Both roles' examples -> results/runs/RUN/examples.jsonl. The defender's, with the request ->
    the text of checkpoints/RUN/defender.jsonl: no token ids, so that any model can use it."""
    def lines(keys, kept):
        return "".join(json.dumps({k: row[k] for k in keys.split()}) + "\n" for row in kept)

    run.write_text(out / "examples.jsonl", lines("role kind seed thinking answer", rows))
    return lines("kind seed request thinking answer",
                 [row for row in rows if row["role"] == "defender"])


def main(argv):
    """The numbered steps of the docstring."""
    run.configure(globals(), argv)
    if TOP_P == 0:
        die("TOP_P=0.0: must be above 0")
    if BASE_QUANT == "nf4" and not LORA_RANK:
        die("BASE_QUANT=nf4 is for a run with an adapter: give LORA_RANK")
    options = f" MODEL=checkpoints/{RUN}" if RUN != "01_sft" else ""
    for recipe in set(argv) & set(run.RECIPES):  # a recipe of 02 starts from the instruct model
        options = f" {recipe} SFT=checkpoints/{RUN}/defender.jsonl"
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    seeds, dev = load_seeds(SEEDS, "train"), load_seeds(SEEDS, "dev")
    check_prompts()  # a bad file stops here, not later
    read_columns("strategies.txt", 3)
    if not {"comply", "refuse"} <= set(dict(read_columns("warmup_thoughts.txt", 2))):
        die("prompts/warmup_thoughts.txt: a line each for `comply` and `refuse` is needed")
    inputs = dict(MODEL=models.fingerprint(str(locate(MODEL) or MODEL)),
                  JUDGE=judge.fingerprint(JUDGE), SEEDS=seeds_digest(SEEDS),
                  prompts=run.file_digest(*run.PROMPTS.glob("*.txt")))
    out = parallel.once(run.claim, globals(), run.CHECKPOINTS)
    if (run.CHECKPOINTS / RUN / "meta.json").is_file():
        run.check_resume(globals(), run.CHECKPOINTS / RUN, inputs)
        print(f"checkpoints/{RUN} is complete; next: python 02_selfplay_rl.py{options}")
        return
    run.doing("; the same command starts again")
    limit = judge.text_limit(REPLY_TOKENS + THINK_TOKENS)
    scorer = judge.load_judge(JUDGE, QUANTIZE, max_text=limit)
    model, tok = models.load_model(MODEL, DTYPE, quantize=BASE_QUANT == "nf4")
    began = time.time()
    before = try_turns(model, tok, scorer, dev, "before")
    defender = defender_examples(model, tok, scorer, seeds, rng, generator)
    rows = build(tok, defender, attacker_examples(tok, seeds, rng))
    kinds = collections.Counter(kind for *_, kind in defender)
    print(f"examples: {kinds['comply']} comply, {kinds['refuse']} refuse, {ATTACKER_EXAMPLES} "
          f"attacks; {time.time() - began:.0f} s")
    show(tok, rows[0])
    adapters.choose_weights(model, LORA_RANK, LORA_ALPHA, SEED)
    if CHECKPOINTING:
        models.checkpoint_gradients(model)
    train(model, rows, rng)
    after = try_turns(model, tok, scorer, dev, "after ")
    meta = dict(run.make_meta(globals(), MODEL), inputs=inputs, before=before, after=after,
                examples=kinds)
    run.write_meta(out, meta)
    mix = write_examples(out, rows)
    parallel.check_equal(model.parameters())
    parallel.once(models.save_checkpoint, run.CHECKPOINTS / RUN, model, tok, meta, None,
                  {"defender.jsonl": mix})
    if after["comply"] < 0.85:
        print(f"WARNING: comply(b) {after['comply']:.2f} is below .85: lower WARMUP_REFUSALS or LR")
    print(f"made checkpoints/{RUN} ({time.time() - began:.0f} s, {run.peak_gb():.1f} GB); "
          f"next: python 02_selfplay_rl.py{options}")


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
