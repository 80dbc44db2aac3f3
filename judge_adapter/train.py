"""Train the embedded judge's LoRA adapter and its calibration -> judge_adapter/.

    python -m judge_adapter.train DATA_DIR=<folder with JSONL files> [BENCH_DIR=<folder>]
    python -m judge_adapter.train DATA_DIR=... INIT=judge_adapter ...   a further round, see CARD.md

Optional: the adapter is committed. Cost: see CARD.md.
Input: every *.jsonl of DATA_DIR/train (or DATA_DIR) with prompt, response (null: prompt only),
prompt_harmful, response_refusal, response_harmful (true, false, or null: not labelled). Output: the
adapter, calibration.json, scores.json, reliability.png. Killed, it goes on from checkpoints/.

1. Read the rows, drop those whose prompt stands in a benchmark, hold out 10 % of the prompts.
2. Guess refusal labels where that is safe (training only), cap each source, add augmented rows.
3. Train LoRA on the answer positions, after the true answers, one in ten of them changed. Missing
   labels are masked. A tenth of the line texts' loss keeps free generation possible.
4. Calibrate and score on held-out rows, through the merged model that is used later.
Departures from WildGuard (arXiv 2406.18495): 135M, not 7B; LoRA, not full tuning; other data."""
import hashlib
import json
import math
import random
import re
import sys
import time
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from engine import adapters, models, progress, run
from engine.batching import chunks, micro_batches, pad, shared_opening
from engine.optim import MasterAdamW
from engine.run import Share
from judge import FIELDS, Judge, adapter_of, load_judge, refusal_match
from judge_adapter.augment import attacked, augment
from judge_adapter.calibrate import fit
from judge_adapter.score import draw_reliability, held_out_scores, holes
from selfplay.data import load_seeds, read_exchanges, read_table

# ==================================================================================================
DATA_DIR = ""             # folder with the labelled exchanges, or with a subfolder train/
BENCH_DIR = ""            # folder with benchmark files; a training prompt found there is dropped
SCORE_ONLY = False        # only calibrate and score the adapter that is there
INIT = ""                 # adapter to go on from, whatever RANK says; "": start from nothing
WHICH: Literal["embedded", "embedded2"] = "embedded"  # embedded2: a second opinion, see SECOND
CAP = 3000                # rows per source at most (ours)
PROMPT_ONLY_CAP = 700     # the same for sources without replies (ours)
ATTACKS = 2               # times that a row with a real attack prompt comes (ours)
HELD = 2500               # held-out rows to calibrate and report on (hardware)
AUGMENT_HELD = 1800       # augmented rows of held-out prompts and wordings, the same (hardware)
AUGMENT = 14000           # augmented rows, spread over the kinds of augment.py (ours)
RANK = 32                 # LoRA rank, all linear layers (ours; CARD.md has what was compared)
ALPHA = 64                # LoRA alpha (ours)
LR = 5e-4                 # peak, cosine to 0 (ours)
BATCH = 16                # rows an update (ours)
MAX_UPDATES = 560         # stop here at the latest; the schedule ends there too (hardware)
TRAIN_TOKENS = 2048       # tokens per forward, padding included; a batch is cut to it (hardware)
AUGMENTED_WEIGHT: Share = 1 / 3  # of all augmented rows beside all real ones, to calibrate (ours)
LINE_LOSS: Share = 0.1    # weight of the fixed line texts (ours)
SAVE_EVERY = 100          # updates between resumable states
SEED = 0                  # of everything
PROGRESS = True           # progress bars (display)
# ==================================================================================================
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The two judges have no row in common: the sources of SECOND are the second one's, half of the
# prompts of SHARED are each one's, the rest is the first one's. The second one also learns from the
# texts that the first one is measured with. So an error of one is seldom an error of both.
SECOND = ("beavertails_test", "safety_tuned_llamas_train", "promptonly_red_instruct",
          "promptonly_simple_safety_tests", "promptonly_alpaca_harmless")
SHARED = ("do_not_answer", "alpaca_outputs")
BARE_GOALS = ("gptfuzz",)       # replies to attacks, the prompt is the goal: wrapped in training
REAL_ATTACKS = ("jbb_artifacts",)  # prompts as an attacker wrote them
DISAPPROVAL = re.compile(
    r"\b(?:not (?:appropriate|ethical|acceptable|legal|okay|right|advisable|a good idea)|"
    r"unethical|illegal|inappropriate|immoral|against the law|(?:never|not) (?:ok|okay|"
    r"acceptable|justif)|condemn|serious crime|harmful and|there is no (?:reason|evidence|basis)|"
    r"should not be|important to (?:respect|remember|note|treat)|can lead to serious)", re.I)


