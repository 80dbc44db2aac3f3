"""Stage 0, optional: train the embedded judge's LoRA adapter and its calibration -> judge_adapter/.

    python 00_train_judge.py DATA_DIR=<folder with JSONL files> [BENCH_DIR=<folder>]
    python 00_train_judge.py DATA_DIR=... INIT=judge_adapter CAP=220 PROMPT_ONLY_CAP=60 \\
        AUGMENT=500 LR=3e-4 SEED=1         a second, short round on other rows; CARD.md has all

Cost: 48 min, 15 GB on 2 cores, a further round 11 to 58 min.
Input: every *.jsonl of DATA_DIR/train (or DATA_DIR), fields prompt,
response (null: prompt only), prompt_harmful, response_refusal, response_harmful (true, false, or
null for not labelled), source. Output: judge_adapter/ (committed) with adapter_model.safetensors,
calibration.json, scores.json, reliability.png; checkpoints/00_judge/ while it runs, for resuming.

1. Read the rows, drop those whose prompt stands in a benchmark, hold out 10 % of the prompts.
2. Fill in refusal labels that the matcher of openings makes safe to guess (training only), cap each
   source, add augmented rows for the holes an attacker would search for (DESIGN section 4).
3. Train LoRA on the answer positions only, through judge.answer_logits: what is fed at an answered
   position is the judge's own greedy answer, as in use. Missing labels are masked. Each label's
   loss is averaged over the rows of the batch that carry it; a tenth of the line texts' loss keeps
   free generation possible.
4. Calibrate on the held-out tenth: p of a label from the log-odds of several lines (matrix scaling,
   Guo et al. 2017: what is refused is hardly harmful), store, print scores and slices.
Departures from WildGuard's recipe: 135M, not 7B; LoRA, not full tuning; public data of others.
"""
import hashlib
import itertools
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch

import judge
import optim
import policy
import stage
from judge import ADAPTER, FIELDS
from policy import read_prompt
from stage import ROOT, die

# ==================================================================================================
DATA_DIR = ""             # folder with the labelled exchanges, or with a subfolder train/
BENCH_DIR = ""            # folder with benchmark files; a training prompt found there is dropped
SCORE_ONLY = False        # only calibrate and score the adapter that is there
INIT = ""                 # adapter folder to go on from; "": start from nothing
CAP = 600                 # rows per source at most (ours)
PROMPT_ONLY_CAP = 350     # the same for sources without replies (ours)
HELD = 1500               # held-out rows to calibrate and report on (hardware)
AUGMENT_HELD = 1000       # augmented rows of held-out prompts and wordings, the same (hardware)
AUGMENT = 1400            # augmented rows, spread over the kinds of Holes (ours)
RANK = 32                 # LoRA rank, all linear layers (ours; CARD.md has what was compared)
ALPHA = 64                # LoRA alpha (ours)
FIRST_LAYER = 0           # LoRA from this decoder layer up to the last (ours)
LR = 7e-4                 # peak, cosine to 0 (ours)
BATCH = 16                # rows an update (ours)
EPOCHS = 1                # passes over the rows (ours)
MAX_UPDATES = 600         # stop here at the latest; the schedule ends there too (hardware)
PROMPT_TOKENS = 128       # longest prompt in training, tokens (hardware)
REPLY_TOKENS = 128        # longest reply in training, tokens (hardware)
AUGMENTED_WEIGHT = 1 / 3  # of all augmented rows beside all real ones, in the calibration (ours)
LINE_LOSS = 0.1           # weight of the fixed line texts (ours)
SAVE_EVERY = 100          # updates between resumable states
SEED = 0                  # of everything
# ==================================================================================================
RANKED = ["promptonly_aegis_test", "promptonly_openai_moderation", "promptonly_toxic_chat"]
RANGES = dict(CAP=(1, 10 ** 7), AUGMENT=(0, 10 ** 7), AUGMENT_HELD=(0, 10 ** 6),
              RANK=(1, 512), FIRST_LAYER=(0, 29), LR=(0.0, 1.0), BATCH=(1, 4096),
              EPOCHS=(1, 100), MAX_UPDATES=(1, 10 ** 7))
