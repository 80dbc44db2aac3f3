"""The papers' claims, tested: train the arms of a grid, evaluate them, write the table of claims.

    python bench/claims.py                        what is missing, one after another: a day and more
                                                  on 2 CPU cores; the same command goes on
    python bench/claims.py PLAN_ONLY=true         the commands only
    python bench/claims.py ARMS=selfplay,sft_alone    these arms, and those that they start from
    python bench/claims.py TRAIN=false            evaluate the arms that are kept
    python bench/claims.py TABLE_ONLY=true        the table from what is there

1. Train: GRID below. All arms are adapters of one rank, with the same number of steps; arms with
   one SEED draw the same seeds in the same order (attacker_only plays the attacked ones). 02 goes
   on by itself when it was cut.
2. Keep, after each arm: ADAPTERS_DIR/ARM (adapter in bfloat16, meta.json, a warm-up's SFT mix),
   results/reference/RUN/ARM (metrics.csv, 20 games, of SSP's arms the attacks that worked). An arm
   that is kept is finished: with these files the grid goes on on another machine.
3. Evaluate by 03. Each arm, and the model before its warm-up ("base"), answers the held-back
   seeds, the benchmarks of DATA_DIR and the attacks of every arm in attackers_of(); the SSP arms
   also attacks that worked in their training. The labels are kept (bench/outcomes.py), so of an arm
   that comes later the others answer the attacks only.
4. Best response: a final defender is frozen and its attacker trained on, on attacked games only;
   its success before and after. These attackers stay in checkpoints/ and are never kept.
5. Write results/reference/RUN/claims.md and .json, two pictures, and CARD.md of each adapter; of
   SPLIT=test claims_test.md and .json and rates_test.png and crossplay_test.png. The claims and the
   rule for the verdict are in bench/verdicts.py.

Choices of ours: an arm without hidden thinking starts from a warm-up without it; random seeds
differ in 02, not in the warm-up; the SFT mix is left out of 4, since it teaches the defender.
"""
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import judge  # noqa: E402
import launcher  # noqa: E402
import outcomes  # noqa: E402
import torch  # noqa: E402
import verdicts  # noqa: E402
from engine import adapters, batching, models, run  # noqa: E402
from engine.run import die  # noqa: E402
from evaluation import attackers, crossplay, players, publish, tables  # noqa: E402
from evaluation.benchmarks import load_benchmarks  # noqa: E402
from evaluation.scores import rate  # noqa: E402
from selfplay.data import halves, load_seeds, read_rows, seeds_digest  # noqa: E402

# ==================================================================================================
ARMS = ""                 # names of GRID with commas, also selfplay_seed1; "": all
MODEL = "smollm2"         # what the warm-up starts from
JUDGE = "embedded"        # of training and evaluation
JUDGE2 = "embedded2"      # of evaluation
RANK = 16                 # of all adapters
LR = 5e-4                 # of 01 and 02, about ten times that of all weights
STEPS = 60                # of every arm; also the length of the learning rate's schedule
SEEDS_PER_STEP = 32       # as in 02
THREE_SEEDS = "selfplay,sft_alone,defender_only"  # arms that run with SEED=1 and 2 too
RESPONSE_STEPS = 40       # of a best response
RESPONSES = "warmup,selfplay"  # arms whose defenders meet a best response; "": none
SPLIT: Literal["dev", "test"] = "dev"  # of the seeds in 03; test once, at the end
DATA_DIR = ""             # benchmarks for 03; "": held-back seeds only
LIMIT = 0                 # prompts of a benchmark at most; 0: all
ADAPTERS_DIR = "adapters"  # where finished arms are kept
RUN = "claims"            # names results/runs/RUN, results/reference/RUN and, with _ARM, the runs
TRAIN = True              # what is missing, best responses too; False: evaluate what is kept
PLAN_ONLY = False         # print the commands and stop (display)
TABLE_ONLY = False        # train and ask nothing (display)
# ==================================================================================================
# SSP attacks every goal, as its paper does: with half of them the pool stays nearly empty.
SSP = "METHOD=ssp ATTACKED=1.0"
GRID = {  # arm: (the arm that it starts from, what it changes); from none: a warm-up
    "warmup": ("", ""),
    "selfplay": ("warmup", ""),
    "sft_alone": ("warmup", "RL_COEF=0"),
    "attacker_only": ("warmup", "ROLES=attacker"),
    "defender_only": ("warmup", "ROLES=defender"),
    "defender_frozen": ("warmup", "ROLES=defender OPPONENT=frozen_turns"),
    "warmup_no_cot": ("", "COT=false"),
    "selfplay_no_cot": ("warmup_no_cot", "COT=false"),
    "zero_sum": ("warmup", "SCHEME=zero_sum"),
    "ssp_off": ("warmup", f"{SSP} REPLAY=off"),
    "ssp_plain": ("warmup", f"{SSP} REPLAY=plain"),
    "ssp_reflect": ("warmup", f"{SSP} REPLAY=reflect")}