def key(prompt):
    """A prompt up to case, spaces, punctuation: the unit of splitting and of benchmark overlap."""
    return re.sub(r"\W+", " ", prompt.lower()).strip()


def number(prompt):
    """A fixed number of a prompt, for splits."""
    return int(hashlib.sha256(key(prompt).encode()).hexdigest(), 16)


def held_out(prompt):
    """Is a prompt in the tenth that is never trained on? By hash, so that the tenth is fixed."""
    return number(prompt) % 10 == 0


def of_second(row):
    """Is a row one of the second judge's?"""
    half = row["source"] in SHARED and number(row["prompt"]) // 10 % 2 == 1
    return half or row["source"] in SECOND


def labels_of(row):
    """How many of the three labels a row has."""
    return sum(row.get(field) is not None for field in FIELDS)


def labelled_rows(folder, bench):
    """The rows of a folder whose prompt is in no benchmark file under `bench`, and our train seeds,
    without replies. Benign ones that sound harmful come three times: no other source has many."""
    folder = Path(folder) / "train" if (Path(folder) / "train").is_dir() else Path(folder)
    rows, banned = [], set()
    for file in sorted(folder.glob("*.jsonl")):
        rows += [dict(row, source=file.stem) for row in read_exchanges(file)]
    if not rows:
        run.die(f"DATA_DIR={folder}: give a folder of *.jsonl with labelled exchanges (--help)")
    for file in Path(bench).rglob("*") if bench else []:
        cells = []
        if file.suffix in (".csv", ".tsv", ".parquet"):
            for _, row in read_table(file):
                cells += row.values()
        elif file.suffix in (".json", ".jsonl"):
            texts = re.findall(r'"(?:[^"\\]|\\.)*"', file.read_text(encoding="utf-8-sig"))
            cells = [json.loads(text, strict=False) for text in texts]
        banned |= {key(cell) for cell in map(str, cells) if len(cell) > 20}
    kept = [row for row in rows if key(row["prompt"]) not in banned]
    print(f"{len(rows)} rows; dropped {len(rows) - len(kept)} whose prompt is in a benchmark")
    second = WHICH == "embedded2"
    kept = [row for row in kept if labels_of(row) and of_second(row) == second]
    if second:
        return kept
    for seed in load_seeds("prompts/seeds.jsonl", "train"):
        row = dict(prompt=seed["prompt"], response=None, prompt_harmful=seed["harmful"],
                   source="own_seeds")
        kept += [row] * (3 if seed.get("category") == "sounds_harmful" else 1)
    return kept


def weakly_labelled(row):
    """The row with its missing refusal label, where words and harm label leave little doubt. Few
    sources carry such labels; with those alone a judge missed 58 % of XSTest's long refusals (the
    matcher's F1 there is .91). To condemn a harmful request is to refuse, as people labelled it."""
    reply, harmful = row.get("response"), row.get("response_harmful")
    if row.get("response_refusal") is not None or not reply:
        return row
    refuses = refusal_match(reply)
    if harmful is False and row.get("prompt_harmful") is True:
        refuses = refuses or bool(DISAPPROVAL.search(reply[:200]))
    in_doubt = refuses == (harmful is True)  # harm after a refusal, or no sign of either
    return row if in_doubt else dict(row, response_refusal=refuses)


def select(rows, rng):
    """At most CAP rows a source (PROMPT_ONLY_CAP of one without replies), its combinations of
    labels in turn. Refusals that the matcher misses are one of their own: rare and hard; so are
    replies above 600 characters. Rows of REAL_ATTACKS come ATTACKS times."""
    sources, chosen = {}, []
    for row in rows:
        sources.setdefault(row["source"], []).append(row)
    for _, pool in sorted(sources.items()):
        rng.shuffle(pool)
        groups, cap = {}, PROMPT_ONLY_CAP
        for row in pool:
            reply = row.get("response") or ""
            kind = (*map(row.get, FIELDS), refusal_match(reply), len(reply) > 600)
            groups.setdefault(kind, []).append(row)
            cap = CAP if reply else cap
        turns = zip_longest(*map(reversed, groups.values()))
        taken = list(filter(None, chain(*turns)))[:cap]
        chosen += taken * (ATTACKS if pool[0]["source"] in REAL_ATTACKS else 1)
    return chosen


def encode(scorer, rows):
    """Rows -> token ids of the judge's input, as in use."""
    return [scorer.encode(row["prompt"], row.get("response")) for row in rows]