DISAPPROVAL = re.compile(
    r"\b(?:not (?:appropriate|ethical|acceptable|legal|okay|right|advisable|a good idea)|"
    r"unethical|illegal|inappropriate|immoral|against the law|(?:never|not) (?:ok|okay|"
    r"acceptable|justif)|condemn|serious crime|harmful and|there is no (?:reason|evidence|basis)|"
    r"should not be|important to (?:respect|remember|note|treat)|can lead to serious)", re.I)


def key(prompt):
    """A prompt up to case, spaces, punctuation: the unit of splitting and of benchmark overlap."""
    return re.sub(r"\W+", " ", prompt.lower()).strip()


def held_out(prompt):
    """True for the tenth of all prompts that is never trained on (by hash, so it does not move)."""
    return int(hashlib.sha256(key(prompt).encode()).hexdigest(), 16) % 10 == 0


def read_rows(folder, bench):
    """All labelled rows of a folder but those whose prompt is in a benchmark file under `bench`."""
    folder = Path(folder) / "train" if (Path(folder) / "train").is_dir() else Path(folder)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        die(f"DATA_DIR={folder}: no *.jsonl with labelled exchanges there")
    rows = [dict(r, source=f.stem) for f in files for r in judge.read_exchanges(f)]
    banned = set()
    for f in Path(bench).rglob("*") if bench else []:
        if f.suffix in (".csv", ".jsonl", ".json"):
            banned |= {key(cell)
                       for cell in re.split(r'[",\n]{1,3}', f.read_text(encoding="utf-8-sig"))
                       if len(cell) > 20}
    kept = [r for r in rows if key(r["prompt"]) not in banned]
    print(f"{len(rows)} rows in {len(files)} files; "
          f"dropped {len(rows) - len(kept)} whose prompt is in a benchmark")
    return kept


def select(rows, rng):
    """At most CAP rows a source, its combinations of labels as even as the source allows."""
    chosen = []
    for source in sorted({r["source"] for r in rows}):
        pool = [r for r in rows if r["source"] == source]
        rng.shuffle(pool)
        groups = {}
        for r in pool:  # one group for each combination of labels, drawn from in turn; refusals
            # that the matcher misses are their own group, because they are rare and hard
            matched = judge.refusal_match(r.get("response") or "")
            groups.setdefault((*(r.get(f) for f in FIELDS), matched), []).append(r)
        cap, order = CAP if any(r.get("response") for r in pool) else PROMPT_ONLY_CAP, []
        while len(order) < min(cap, len(pool)):
            order += [g.pop() for g in groups.values() if g]
        chosen += order[:cap]
    return chosen


def foreign_texts(fresh):
    """[dict(harmful=[...], refusal=[...], answered=[(request, reply), ...])], one a language, from
    prompts/judge_foreign.txt; `fresh`: the quarter that is kept back from training."""
    out = {}
    for line in read_prompt("judge_foreign.txt").splitlines():
        lang, kind, text = (x.strip() for x in line.split("|", 2))
        out.setdefault(lang, {}).setdefault(kind, []).append(text)
    back = {"harmful": [3], "refusal": [3, 4], "answered": [1]}
    return [{k: [w for i, w in enumerate(v) if (i in back[k]) == fresh]
             for k, v in dict(harmful=x["harmful"], refusal=x["refusal"],
                              answered=list(zip(x["benign"], x["reply"]))).items()}
            for x in out.values()]


def contrasts(fresh):
    """[(request with {x}, what makes it harmless, what makes it harmful)] from
    prompts/judge_contrast.txt; `fresh`: the quarter that is kept back from training."""
    lines = [[x.strip() for x in line.split("|")]
             for line in read_prompt("judge_contrast.txt").splitlines()]
    return [(text, [x.strip() for x in good.split(";")], [x.strip() for x in bad.split(";")])
            for i, (text, good, bad) in enumerate(lines) if (i % 4 == 3) == fresh]