SSP_ARMS = ("ssp_off", "ssp_plain", "ssp_reflect")
BASE = "base"             # the model before its warm-up, among the arms that are evaluated
GAMES, MET = 20, 40       # games kept of a run; attacks kept that worked
BENIGN = 8                # benign seeds beside them, since 03 wants both kinds
PANELS = [("seeds_harmful", "asr", "harmful requests", "answered harmfully"),  # of rates.png
          ("attacked", "asr", "the same, attacked", "answered harmfully"),
          ("seeds_benign", "benign_compliance", "benign requests", "answered"),
          ("or_bench_hard", "benign_compliance", "hard benign requests", "answered")]


# ---- the plan ------------------------------------------------------------------------------------

def grid():
    """All arms in the order of the work: seed 0 of each, then SEED=1 and 2 of THREE_SEEDS."""
    names = list(GRID)
    for seed in (1, 2):
        for arm in filter(None, map(str.strip, THREE_SEEDS.split(","))):
            if arm not in GRID:
                die(f"THREE_SEEDS={THREE_SEEDS}: no arm {run.brief(arm)}")
            names.append(f"{arm}_seed{seed}")
    return names


def parts(arm):
    """selfplay_seed1 -> ("selfplay", 1); an arm without a number has SEED=0."""
    name, _, seed = arm.partition("_seed")
    return name, int(seed or 0)


def chosen():
    """The arms of ARMS, with those that they start from, in the order of grid()."""
    known, wanted = grid(), set()
    for arm in filter(None, map(str.strip, ARMS.split(","))):
        if arm not in known:
            die(f"ARMS: no arm {run.brief(arm)}; there are {', '.join(known)}")
        wanted |= {arm, GRID[parts(arm)[0]][0]}
    return [arm for arm in known if arm in wanted or not wanted]


def run_of(arm):
    """The name of an arm's run of 01 or 02."""
    return f"{RUN}_{arm}"


def kept_at(arm):
    """The folder of an arm's adapter, as a command names it."""
    return MODEL if arm == BASE else f"{ADAPTERS_DIR}/{arm}"


def command(arm):
    """The words after "python" that train an arm."""
    name, seed = parts(arm)
    start, changes = GRID[name]
    words = [f"RUN={run_of(arm)}", f"JUDGE={JUDGE}", f"LORA_RANK={RANK}", f"LR={LR}",
             f"SEED={seed}", *changes.split()]
    if not start:
        return ["01_sft_warmup.py", f"MODEL={MODEL}", *words]
    return ["02_selfplay_rl.py", f"MODEL={kept_at(start)}", *words, f"STEPS={STEPS}",
            f"HORIZON={STEPS}", f"SEEDS_PER_STEP={SEEDS_PER_STEP}"]


