"""Start or resume a run of 02, save its checkpoints, write its logs.

scope: 02's globals(); c: the same as attributes. c.judge: judge.py, not to be imported here."""
import collections
import json
import sys
import types

import torch

from engine import adapters, models, parallel, run, shards
from engine.batching import evenly
from engine.optim import OPTIMIZERS
from engine.run import die
from selfplay import monitor, plan
from selfplay.data import halves, load_seeds, seeds_digest
from selfplay.replay import Likeness, Pool
from selfplay.turns import read_examples

# A run's parts. policy: {role: model that learns}. ref: the frozen start model. embed: texts ->
# vectors. sft: the SFT mix. inputs: digests for check_resume(). first: steps done. out: results/
Run = collections.namedtuple(
    "Run", "policy ref tok scorer optimizer pool seeds dev embed sft inputs first out")


def plan_memory(scope, source, seeds):
    """Print what a step needs in memory and time (selfplay/plan.py); on CUDA, stop if it does not
    fit -> are gradients to be checkpointed? Stops too where the attacker would get no seed."""
    c = types.SimpleNamespace(**scope)
    attacked = sum(kind.startswith("generated") for kind, _ in c.draw_seeds(seeds, 0))
    if not attacked and not c.published_ablation("defender"):
        die(f"ATTACKED={c.ATTACKED} leaves the attacker no seed: give more, or ROLES=defender")
    policy, names = models.peek(source), [c.JUDGE, c.RUBRIC_JUDGE if c.METHOD == "ssp" else ""]
    cuda = bool(c.PLAN_ONLY and c.CARD)  # a plan for a card, which may be in another machine
    judges = [c.judge.footprint(name, c.QUANTIZE, cuda) for name in filter(None, names)]
    if not policy or None in judges:
        print(f"memory: not planned, the config of {c.MODEL} or of the judge is not at hand")
        return c.CHECKPOINTING == "on"
    return plan.plan_run(run.constants(scope), *policy, judges, c.judge.JUDGE_TOKENS,
                         2 if cuda and c.DTYPE == "auto" else models.pick_dtype(c.DTYPE).itemsize,
                         seeds, attacked)


def check_constants(c, source):
    """Stop where constants exclude one another, or the model at `source` was taught otherwise."""
    if not c.LORA_RANK and (c.BASE_QUANT, c.ADAPTERS) != ("none", "shared"):
        die("BASE_QUANT=nf4 and ADAPTERS=per_role are for runs with adapters: give LORA_RANK")
    if (c.ADAPTERS == "per_role" and c.ROLES != "both") or run.locate(f"{source}/attacker"):
        die("adapters per role are for ROLES=both; a run from such a MODEL would lose its attacker")
    if c.REFERENCE == "cpu" and (c.LORA_RANK or c.ROLES != "both"):
        die("REFERENCE=cpu is for runs in which all weights of both roles learn: an adapter has no "
            "reference of its own to move, and a frozen role plays with it")
    alone = c.ROLES == "attacker" or c.published_ablation("defender")
    if c.METHOD == "ssp" and (c.SCHEME != "general_sum" or (c.REPLAY != "off" and alone)):
        die("METHOD=ssp has no SCHEME and replays attacks: with one role give REPLAY=off")
    if c.METHOD == "ssp" and c.REPLAY == "reflect" and not c.COT:
        print("WARNING: COT=false leaves no thinking in which to reflect: better REPLAY=plain")
    if c.SHARD == "fsdp" and (c.LORA_RANK or c.REFERENCE == "cpu" or parallel.number_of() == 1):
        die("SHARD=fsdp is for runs in several processes in which all weights learn and the "
            "reference is resident")
    meta = run.locate(f"{source}/meta.json")
    taught = dict(constants={}) | (run.read_json(meta) if meta else {})
    run.check_fields(taught, f"{source}/meta.json", dict(constants=dict))
    if taught["constants"].get("COT", c.COT) != c.COT:
        die(f"COT={c.COT}, but {c.MODEL} was trained with COT={not c.COT}: run 01 with "
            f"COT={c.COT} RUN=<name>, then give MODEL=checkpoints/<name>")


def load_models(c, source, resumed, checkpointing):
    """(reference, tokenizer, {role: model that learns}, its optimizer). source: where MODEL is.
    resumed: a checkpoint's folder, or None. checkpointing: of gradients."""
    ref, tok = models.load_model(source, c.DTYPE, quantize=c.BASE_QUANT == "nf4")
    ref.requires_grad_(False)
    if c.REFERENCE == "cpu":
        ref.to("cpu")
    if c.LORA_RANK:  # one set of weights; a resumed adapter comes with the optimizer's state
        model = adapters.twin(ref)
    else:
        model, _ = models.load_model(str(resumed or source), c.DTYPE)
    adapters.choose_weights(model, c.LORA_RANK, c.LORA_ALPHA, c.SEED)
    if checkpointing:
        models.checkpoint_gradients(model)
    for each in (model, ref) if c.SHARD == "fsdp" else ():
        shards.shard(each)
    policy, learning = dict(attacker=model, defender=model), model
    if c.ADAPTERS == "per_role":
        policy["attacker"] = adapters.twin(model)
        learning = torch.nn.ModuleList(policy.values())
    return ref, tok, policy, OPTIMIZERS[c.OPTIMIZER](learning, (0.9, 0.95), 0.0)