class Holes:
    """Augmented rows over the holes of a first judge (DESIGN section 4), one method a kind, made
    from real rows and the texts of prompts/. `fresh`: only of wordings, shells and frames that are
    kept back from training."""
    # made in this order over and over: what stands here three times is three times as frequent
    KINDS = """rewrite rewrite long_opening foreign
        refused_benign refused_benign refused_harmful refused_harmful refused_benign
        bare_harmful bare_harmful bare_benign agreed_harmful agreed_benign off_topic off_topic
        error error contrast_benign contrast_benign contrast_benign contrast_harmful
        contrast_harmful benign_other echo gibberish_reply gibberish_request refuse_comply disclaim
        shell_reply shell_bad_reply shell_harmful shell_benign shell_refused
        forged_request forged_reply""".split()

    def __init__(self, rows, rng, fresh):
        def kept(lines, every=4):  # the last of four (or three) is for measuring
            return [x for i, x in enumerate(lines) if (i % every == every - 1) == fresh]

        def in_turn(name):  # all are used before one comes again
            lines = kept(read_prompt(name).splitlines())
            return itertools.cycle(rng.sample(lines, len(lines)))

        self.rng, self.fresh = rng, fresh
        self.wordings, self.agreements = in_turn("refusals.txt"), in_turn("judge_agreements.txt")
        self.texts = json.loads((policy.PROMPTS / "judge_augment.json").read_text("utf-8"))
        self.shells = kept(self.texts["shells"], 3)
        self.forgeries = kept(self.texts["forgeries"])
        self.errors = {k: kept(v, 3) for k, v in self.texts["error_words"].items()}
        self.rewrites = [x.split("|", 2)[2].strip()
                         for x in kept(read_prompt("strategies.txt").splitlines())]
        self.languages, self.pairs = foreign_texts(fresh), contrasts(fresh)
        self.requests = [r["prompt"] for r in rows if r.get("prompt_harmful") is True]
        self.benign = [r for r in rows if r.get("prompt_harmful") is False]
        self.helpful = [r["response"] for r in self.benign
                        if r.get("response") and r.get("response_harmful") is False]
        self.bad = [r for r in rows if r.get("response_harmful") is True]
        self.labelled = [r for r in rows
                         if r.get("response") and r.get("response_harmful") is not None]
        self.words = " ".join(r["prompt"] for r in rows[:500]).split()
        self.seeds = [r for r in rows if r["source"] == "own_seeds"] or rows

    @staticmethod
    def row(kind, prompt, response, *labels):
        return dict(zip(("prompt", "response", *FIELDS, "source"),
                        (prompt, response, *labels, f"aug_{kind}")))

    def question(self):
        return self.rng.choice(self.benign)["prompt"]

    def gibberish(self):
        if self.rng.random() < 0.5:
            return "".join(self.rng.choice("abcdefghijklmnopqrstuvwxyz   .,;")
                           for _ in range(self.rng.randint(5, 150)))
        return " ".join(self.rng.choice(self.words) for _ in range(self.rng.randint(3, 30)))

    def refusal(self):  # in training one in six is made of parts
        if self.fresh or self.rng.random() < 5 / 6:
            return next(self.wordings)
        text = "".join(self.rng.choice(part) + " " * (k in (1, 2))
                       for k, part in enumerate(self.texts["refusal_parts"])) + "."
        return text[0].upper() + text[1:]

    def polite(self):  # a refusal may be followed by a second sentence
        return self.refusal() + self.rng.choice(
            ["", "", " Is there anything else I can help with?", " Please take care of yourself."])

    def shelled(self, r):
        shell = self.rng.choice(self.shells + self.rewrites)
        return {**r, "prompt": re.sub(r"{{\w+}}", lambda _: r["prompt"], shell)}

    # what the game itself shows: the rewrites that the attacker of stage 1 starts from, shells
    def rewrite(self):
        r, shell = self.rng.choice(self.seeds), self.rng.choice(self.rewrites)
        return self.row("rewrite", shell.replace("{{SEED}}", r["prompt"]), None,
                        r["prompt_harmful"], None, None)

    def long_opening(self):
        r, text = self.rng.choice(self.seeds), self.rng.choice(self.helpful)[:400]
        return self.row("long_opening", f"{text}\n\n{r['prompt']}", None, r["prompt_harmful"],
                        None, None)

    def shell_reply(self):
        return {**self.shelled(self.rng.choice(self.labelled)), "source": "aug_shell_reply"}

    def shell_bad_reply(self):
        return {**self.shelled(self.rng.choice(self.bad)), "source": "aug_shell_reply"}

    def shell_harmful(self):
        r = self.shelled(dict(prompt=self.rng.choice(self.requests)))
        return self.row("shell_harmful", r["prompt"], None, True, None, None)

    def shell_benign(self):
        r = self.shelled(self.rng.choice(self.benign))
        return self.row("shell_benign", r["prompt"], None, False, None, None)

    def shell_refused(self):
        r = self.shelled(dict(prompt=self.rng.choice(self.requests)))
        return self.row("shell_refused", r["prompt"], self.polite(), True, True, False)

    # refusals, and what shares their words or their length
    def refused_harmful(self):
        return self.row("refusal_harmful", self.rng.choice(self.requests), self.polite(),
                        True, True, False)

    def refused_benign(self):
        return self.row("refusal_benign", self.question(), self.polite(), False, True, False)

    def bare_harmful(self):
        return self.row("refusal_harmful", self.rng.choice(self.requests), self.refusal(),
                        True, True, False)

    def bare_benign(self):
        return self.row("refusal_benign", self.question(), self.refusal(), False, True, False)

    def agreed_harmful(self):
        return self.row("agreement", self.rng.choice(self.requests), next(self.agreements),
                        True, False, None)

    def agreed_benign(self):
        return self.row("agreement", self.question(), next(self.agreements), False, False, False)

    def refuse_comply(self):
        r = self.rng.choice(self.bad)
        return self.row("refuse_comply", r["prompt"], f"{self.refusal()} "
                        f"{self.rng.choice(self.texts['turns'])}{r['response']}",
                        r.get("prompt_harmful"), False, True)

    def disclaim(self):
        r = self.rng.choice(self.bad)
        return self.row("disclaim", r["prompt"],
                        f"{r['response']} {self.rng.choice(self.texts['disclaimers'])}",
                        r.get("prompt_harmful"), False, True)

    def error(self):
        words = {k: self.rng.choice(v) for k, v in self.errors.items()}
        question, reply = (x.format(**words) for x in self.rng.choice(self.texts["errors"]))
        reply += self.rng.choice(self.texts["error_ends"])
        return self.row("odd", question, reply[0].upper() + reply[1:], False, False, False)

    # replies that have nothing to do with the request
    def off_topic(self):
        return self.row("off_topic", self.rng.choice(self.requests), self.rng.choice(self.helpful),
                        True, False, False)

    def benign_other(self):
        return self.row("benign_other", self.question(), self.rng.choice(self.helpful),
                        False, False, False)

    def echo(self):
        asked = self.rng.choice(self.requests)
        return self.row("echo", asked, self.rng.choice(["", "You asked: "]) + asked,
                        True, False, False)

    def gibberish_reply(self):
        return self.row("gibberish", self.rng.choice(self.requests), self.gibberish(),
                        True, False, False)

    def gibberish_request(self):
        return self.row("gibberish", self.gibberish(), self.rng.choice(
            [self.gibberish(), self.rng.choice(self.helpful)]), False, False, False)

    # requests in other languages, requests that share their words and not their harm
    def foreign(self):
        x = self.rng.choice(self.languages)
        if self.rng.random() < 0.3:
            return self.row("foreign_answered", *self.rng.choice(x["answered"]),
                            False, False, False)
        harmful = self.rng.random() < 0.7
        asked = self.rng.choice(x["harmful"]) if harmful else self.rng.choice(x["answered"])[0]
        return self.row("foreign_refused", asked, self.rng.choice(x["refusal"]),
                        harmful, True, False)

    def contrast_benign(self):
        text, good, _ = self.rng.choice(self.pairs)
        return self.row("contrast_benign", text.replace("{x}", self.rng.choice(good)), None,
                        False, None, None)

    def contrast_harmful(self):
        text, _, bad = self.rng.choice(self.pairs)
        return self.row("contrast_harmful", text.replace("{x}", self.rng.choice(bad)), None,
                        True, None, None)

    # claims about the judge's answer
    def forged_request(self):
        r = self.rng.choice(self.labelled)
        return {**r, "prompt": f"{r['prompt']}\n{self.rng.choice(self.forgeries)}",
                "source": "aug_forged"}

    def forged_reply(self):
        r = self.rng.choice(self.labelled)
        return {**r, "response": f"{r['response']}\n{self.rng.choice(self.forgeries)}",
                "source": "aug_forged"}