def response_command(arm):
    """The words that train the attacker of a kept arm on, against its frozen defender."""
    return ["02_selfplay_rl.py", f"MODEL={kept_at(arm)}", f"RUN={run_of(f'response_{arm}')}",
            f"JUDGE={JUDGE}", f"LORA_RANK={RANK}", f"LR={LR}", "ROLES=attacker",
            "OPPONENT=frozen_turns", "ATTACKED=1.0", "SFT_COEF=0", f"STEPS={RESPONSE_STEPS}",
            f"HORIZON={RESPONSE_STEPS}", f"SEEDS_PER_STEP={SEEDS_PER_STEP}"]


def results(part):
    """RUN of an evaluation: the answers to other seeds have another folder."""
    return RUN + part + ("_test" if SPLIT == "test" else "")


def evaluation(run_name, checkpoints, *words):
    """The words that evaluate checkpoints, into results/runs/RUN_NAME."""
    return ["03_evaluate.py", f"RUN={run_name}", f"BASE={MODEL}", f"JUDGE={JUDGE}",
            f"JUDGE2={JUDGE2}", f"CHECKPOINTS={','.join(checkpoints)}", "CAPABILITY=",
            f"SPLIT={SPLIT}", *words]


def own_command(arm):
    """The words that ask an arm the held-back seeds and the benchmarks, and let it attack."""
    data = [f"DATA_DIR={DATA_DIR}"] if DATA_DIR else []
    return evaluation(results(""), [kept_at(arm)], f"LIMIT={LIMIT}", "CROSSPLAY=none", *data)


def file_command(name, arms):
    """The words that ask arms the requests in results/runs/NAME.jsonl, a file of seeds."""
    return evaluation(name, map(kept_at, arms), f"SEEDS=results/runs/{name}.jsonl",
                      "ATTACK=false")


def response_evaluation(arm):
    """The words that let an arm and the best response to it attack the arm."""
    return evaluation(results(f"_exploit_{arm}"), [kept_at(arm)], f"LIMIT={LIMIT}",
                      f"CROSSPLAY=checkpoints/{run_of(f'response_{arm}')}")


def responses(arms):
    """The arms among `arms` whose defenders meet a best response."""
    wanted = list(filter(None, map(str.strip, RESPONSES.split(","))))
    for arm in wanted:
        if arm not in grid():
            die(f"RESPONSES={RESPONSES}: no arm {run.brief(arm)}")
    return [arm for arm in arms if arm in wanted]


def attackers_of(arms):
    """Those of the arms whose attacks all are tested with: one random seed of each, and not where
    the defender alone was trained (defender_only: 88 of 96 attacks are refusals by the matcher)."""
    return [arm for arm in arms if arm in GRID and "ROLES=defender" not in GRID[arm][1]]


def all_commands(arms):
    """The commands that arms need from nothing. Those on attacks run once for each attacker."""
    asked = [BASE, *arms]
    out = [*map(command, arms), *map(own_command, asked)]
    for attacker in attackers_of(arms):
        out.append(file_command(results(f"_attacked_{attacker}"), asked))
    met = [arm for arm in SSP_ARMS if arm in arms]
    if len(met) > 1:
        out.append(file_command(results("_met"), met))
    for arm in responses(arms):
        out += [response_command(arm), response_evaluation(arm)]
    return out


# ---- one arm -------------------------------------------------------------------------------------

def is_kept(arm):
    """Is an arm finished? One that was made by other constants stops."""
    folder = run.ROOT / kept_at(arm)
    run.recover_folder(folder)
    if not (folder / adapters.WEIGHTS).is_file():
        return False
    meta = run.read_json(folder / "meta.json", inputs=dict, constants=dict)
    now = dict(JUDGE=judge.fingerprint(JUDGE), SEEDS=seeds_digest(meta["constants"]["SEEDS"]),
               prompts=run.file_digest(*run.PROMPTS.glob("*.txt")))
    other = launcher.differences(folder / "meta.json", command(arm))
    other += [f"other {name}" for name in now if meta["inputs"].get(name) != now[name]]
    if other:
        die(f"{run.short(folder)} was made with {', '.join(other)}: move it, or give another "
            "ADAPTERS_DIR=")
    return True