def fed_answers(rows, rng):
    """What stands as the first two answers of each row when the next ones are learnt: the labels,
    else what fits the label of harm, else a guess. One in ten is wrong, as in use."""
    out = []
    for row in rows:
        harms = row.get("response_harmful") is True
        guess = (harms or rng.random() < 0.5, not harms and rng.random() < 0.5)
        answers = []
        for field, guessed in zip(FIELDS, guess):
            known = row.get(field)
            answer = guessed if known is None else known
            answers.append(answer != (rng.random() < 0.1))
        out.append(answers)
    return out


def loss_of(scorer, rows, encoded, fed):
    """Rows, token ids, fed_answers() -> mean cross-entropy of the labels; that plus LINE_LOSS of
    the line texts' mean. One forward pass over prompt, lines and fed answers."""
    model, (first, second, third) = scorer.model, scorer.line_ids
    word = {True: scorer.yes, False: scorer.no, None: -100}
    whole, targets = [], []
    for row, ids, (a, b) in zip(rows, encoded, fed):
        whole.append(ids + first + [word[a]] + second + [word[b]] + third)
        x, y, z = (word[row.get(field)] for field in FIELDS)
        targets.append(first + [x] + second + [y] + third + [z])
    shared, cache = shared_opening(model, encoded)
    ids_BL, _ = pad([ids[shared:] for ids in whole], model.device)
    hidden = model.base_model(input_ids=ids_BL, past_key_values=cache).last_hidden_state
    target_BT = torch.tensor(targets, device=model.device)
    start_B1 = torch.tensor([[len(ids) - shared - 1] for ids in encoded], device=model.device)
    at_BT = start_B1 + torch.arange(target_BT.shape[1], device=model.device)
    every_B1 = torch.arange(len(rows), device=model.device)[:, None]
    logits = model.get_output_embeddings()(hidden[every_B1, at_BT].flatten(0, 1)).float()
    loss_BT = torch.nn.functional.cross_entropy(logits, target_BT.flatten(), reduction="none")
    loss_BT = loss_BT.view(target_BT.shape)
    answers = torch.zeros(target_BT.shape[1], dtype=torch.bool)
    answers[[len(first), len(first) + 1 + len(second), -1]] = True
    answer = loss_BT[:, answers].sum() / (target_BT[:, answers] >= 0).sum()
    return answer, answer + LINE_LOSS * loss_BT[:, ~answers].mean()


def train(scorer, rows, state_file):
    """Train what is trainable in the model. Goes on from the state file, keeps it up to date."""
    encoded, rng = encode(scorer, rows), random.Random(SEED)
    order, plan, start, losses = list(range(len(rows))), [], 0, []
    rng.shuffle(order)
    for window in chunks(order, 16 * BATCH):  # sorted by length within it: little is padding
        plan += chunks(sorted(window, key=lambda i: len(encoded[i])), BATCH)
    rng.shuffle(plan)
    plan = plan[:MAX_UPDATES]
    optimizer = MasterAdamW(scorer.model, (0.9, 0.99), 0.0)
    if state_file.exists():
        state = load_file(state_file)
        start = int(state.pop("updates"))
        optimizer.restore(state)
        print(f"resumed at update {start}")
    with progress.bar(len(plan), "training", "update") as bar:
        bar.update(start)
        for step, batch in enumerate(plan[start:], start):
            losses.append(0.0)
            labels = sum(map(labels_of, [rows[i] for i in batch]))
            for part in micro_batches([len(encoded[i]) for i in batch], TRAIN_TOKENS):
                some = [rows[batch[k]] for k in part]
                fed = fed_answers(some, random.Random(f"{SEED} {step} {part[0]}"))
                answer, loss = loss_of(scorer, some, [encoded[batch[k]] for k in part], fed)
                share = sum(map(labels_of, some)) / labels
                (answer * share + (loss - answer) * len(part) / len(batch)).backward()
                optimizer.collect()
                losses[-1] += answer.item() * share
            warm, done = min(1.0, (step + 1) / (0.03 * len(plan))), step / len(plan)
            optimizer.step(LR * warm * 0.5 * (1 + math.cos(math.pi * done)), 1.0)
            if optimizer.left_out == 3:
                run.die("three updates in a row were not finite: give a lower LR")
            bar.update()
            if (step + 1) % 25 == 0:
                mean = sum(losses[-25:]) / len(losses[-25:])
                progress.say(f"update {step + 1:4d}/{len(plan)} | loss {mean:.3f}")
            if (step + 1) % SAVE_EVERY == 0:
                state_file.parent.mkdir(parents=True, exist_ok=True)
                tmp = state_file.with_suffix(".tmp")
                save_file({**optimizer.tensors(), "updates": torch.tensor(step + 1)}, tmp)
                tmp.replace(state_file)