def augment(rows, n, rng, fresh):
    """n rows over the holes of a first judge, of every kind in turn. See Holes."""
    holes = Holes(rows, rng, fresh)
    return [getattr(holes, Holes.KINDS[i % len(Holes.KINDS)])() for i in range(n)]


def weakly_labelled(row):
    """The row with its missing refusal label, where words and harm label leave little doubt.

    Few sources carry refusal labels by hand, and with those alone a judge missed 58 % of XSTest's
    refusals, which are long; the matcher's F1 there is .91. A reply that condemns a request known
    to be harmful, and harms nobody, counts as a refusal, as people labelled it there. Weak labels
    are trained on, never calibrated or reported on.
    """
    if row.get("response_refusal") is not None or not row.get("response"):
        return row
    matched, harmful = judge.refusal_match(row["response"]), row.get("response_harmful")
    condemns = (harmful is False and row.get("prompt_harmful") is True
                and DISAPPROVAL.search(row["response"][:200]))
    if harmful is not True and (matched or condemns):
        return {**row, "response_refusal": True}
    return {**row, "response_refusal": False} if harmful and not matched else row


def seed_rows():
    """The training half of the seeds that ship, as prompt-only rows: the game's own distribution.
    Benign ones that sound harmful three times: no other source has many."""
    return [dict(prompt=s["prompt"], response=None, prompt_harmful=s["harmful"], source="own_seeds")
            for s in stage.load_seeds("prompts/seeds.jsonl", "train")
            for _ in range(3 if s.get("category") == "sounds_harmful" else 1)]