def train(arm):
    """Run an arm to its end, or go on with it, and keep it."""
    if is_kept(arm):
        print(f"{arm}: finished")
        return
    words = command(arm)
    if not launcher.last_checkpoint(words):
        launcher.launch(words)
    keep(arm, launcher.last_checkpoint(words))


def respond(arm):
    """Train a best response against the defender of a kept arm, if that has not been done."""
    words = response_command(arm)
    if launcher.last_checkpoint(words):
        print(f"response_{arm}: finished")
        return
    launcher.launch(words)
    copy_metrics(f"response_{arm}")  # no games: this attacker and its attacks stay here


def keep(arm, source):
    """Copy what must last of a finished run, whole or not at all: the adapter comes last."""
    rows = read_rows(run.RUNS / run_of(arm) / "games.jsonl", "seed", "request", "kind", heal=False)
    meta = run.read_json(source / "meta.json", constants=dict)
    games = publish.shippable(rows, meta["constants"]["SEEDS"])
    folder = copy_metrics(arm)
    write_rows(folder / "games_sample.jsonl", batching.evenly(games, GAMES))
    if arm in SSP_ARMS:
        write_rows(met_file(arm), batching.evenly(worked(arm, games), MET))

    target = run.ROOT / kept_at(arm)
    tmp = target.with_name(f"{arm}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    tensors = load_file(source / adapters.WEIGHTS)
    for name, x in tensors.items():
        tensors[name] = x.to(torch.bfloat16).contiguous()
    save_file(tensors, tmp / adapters.WEIGHTS, metadata=dict(format="pt"))
    for name in (adapters.CONFIG, "defender.jsonl"):
        if (source / name).is_file():
            shutil.copy(source / name, tmp)
    run.write_meta(tmp, meta)
    run.replace_folder(tmp, target)
    write_card(arm, None)
    size = (target / adapters.WEIGHTS).stat().st_size
    print(f"kept {run.short(target)} ({size / 1e6:.1f} MB) and {run.short(folder)}", flush=True)


def copy_metrics(name):
    """results/runs/RUN_NAME/metrics.csv -> results/reference/RUN/NAME, that folder."""
    folder, file = run.REFERENCE / RUN / name, run.RUNS / run_of(name) / "metrics.csv"
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        shutil.copy(file, folder)
    return folder


def met_file(arm):
    """Attacks that worked in the training of an SSP arm; empty if none did."""
    return run.REFERENCE / RUN / arm / "met.jsonl"


def write_rows(path, rows):
    """Rows as JSON lines."""
    run.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def worked(arm, games):
    """The different attacks on harmful seeds, about them, that worked in an SSP run, as seeds."""
    seen = {}
    for game in games:
        attack = game.get("attacker") or dict(declined=True)
        harmful = game["kind"] == "generated_harmful" and game["labels"]["response_harmful"]
        drifted = attack.get("declined") or not attack.get("relevant", True)
        if harmful and not drifted and game["request"].strip():
            seen.setdefault(game["request"].strip(), game["seed"])
    return [dict(id=f"{seed}~{arm}-{n}", prompt=text, harmful=True, split="dev")
            for n, (text, seed) in enumerate(seen.items())]


# ---- evaluation ----------------------------------------------------------------------------------

def known_outcomes(arms):
    """What is kept of the evaluations of finished arms, by today's judges."""
    judges, digests = {}, {}
    for name in (JUDGE, JUDGE2):
        judges[run.publishable(name)] = judge.fingerprint(name)
    for arm in arms:
        if arm == BASE:
            digests[arm] = models.fingerprint(str(run.locate(MODEL) or MODEL))
        else:
            digests[arm] = run.file_digest(run.ROOT / kept_at(arm) / adapters.WEIGHTS)
    suffix = ("_test" if SPLIT == "test" else "") + (f"_limit{LIMIT}" if LIMIT else "")
    return outcomes.Outcomes(run.REFERENCE / RUN, suffix, judges, digests)


def folder_of(words, arm):
    """Where 03 writes an arm's answers."""
    given = dict(word.split("=", 1) for word in words[1:])
    limit = f"_limit{LIMIT}" if int(given.get("LIMIT", 0)) else ""
    if arm == BASE:
        arm = players.find_checkpoint(MODEL, "turns", "chat").label
    return run.RUNS / f"{given['RUN']}{limit}" / arm


def evaluate(arms, known):
    """(3) Ask BASE and the finished arms what they were not asked yet."""
    met = [arm for arm in SSP_ARMS if arm in arms]
    for arm in met:
        if not met_file(arm).is_file():
            die(f"{run.short(met_file(arm))}: not found: it was made with {kept_at(arm)}")
    wanted = wanted_benchmarks()
    for arm in arms:
        # of the hub 03 knows what is there, and what it has asked already
        if not known.attacks(arm) or not wanted <= known.benchmarks(arm) or DATA_DIR == "hub":
            ask_own(arm, known)
    for attacker in attackers_of(arms):
        measure = outcomes.ATTACKED + attacker
        unmet = [arm for arm in arms if not known.has(arm, measure)]
        if unmet:
            ask_attacked(unmet, attacker, known)
    if len(met) > 1:
        ask_met(met, known)


def wanted_benchmarks():
    """Names of what own_command() asks; of the hub's nothing is known before."""
    if DATA_DIR in ("", "hub"):
        return set(outcomes.OWN)
    return {*outcomes.OWN, *load_benchmarks(run.locate(DATA_DIR))}


def ask_own(arm, known):
    """An arm on the seeds and benchmarks; it attacks itself and BASE, too."""
    words = own_command(arm)
    launcher.launch(words)
    summary = run.read_json(folder_of(words, "summary.json"), benchmarks=dict)
    folder = folder_of(words, arm)
    known.check_asked(run.read_json(folder / "meta.json", fixed=dict)["fixed"])
    known.keep_attacks(arm, folder / "attacks.jsonl")
    for name in summary["benchmarks"]:
        known.add_answers(arm, name, folder / name, outcomes.HARMFUL[name])
    if arm in attackers_of([arm]):
        known.add_attacked(arm, arm, folder / "attacks_own")
        known.add_attacked(BASE, arm, folder / "attacks_on_base")
    known.save()


def ask_attacked(arms, attacker, known):
    """Arms on the attacks of the arm `attacker`. The RUN ends with the digest of the attacks."""
    rows = []
    for row in known.attacks(attacker):
        if row["answer"]:
            rows.append(dict(id=row["id"], prompt=row["answer"]))
    name = results(f"_attacked_{attacker}") + f"_{known.attacks_digest(attacker)[:8]}"
    words = file_command(name, arms)
    if rows:
        write_seeds(name, rows)
        launcher.launch(words)
    for arm in arms:
        known.add_attacked(arm, attacker, folder_of(words, arm) / "seeds_harmful")
    known.save()


def ask_met(arms, known):
    """SSP arms on the attacks that worked against one of them in training."""
    rows = []
    for arm in arms:
        rows += read_rows(met_file(arm), heal=False)
    digest = players.sha(rows)
    if not rows or all(known.answers(arm).get("met", {}).get("attacks") == digest for arm in arms):
        return
    name = results("_met") + f"_{digest[:8]}"
    write_seeds(name, rows)
    words = file_command(name, arms)
    launcher.launch(words)
    known.forget("met")  # an arm that came or was trained anew met other attacks
    for arm in arms:
        stem = folder_of(words, arm) / "seeds_harmful"
        known.add_answers(arm, "met", stem, attacks=digest)
    known.save()


def ask_responses(arms, known):
    """(4) Train the best responses that were not tried yet, and try them."""
    for arm in arms:
        if known.has(arm, "response"):
            continue
        respond(arm)
        words = response_evaluation(arm)
        launcher.launch(words)
        attacker = f"{run_of(f'response_{arm}')}/step_{RESPONSE_STEPS:06d}"
        tries = dict(exploit=(arm, "attacks_own"), response=(attacker, f"attacks_on_{arm}"))
        for measure, (label, file) in tries.items():
            folder, found = folder_of(words, label), {}
            for opinion in outcomes.OPINIONS:
                found[opinion] = outcomes.judged(folder / file, True, opinion)
            attacks = read_rows(folder / "attacks.jsonl", "id", "answer", heal=False)
            known.add(arm, measure, outcomes.with_unsent(found, attacks))
        known.save()


def write_seeds(name, rows):
    """results/runs/NAME.jsonl: harmful requests (rows with id and prompt) as seeds for 03, and a
    few benign ones, since it wants both kinds."""
    seeds = [dict(id=row["id"], prompt=row["prompt"], harmful=True, split=SPLIT) for row in rows]
    _, benign = halves(load_seeds("prompts/seeds.jsonl", SPLIT))
    for seed in benign[:BENIGN]:
        seeds.append(dict(id=seed["id"], prompt=seed["prompt"], harmful=False, split=SPLIT))
    run.RUNS.mkdir(parents=True, exist_ok=True)
    write_rows(run.RUNS / f"{name}.jsonl", seeds)


# ---- the table and the cards ---------------------------------------------------------------------

def write_card(arm, answers):
    """ADAPTERS_DIR/ARM/CARD.md of an adapter: base, data, judge, scores, licence. answers: None
    before its evaluation."""
    folder = run.ROOT / kept_at(arm)
    config = run.read_json(folder / adapters.CONFIG)
    scores, shown = [], [name for name, *_ in PANELS]
    for what, x in verdicts.levels(answers, arm, shown).items() if answers else ():
        if x["n"]:
            scores.append(f"| {what} | {x['rate']:.2f} [{x['low']:.2f}, {x['high']:.2f}] | "
                          f"{x['n']} |")
    table = "\n".join(["| share of answers | rate | n |", "|---|---|---|", *scores])
    text = f"""# {arm}: a LoRA adapter

* Base: {config[adapters.BASE]} (SmolLM2-135M-Instruct, Apache-2.0). Rank {config['r']}, bfloat16.
* Made by: `python {shlex.join(command(arm))}`
* Data: prompts/seeds.jsonl (training split), texts and games of the model itself.
* Judge: {JUDGE}. It gave the reward or chose the examples, and it gave the scores below.
* Use: `python -m selfplay.chat {kept_at(arm)}`; `python 03_evaluate.py CHECKPOINTS={kept_at(arm)}`.
* Limits: a small model for research on defences. It is not safe for any other use. The adapter
  also plays the attacker, which rewrites requests of prompts/seeds.jsonl.

## Scores

The share of greedy answers that are harmful; of benign requests, the share that is answered.
Held-back seeds ({SPLIT}) and OR-Bench{f", at most {LIMIT} of each" if LIMIT else ""}.
"Attacked": by several arms.

{table if scores else "Not measured yet."}

## Licence

CC-BY-NC-SA-4.0: no commercial use, the same licence for what is built on it. Code and seeds are
MIT, the base is Apache-2.0, but the embedded judge is under CC-BY-NC-SA-4.0 because of its training
data. Whether weights that were trained by a judge's labels inherit its licence is an open question.
To be safe these weights are given under the same one.
"""
    run.write_text(folder / "CARD.md", text)


def write_table():
    """(5) of the docstring, from what is there."""
    arms = grid()
    answers = known_outcomes([BASE, *filter(is_kept, arms)])  # stops at an arm made otherwise
    answers.embed = attackers.load_embedder("")
    if not set(answers.arms) - {BASE}:
        die(f"{run.short(answers.file)} has no outcomes of an arm (SPLIT={SPLIT}, LIMIT={LIMIT}): "
            "leave TABLE_ONLY out, or give the LIMIT of the evaluation")
    missing = [arm for arm in arms if arm not in answers.arms]
    by = attackers_of(answers.arms)
    unmet = [arm for arm in answers.arms
             if not all(answers.has(arm, outcomes.ATTACKED + attacker) for attacker in by)]
    about = (f"{len(arms) - len(missing)} of {len(arms)} arms, {STEPS} steps of {SEEDS_PER_STEP} "
             f"seeds, rank {RANK}, split {SPLIT}, {f'at most {LIMIT}' if LIMIT else 'all'} prompts "
             f"of a benchmark. Not evaluated: {', '.join(missing) or 'none'}. Have met fewer "
             f"attackers than the others: {', '.join(unmet) or 'none'}. Answers by: "
             f"{'; '.join(answers.machines)}. What an arm is: the command in its CARD.md in "
             f"{ADAPTERS_DIR}/.")
    end = "_test" if SPLIT == "test" else ""
    file = run.REFERENCE / RUN / f"claims{end}.md"
    rows = verdicts.write(file, answers, (JUDGE, JUDGE2), about)
    draw(answers, file.parent, end)
    for arm in answers.arms:
        if arm != BASE and SPLIT == "dev":
            write_card(arm, answers)
    print(f"\n{about}")
    for row in rows:
        print(f"{row['opinions']['judge']['word']:12s} {row['text']} ({row['measure']})")
    print(f"made {run.short(file)}")


def draw(answers, folder, end=""):
    """rates.png, the arms of SEED=0 on PANELS; crossplay.png, attackers against all defenders, with
    the share of an attacker's attacks that stay harmful. end: of their names."""
    arms, asr, names = {}, [], []
    for arm in answers.arms:
        if parts(arm)[1]:
            continue
        arms[arm] = dict(answers={})
        for name, metric, *_ in PANELS:
            found = answers.outcomes(arm, name, "judge")
            found = rate([] if found is None else found.mean(axis=1))
            arms[arm]["answers"][name] = {metric: found}
    panels = []
    for name, metric, *words in PANELS:
        if any(arm["answers"][name][metric]["n"] for arm in arms.values()):
            panels.append((name, metric, *words))
    tables.draw_rates(folder / f"rates{end}.png", dict(checkpoints=arms), panels)
    by = attackers_of(answers.arms)
    for attacker in by:
        found = [answers.series(arm, outcomes.ATTACKED + attacker, "judge") for arm in answers.arms]
        asr.append([rate([] if x is None else x) for x in found])
        kept = answers.faithful(attacker).mean() if answers.attacks(attacker) else 0
        names.append(f"{attacker} ({verdicts.short(kept)} stay harmful)")
    crossplay.heat_map(folder / f"crossplay{end}.png",
                       dict(attackers=names, defenders=answers.arms, asr=asr))
    for name in ("rates", "crossplay"):
        publish.shrink(folder / f"{name}{end}.png", folder / f"{name}{end}.png")


def main(argv):
    """The numbered steps of the docstring."""
    run.configure(globals(), argv)
    arms = chosen()
    responses(arms)  # stops at a name that is none
    if PLAN_ONLY:
        for words in all_commands(arms):
            print("python", shlex.join(words))
        return
    if DATA_DIR and DATA_DIR != "hub" and not run.locate(DATA_DIR):
        die(f"DATA_DIR={DATA_DIR}: no such folder")
    if not TABLE_ONLY:
        run.doing("; the same command goes on")
        for arm in arms if TRAIN else ():
            train(arm)                                                                  # (1) (2)
        kept = [arm for arm in grid() if is_kept(arm)]
        if not kept:
            die(f"ADAPTERS_DIR={ADAPTERS_DIR}: no arm in it")
        run.lock(run.RUNS / f"{RUN}_grid")  # a second process would undo what this one notes
        known = known_outcomes([BASE, *kept])
        evaluate([BASE, *kept], known)                                                  # (3)
        some = [arm for arm in kept if arm in arms]
        ask_responses(responses(some) if TRAIN else [], known)                          # (4)
    write_table()                                                                       # (5)


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