def start(scope, load_embedder):
    """Load a run's parts, new or resumed -> Run. load_embedder: of evaluation, for (8) and SSP."""
    c = types.SimpleNamespace(**scope)
    source = str(run.locate(c.MODEL) or c.MODEL)
    check_constants(c, source)
    if c.MODEL == "checkpoints/01_sft" and not run.locate(f"{c.MODEL}/meta.json"):
        die(f"{c.MODEL} not found: run python 01_sft_warmup.py first")
    seeds, dev, embed = load_seeds(c.SEEDS, "train"), [], None
    checkpointing = plan_memory(scope, source, seeds)
    if c.PLAN_ONLY:
        sys.exit(0)
    out = parallel.once(run.claim, scope, run.CHECKPOINTS)
    resumed, first = run.newest_checkpoint(run.CHECKPOINTS / c.RUN), 0
    if resumed:
        first = int(resumed.name.removeprefix("step_"))
    elif (steps := monitor.last_step(out / "metrics.csv")) > c.SAVE_EVERY:
        die(f"{run.short(out)} has {steps} steps, but no step in checkpoints/{c.RUN} can go on: "
            "delete both folders, or give another RUN=")
    elif steps:
        print(f"{run.short(out)}: {steps} steps, but no checkpoint: the run begins again")
    if first > c.STEPS:
        die(f"checkpoints/{c.RUN} has {first} steps already, more than STEPS={c.STEPS}: "
            "give a larger STEPS, or another RUN=")
    sft_file = run.locate(c.SFT or f"{source}/defender.jsonl")
    if c.SFT and not (sft_file and sft_file.is_file()):
        die(f"SFT={c.SFT}: file not found: python 01_sft_warmup.py writes such a file")
    if c.SFT and not run.locate(f"{source}/meta.json"):  # no model of ours: who wrote its examples?
        made = run.read_json(sft_file.parent / "meta.json", missing={}).get("parent")
        if made not in (None, run.publishable(c.MODEL)):
            print(f"WARNING: {run.brief(made)} wrote the examples of {c.SFT}, MODEL is {c.MODEL}")
    rubric = c.RUBRIC_JUDGE if c.METHOD == "ssp" else ""
    inputs = dict(MODEL=models.fingerprint(source), JUDGE=c.judge.fingerprint(c.JUDGE),
                  RUBRIC_JUDGE=c.judge.fingerprint(rubric), SEEDS=seeds_digest(c.SEEDS),
                  SFT=run.file_digest(sft_file),
                  prompts=run.file_digest(*run.PROMPTS.glob("*.txt")))
    if resumed:
        run.check_resume(scope, resumed, inputs)
    scorer = c.judge.load_judge(c.JUDGE, c.QUANTIZE, rubric=rubric,
                              max_text=c.judge.text_limit(c.ATTACK_TOKENS, c.REPLY_TOKENS))
    c.judge.check_floor(scorer, c.JUDGE_FLOOR)
    ref, tok, policy, optimizer = load_models(c, source, resumed, checkpointing)
    sft, pool_text = read_examples(sft_file, tok, c.SFT_KINDS, c.COT), ""
    if not c.RL_COEF and not (sft and c.SFT_COEF):
        die("RL_COEF=0 trains the SFT mix alone, and there is none: give SFT= or SFT_COEF=")
    if c.EVAL_EVERY or c.METHOD == "ssp":
        embed = load_embedder("")
    for half in halves(load_seeds(c.SEEDS, "dev")) if c.EVAL_EVERY else ():
        dev += evenly(half, c.EVAL_SEEDS)
    if resumed:
        optimizer.restore(models.read_tensors(resumed / "state.safetensors"))
        parallel.once(run.drop_old_states, resumed)  # killed while it saved, it may have two
        if c.METHOD == "ssp":
            file = resumed / "pool.jsonl"
            pool_text = run.read_text(file) or die(
                f"{run.short(file)}: empty: this run cannot go on, give another RUN=")
        before = run.read_json(resumed / "meta.json").get("processes", 1)
        now = parallel.number_of()
        print(f"resumed from {run.short(resumed)}"
              + (f", made by {before} processes, now {now}" if before != now else ""))
    likeness = Likeness(embed) if c.METHOD == "ssp" else None
    benign = halves(seeds)[1] if c.BENIGN_FRACTION else []
    benign = [seed for seed in benign if seed.get("category") == "sounds_harmful"] or benign
    pool = Pool(c.POOL_SIZE, c.UCB_C, c.MASTERED, pool_text, likeness, benign)
    return Run(policy, ref, tok, scorer, optimizer, pool, seeds, dev, embed, sft, inputs, first,
               out)


def save(scope, r, step, state):
    """checkpoints/RUN/step_NNNNNN: adapter, or model and tokenizer; optimizer, pool, meta.json.
    With ADAPTERS "per_role" the defender's, and attacker/ the other. state: the optimizer's."""
    c = types.SimpleNamespace(**scope)
    meta = dict(run.make_meta(scope, c.MODEL), step=step, inputs=r.inputs,
                processes=parallel.number_of())
    files = {"pool.jsonl": r.pool.text()} if c.METHOD == "ssp" else {}
    attacker = r.policy["attacker"] if c.ADAPTERS == "per_role" else None
    folder = run.CHECKPOINTS / c.RUN / f"step_{step:06d}"
    models.save_checkpoint(folder, r.policy["defender"], r.tok, meta, state, files, attacker)
    monitor.write_curves(r.out, r.pool if c.METHOD == "ssp" else None)


def start_logs(r, meta):
    """The run's meta.json; its logs lose what a killed run wrote after its last checkpoint."""
    run.write_meta(r.out, meta)
    monitor.truncate_metrics(r.out / "metrics.csv", r.first)
    run.truncate_log(r.out / "games.jsonl", r.first, lambda line: json.loads(line)["step"])


def record(r, step, turns, m, tracker):
    """A step's games and metrics, into the run's results."""
    rows = monitor.game_rows(step, turns)
    with open(r.out / "games.jsonl", "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    monitor.write_metrics(r.out / "metrics.csv", m)
    tracker.log(step, m, rows)