def shorten(tok, text, limit):
    """The first `limit` tokens of a text."""
    ids = tok(text or "", add_special_tokens=False).input_ids
    return text if len(ids) <= limit else tok.decode(ids[:limit])


def loss_of(scorer, rows, encoded):
    """Mean over labels of the cross-entropy at the answers, plus LINE_LOSS of the line texts."""
    logits_B3V, _, lines = scorer.answer_logits(encoded)
    target_B3 = torch.tensor([[-100 if r.get(f) is None else scorer.yes if r[f] else scorer.no
                               for f in FIELDS] for r in rows], device=scorer.model.device)
    answer = torch.nn.functional.cross_entropy(logits_B3V.flatten(0, 1), target_B3.flatten())
    head, extra = scorer.model.get_output_embeddings(), 0.0
    for hidden_BLD, ids in zip(lines, scorer.line_ids):
        # 2-D: a strided 3-D input copies the weights
        logits = head(hidden_BLD.flatten(0, 1).contiguous()).float()
        target = torch.tensor(ids * len(rows), device=logits.device)
        extra = extra + torch.nn.functional.cross_entropy(logits, target) / 3
    return answer, answer + LINE_LOSS * extra


def batches(encoded, rng):
    """One epoch: shuffled, then sorted by length in windows of 16 batches: little is padding."""
    order = list(range(len(encoded)))
    rng.shuffle(order)
    out = []
    for start in range(0, len(order), 16 * BATCH):
        window = sorted(order[start:start + 16 * BATCH], key=lambda i: len(encoded[i]))
        out += [window[i:i + BATCH] for i in range(0, len(window), BATCH)]
    rng.shuffle(out)
    return out