def train_adapter(rows):
    """A LoRA on the embedded model -> judge_adapter/. Returns the file of its training's state."""
    from peft import LoraConfig
    model, tok = models.load_model(models.EMBEDDED)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=LINEAR)
    if INIT:  # with its own rank and layers
        adapters.attach(model, Path(INIT), models.read_tensors)
    else:
        model.add_adapter(lora)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    folder = adapter_of(WHICH)
    made_of = json.dumps([dict(run.constants(globals()), PROGRESS=None), len(rows)])
    state = run.CHECKPOINTS / "00_judge" / hashlib.sha256(made_of.encode()).hexdigest()[:12]
    state = state.with_suffix(".safetensors")
    train(Judge(model, tok), rows, state)
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    adapters.tidy(folder, models.WHEEL)
    return state


def splits():
    """(1), (2): DATA_DIR -> (training rows, rows to calibrate and report on), augmented too."""
    training, held, second = [], [], WHICH == "embedded2"
    for row in labelled_rows(DATA_DIR, BENCH_DIR):
        (held if held_out(row["prompt"]) else training).append(row)
    training, rng = list(map(weakly_labelled, training)), random.Random(SEED)
    made = augment(training, AUGMENT, rng, fresh=second)
    training = attack_goals(select(training, rng), rng, fresh=second) + made
    rng = random.Random(SEED)
    measured = attack_goals(rng.sample(held, min(HELD, len(held))), rng, fresh=not second)
    measured += augment(held, AUGMENT_HELD, rng, fresh=not second)
    return training, measured


def attack_goals(rows, rng, fresh):
    """The rows, those of BARE_GOALS wrapped as attacks (augment.attacked)."""
    bare = [row for row in rows if row["source"] in BARE_GOALS]
    rest = [row for row in rows if row["source"] not in BARE_GOALS]
    return rest + attacked(bare, rng, fresh)


def write_meta(folder, rows):
    """What an adapter was made of -> scores.json, to which score() adds."""
    meta = run.make_meta(globals(), models.WHEEL)
    meta.pop("command")  # no paths of one machine: the constants say it without them
    meta["constants"].update(DATA_DIR="<labelled exchanges>", BENCH_DIR="<benchmarks>",
                             INIT=run.publishable(INIT))
    run.write_text(folder / "scores.json", json.dumps(dict(meta=meta, rows=rows), indent=1))


def score(folder, measured):
    """Calibrate the adapter in a folder and score it on held-out rows -> its other files."""
    scorer, report = load_judge(WHICH), run.read_json(folder / "scores.json", "meta")
    margins = scorer.margins(encode(scorer, measured)).tolist()
    lines = [json.dumps(dict(row, margins=m)) + "\n" for row, m in zip(measured, margins)]
    out = run.CHECKPOINTS / "00_judge"
    out.mkdir(parents=True, exist_ok=True)
    run.write_text(out / f"{WHICH}_held_out.jsonl", "".join(lines))
    scorer.calibration = fit(measured, margins, AUGMENTED_WEIGHT)
    run.write_text(folder / "calibration.json", json.dumps(scorer.calibration, indent=1))
    report.update(scored=dict(time=time.strftime("%Y-%m-%d %H:%M:%S"), HELD=HELD,
                              AUGMENT_HELD=AUGMENT_HELD),
                  held_out=held_out_scores(measured, margins, AUGMENTED_WEIGHT))
    if WHICH == "embedded":  # the other one is never a reward
        report["holes"] = holes(scorer, measured, margins, random.Random(SEED), fresh=True)
    draw_reliability(folder / "reliability.png", report["held_out"]["labels"])
    run.write_text(folder / "scores.json", json.dumps(report, indent=1))


def main(argv):
    """The numbered steps of the docstring."""
    run.configure(globals(), argv)
    if INIT and not (Path(INIT) / "adapter_model.safetensors").is_file():
        run.die(f"INIT={INIT}: no adapter_model.safetensors there")
    torch.manual_seed(SEED)
    training, measured = splits()                                             # (1), (2)
    folder = adapter_of(WHICH)
    if not SCORE_ONLY:
        print(f"training on {len(training)} rows, {len(measured)} held out")
        state = train_adapter(training)                                          # (3)
        write_meta(folder, len(training))
    score(folder, measured)                                                      # (4)
    if not SCORE_ONLY:
        state.unlink(missing_ok=True)  # until here the same command goes on
    print(f"made {folder.name}/; next: python judge.py eval <labelled file>")


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