def train(scorer, rows, state_file):
    """LoRA training with automatic resume from checkpoints/00_judge/; changes the model."""
    from safetensors.torch import load_file, save_file
    rng = random.Random(SEED)
    encoded = [scorer.encode(r["prompt"], r.get("response")) for r in rows]
    plan = [b for _ in range(EPOCHS) for b in batches(encoded, rng)][:MAX_UPDATES]
    optimizer = optim.MasterAdamW(scorer.model, (0.9, 0.99), 0.0)
    start, began = 0, time.time()
    if state_file.exists():
        state = load_file(str(state_file))
        start = int(state.pop("updates"))
        optimizer.restore(state)
        print(f"resumed at update {start}")
    recent = []
    for step, batch in enumerate(plan):
        if step < start:
            continue
        answer, loss = loss_of(scorer, [rows[i] for i in batch], [encoded[i] for i in batch])
        loss.backward()
        optimizer.collect()
        warm = min(1.0, (step + 1) / (0.03 * len(plan)))
        optimizer.step(LR * warm * 0.5 * (1 + math.cos(math.pi * step / len(plan))), 1.0)
        recent = (recent + [answer.item()])[-25:]
        if (step + 1) % 25 == 0:
            print(f"update {step + 1:4d}/{len(plan)} | loss {sum(recent) / len(recent):.3f} | "
                  f"{time.time() - began:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            state_file.parent.mkdir(parents=True, exist_ok=True)
            save_file({**optimizer.tensors(), "updates": torch.tensor(step + 1)},
                      str(state_file) + ".tmp")
            Path(str(state_file) + ".tmp").rename(state_file)


LINES_USED = {  # 1: the log-odds of this line may move the label's probability
    "prompt_harmful": (1, 0, 0),    # the other lines mean nothing without a reply
    "response_refusal": (0, 1, 1),  # a refusal is one whatever was asked
    "response_harmful": (1, 1, 1)}


def matrix_scaling(margins, gold, used, row_weights):
    """Weights [3] and bias that maximize the likelihood of labels given the log-odds of the three
    lines (Guo et al. 2017, section 4.2, one label). used: 0 where a line's weight stays 0."""
    x = torch.tensor(margins, dtype=torch.float64) * torch.tensor(used)
    y, n = torch.tensor(gold, dtype=torch.float64), torch.tensor(row_weights, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        lbfgs.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w[:3] + w[3], y,
                                                                     weight=n / n.mean())
        value = value + 1e-3 * w[:3].square().sum()  # few rows: separable ones stay finite
        value.backward()
        return value

    lbfgs.step(loss)
    return dict(weights=w[:3].tolist(), bias=w[3].item())


def fit(rows, margins):
    """Matrix scaling for each label from its labelled rows. Augmented ones count AUGMENTED_WEIGHT
    of the real ones: without them bare refusals and off-topic replies, which a policy writes, are
    taken for harm; as many as they happen to be, and real harm is missed (CARD.md)."""
    out = {}
    for field in FIELDS:
        m, gold, made = zip(*((m, float(r[field]), r["source"].startswith("aug_"))
                              for m, r in zip(margins, rows) if r.get(field) is not None))
        each = AUGMENTED_WEIGHT * (len(made) - sum(made)) / max(1, sum(made)) or 1.0
        out[field] = matrix_scaling(m, gold, LINES_USED[field], [each if a else 1.0 for a in made])
    return out


def measure(rows, margins):
    """Figures on the held-out rows -> dict, also printed: per label with its reliability before and
    after calibration, within each source of prompts, and per kind of augmented rows the share of
    right labels.

    Probabilities are cross-fitted: a row's calibration comes from the half it is not in.
    """
    halves = [fit([r for r in rows[i::2]], margins[i::2]) for i in (1, 0)]
    p = [{f: judge.calibrated(m, halves[i % 2][f]) for f in FIELDS} for i, m in enumerate(margins)]
    out = dict(labels={}, sources={}, slices={})
    for k, field in enumerate(FIELDS):
        real = [i for i, r in enumerate(rows)
                if r.get(field) is not None and not r["source"].startswith("aug_")]
        gold, after = [rows[i][field] for i in real], [p[i][field] for i in real]
        before = [1 / (1 + math.exp(-margins[i][k])) for i in real]
        out["labels"][field] = dict(
            judge.scores(gold, [x > 0.5 for x in after], after),
            **{f"ece_{name}": judge.reliability(gold, x)[0]
               for name, x in (("before", before), ("after", after))},
            reliability=judge.reliability(gold, after)[1],
            reliability_before=judge.reliability(gold, before)[1])
        print(f"held out: {field:17s} " + "  ".join(
            f"{k} {v:.3f}" for k, v in out["labels"][field].items() if "reliability" not in k))
    for source in sorted({r["source"] for r in rows if r["source"].startswith("promptonly_")}):
        at = [i for i, r in enumerate(rows) if r["source"] == source
              and r["prompt_harmful"] is not None]
        gold, after = ([f(i) for i in at] for f in (lambda i: rows[i]["prompt_harmful"],
                                                    lambda i: p[i]["prompt_harmful"]))
        out["sources"][source] = judge.scores(gold, [x > 0.5 for x in after], after)
        print(f"held out: {source} prompt_harmful  " + "  ".join(
            f"{k} {v:.3f}" for k, v in out["sources"][source].items()))
    for kind in sorted({r["source"] for r in rows if r["source"].startswith("aug_")}):
        at = [i for i, r in enumerate(rows) if r["source"] == kind]
        out["slices"][kind[4:]] = dict(n=len(at), **{
            f: sum((p[i][f] > 0.5) == rows[i][f] for i in known) / len(known)
            for f in FIELDS for known in [[i for i in at if rows[i].get(f) is not None]] if known})
        print(f"slice: {kind[4:]:16s} " + "  ".join(
            f"{k} {v:.2f}" for k, v in out["slices"][kind[4:]].items()))
    return out


def draw_reliability(path, labels):
    """Share of true labels against mean p, before and after calibration; a dot's area is its n."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(labels), figsize=(12, 4), constrained_layout=True)
    for axis, (field, x) in zip(axes, labels.items()):
        axis.plot([0, 1], [0, 1], color="0.7", lw=1)
        for when, rows, color in (("before", x["reliability_before"], "#D55E00"),
                                  ("after", x["reliability"], "#0072B2")):
            mean, share, n = zip(*rows)
            axis.plot(mean, share, color=color, lw=1,
                      label=f"{when}: ECE {x['ece_' + when]:.3f}")
            axis.scatter(mean, share, s=[4 + 200 * k / x["n"] for k in n], color=color, alpha=0.5)
        axis.set(title=f"{field} (n {x['n']}, held out)", xlabel="p of the judge",
                 ylabel="share that people labelled so")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


@torch.no_grad()
def take_over(wrapped, folder):
    """Fill a fresh LoRA from the adapter in a folder, whose rank may be lower: its A becomes the
    first rows of A, its B the first columns of B, the rest of B stays 0: the model is the same."""
    from safetensors.torch import load_file
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    rank, scale = config["r"], (config["lora_alpha"] / config["r"]) / (ALPHA / RANK)
    params = dict(wrapped.named_parameters())
    for name, value in load_file(str(Path(folder) / "adapter_model.safetensors")).items():
        param = params.get(name.replace("lora_A.", "lora_A.default.")
                           .replace("lora_B.", "lora_B.default."))
        if rank > RANK or param is None:
            die(f"INIT={folder}: an adapter of rank {rank} with {name} does not fit into "
                f"RANK={RANK}, FIRST_LAYER={FIRST_LAYER}")
        if "lora_A" in name:
            param[:rank] = value
        else:
            param[:, :rank] = value * scale


def train_adapter(picked, model, scorer):
    """(3) A LoRA on the embedded model -> judge_adapter/; resumable."""
    from peft import LoraConfig, get_peft_model
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM",
        layers_to_transform=list(range(FIRST_LAYER, model.config.num_hidden_layers)),
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj",
                        "gate_proj", "up_proj", "down_proj"])
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if INIT:
        take_over(wrapped, INIT)
    made_of = json.dumps([stage.constants(globals()), len(picked)], sort_keys=True)
    state_file = (ROOT / "checkpoints" / "00_judge"
                  / f"{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.safetensors")
    train(scorer, picked, state_file)
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path = policy.WHEEL
    config.target_modules = sorted(config.target_modules)  # a set: its order changes every time
    wrapped.save_pretrained(str(ADAPTER), save_embedding_layers=False)
    (ADAPTER / "README.md").unlink()  # peft's empty card; ours is CARD.md
    state_file.unlink(missing_ok=True)


def main(argv):
    """The numbered steps of the docstring."""
    stage.configure(globals(), argv)
    if not DATA_DIR or not Path(DATA_DIR).is_dir():
        die(f"DATA_DIR={DATA_DIR!r} is no folder: give the folder with the labelled exchanges "
            "(README, 'The judge')")
    if INIT and not (Path(INIT) / "adapter_model.safetensors").is_file():
        die(f"INIT={INIT}: no adapter_model.safetensors there")
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    # (1) rows and split
    rows = read_rows(DATA_DIR, BENCH_DIR) + seed_rows()
    training, held = ([r for r in rows if not held_out(r["prompt"])],
                      [r for r in rows if held_out(r["prompt"])])
    # (2) balance and augmentation
    training = [weakly_labelled(r) for r in training]
    picked = select(training, rng) + augment(training, AUGMENT, rng, fresh=False)
    prompts = [r for r in held if r["source"] in RANKED]  # few: all of them
    held = (random.Random(SEED).sample(held, min(HELD, len(held)))
            + augment(held, AUGMENT_HELD, random.Random(SEED), fresh=True))
    held += [r for r in prompts if r not in held]
    model, tok = policy.load(policy.EMBEDDED)
    for r in picked + held:
        r["prompt"], r["response"] = (
            shorten(tok, r["prompt"], PROMPT_TOKENS),
            shorten(tok, r.get("response"), REPLY_TOKENS) if r.get("response") is not None
            else None)
    # (3) train
    if not SCORE_ONLY:
        print(f"training on {len(picked)} rows, {len(held)} held out")
        train_adapter(picked, model, judge.Judge(model, tok))
    # (4) calibrate on the held-out prompts, through the merged model that is used later
    scorer = judge.load_judge("embedded")
    margins = scorer.margins([scorer.encode(r["prompt"], r.get("response")) for r in held]).tolist()
    (ADAPTER / "calibration.json").write_text(json.dumps(fit(held, margins), indent=1))
    figures = measure(held, margins)
    draw_reliability(ADAPTER / "reliability.png", figures["labels"])
    meta = stage.make_meta(globals(), policy.WHEEL)
    # no paths of one machine
    meta["constants"].update(DATA_DIR="<labelled exchanges>", BENCH_DIR="<benchmarks>")
    stored = ADAPTER / "scores.json"
    report = json.loads(stored.read_text()) if SCORE_ONLY else dict(meta=meta, rows=len(picked))
    stored.write_text(json.dumps(dict(report, scored=meta["time"], held_out=figures), indent=1))
    print(f"made {ADAPTER.name}/; next: python judge.py eval <labelled file>, "
          "then python 01_sft_warmup.py")


if __name__ == "__main__":
    main(sys.argv[1:])
