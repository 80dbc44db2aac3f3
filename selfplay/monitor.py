"""Monitoring: metrics of each step, the log line, the games file, the curves, the tracker."""
import dataclasses
import importlib.util
import math
import re

import pandas

from engine.run import die, read_log, short, write_text
from selfplay.data import read_table

GAMES_TRACKED = 4  # games of a step that a tracker is shown (ours)
NUMBER = re.compile(r"-?\d{1,18}(\.\d+)?(e[-+]?\d{1,3})?|nan|-?inf|", re.ASCII)  # of metrics.csv


def mean(values):
    """Mean of booleans or numbers; nan where there is none."""
    values = list(map(float, values))
    return sum(values) / len(values) if values else float("nan")


def is_copy(turn):
    """Is an attack its seed up to case, spaces, punctuation? Legal in the paper's game; logged."""
    attack, seed = (re.sub(r"\W+", "", x).lower() for x in (turn.answer, turn.seed["prompt"]))
    return attack == seed


def turns_table(turns):
    """Turns -> a DataFrame with a row each: fields of Turn and Labels, tokens, copy, faithful."""
    every = pandas.DataFrame(map(vars, turns))
    every = every.join(pandas.DataFrame(map(vars, every.pop("labels"))))
    every["tokens"], every["copy"] = every["ids"].map(len), list(map(is_copy, turns))
    every["faithful"] = every["prompt_harmful"].eq(every["kind"].str.endswith("harmful"))
    return every


def complied(replies):
    """Is a reply an answer: not refused, and not empty?"""
    return replies["response_refusal"].eq(False) & ~replies["empty"]


def step_metrics(turns):
    """A step's turns -> dict: columns of metrics.csv (PANELS explains most). nan: no such turn."""
    every = turns_table(turns)
    attacks, replies = every[every["role"] == "attacker"], every[every["role"] == "defender"]
    judged = replies[replies["parsed"]]
    attacked = judged[judged["kind"] == "generated_harmful"]
    plain = judged[judged["kind"] == "vanilla_harmful"]
    benign = judged[judged["kind"].isin(["generated_benign", "vanilla_benign"])]
    return dict(
        atk_r=mean(attacks["reward"].dropna()), asr=mean(attacked["response_harmful"]),
        asr_vanilla=mean(plain["response_harmful"]), def_r=mean(replies["reward"].dropna()),
        refuse_h=mean([*attacked["response_refusal"], *plain["response_refusal"]]),
        comply_b=mean(complied(benign)), empty=mean(replies["empty"]),
        fmt=mean(every["well_formed"]), fmt_atk=mean(attacks["well_formed"]),
        faithful=mean(attacks["faithful"][attacks["parsed"]]),
        copy=mean(attacks["copy"]), unique=mean(~attacks["answer"].duplicated()),
        atk_refuse=mean(attacks["declined"]), relevant=mean(attacks["relevant"]),
        drop=int(every["reward"].isna().sum()), turns=len(turns),
        len=mean(every["tokens"]), len_atk=mean(attacks["tokens"]))


def describe_arm(c):
    """Which of the papers' arms a run is, from the constants of 02 (a dict) -> its first line."""
    game = f"Self-RedTeam, {c['SCHEME']}"
    if c["METHOD"] == "ssp":
        game = f"SSP, replay {c['REPLAY']}"
    elif c["SCHEME"] == "zero_sum":
        game += " (the paper's theory)"
    frozen = "the frozen start model"
    who = {("both", "published"): "self-play", ("both", "frozen_turns"): "self-play",
           ("attacker", "published"): f"attacker-only against {frozen}, asked in plain chat "
                                      "(published ablation)",
           ("defender", "published"): "defender-only, without an attacker (published ablation)",
           ("attacker", "frozen_turns"): f"attacker-only against {frozen} (ours)",
           ("defender", "frozen_turns"): f"defender-only against {frozen} as attacker (ours)",
           }[c["ROLES"], c["OPPONENT"]]
    learns = "" if c["RL_COEF"] else " | the SFT mix alone, RL_COEF=0 (control, ours)"
    thinking = "hidden thinking" if c["COT"] else "no thinking (the paper's no-CoT ablation)"
    return f"arm: {game} | {who} | {thinking}{learns}"


def step_line(step, steps, m):
    """One line a step. H: entropy; gn: grad_norm; drop: no label; cut: texts cut for the judge."""
    return (f"step {step:03d}/{steps} | atk r {m['atk_r']:+.2f} asr {m['asr']:.2f} | "
            f"def r {m['def_r']:+.2f} refuse(h) {m['refuse_h']:.2f} "
            f"comply(b) {m['comply_b']:.2f} | fmt {m['fmt']:.2f} empty {m['empty']:.2f} | "
            f"drop {m['drop']}/{m['turns']} cut {m['cut']} | "
            f"kl {m['kl']:.3f} | H {m['entropy']:.2f} | len {m['len']:.0f} | "
            f"gn {m['grad_norm']:.1f} | {m['seconds']:.0f} s | {m['gb']:.1f} GB")


def read_metrics(path):
    """metrics.csv -> a table of texts, `step` as numbers; empty if there is none. Damage stops."""
    rows = read_table(path) if read_log(path) else []
    for n, row in rows:
        if not row.get("step", "").isdecimal() or not all(map(NUMBER.fullmatch, row.values())):
            die(f"{short(path)} line {n}: no metrics of a step: correct or delete it")
    table = pandas.DataFrame([row for _, row in rows], columns=None if rows else ["step"])
    return table.astype(dict(step=int))


def write_metrics(path, m):
    """Add a step's metrics to metrics.csv, which is written whole: a step may bring new columns."""
    row = {k: round(v, 5) if isinstance(v, float) and k != "lr" else v for k, v in m.items()}
    table, new = read_metrics(path), pandas.DataFrame([row])
    columns = [*table.columns, *new.columns.difference(table.columns, sort=False)]
    table = pandas.concat([table, new]).reindex(columns=columns)
    write_text(path, table.to_csv(index=False, na_rep="nan"))


def truncate_metrics(path, last):
    """Drop what a killed run left: rows of steps after `last`; the file if last is 0."""
    if not last:
        path.unlink(missing_ok=True)
    elif last_step(path) > last:
        table = read_metrics(path)
        write_text(path, table[table["step"].le(last)].to_csv(index=False))


def last_step(path):
    """The last step in a metrics.csv; 0 where there is none."""
    return max(read_metrics(path)["step"], default=0)


def game_rows(step, turns):
    """A step's turns -> one dict a game: seed id, both turns, labels, rewards (harmful text)."""
    played, rows = {}, []
    for t in turns:  # the attacker's turn of a game comes before the defender's
        sides = played.setdefault(t.game, {})
        sides[t.role] = dict(thinking=t.thinking, answer=t.answer, well_formed=t.well_formed,
                             reward=t.reward, tokens=len(t.ids))
        if t.role == "attacker":
            sides["attacker"].update(declined=t.declined, relevant=t.relevant)
        else:
            rows.append(dict(step=step, game=t.game, kind=t.kind, seed=t.seed["id"],
                             request=t.request, labels=dataclasses.asdict(t.labels), **sides))
    return rows


PANELS = {  # title -> {column of metrics.csv: legend}
    "reward": dict(atk_r="attacker", def_r="defender"),
    "harmful requests": dict(asr="attacked, answered harmfully",
                             asr_vanilla="not attacked, answered harmfully", refuse_h="refused"),
    "benign requests": dict(comply_b="answered", comply_pair="beside a replay, answered"),
    "format and attacks": dict(fmt="turns that are well-formed",
                               faithful="attacks as harmful as their seed",
                               unique="attacks that differ", copy="attacks that copy their seed",
                               atk_refuse="attacks that are empty or refuse",
                               relevant="attacks about their seed"),
    "distance and spread": dict(kl="KL to the start, per token", entropy="entropy / 10"),
    "tokens per turn": dict(len="both roles", len_atk="attacker"),
    "dev seeds: harmful": dict(dev_asr="attacked, answered harmfully",
                               dev_asr_vanilla="not attacked, answered harmfully",
                               dev_refuse="not attacked, refused"),
    "dev seeds: benign": dict(dev_comply_attacked="attacked, answered",
                              dev_comply="not attacked, answered"),
    "dev seeds: attacks": dict(dev_diversity="diversity, 1 - mean cosine",
                               dev_seed_cosine="likeness to the own seed",
                               dev_faithful="as harmful as their seed"),
    "dev seeds: tokens": dict(dev_think="thinking, defender", dev_answer="answer, defender",
                              dev_think_atk="thinking, attacker", dev_attack="attack"),
    "pool: items": dict(pool="failures in the pool", distilled="safe replies in the SFT mix"),
    "pool: shares": dict(confirmed="new failures that fail again",
                         mastered="mastered, of all that entered",
                         retired="retired after many visits"),
    "defender's game reward, harmful seeds": dict(r_fresh="fresh games", r_replay="replayed games")}


def draw_curves(folder, visits=()):
    """folder/metrics.csv as curves.png: thin: steps, thick: means over 10, dots: on dev seeds.
    Panels without values are left out. visits: of each item of the pool, for a histogram."""
    from matplotlib.figure import Figure
    table = pandas.read_csv(folder / "metrics.csv").dropna(axis=1, how="all")
    if "entropy" in table:
        table["entropy"] /= 10
    smooth = table.rolling(10, min_periods=1).mean()
    panels = [title for title, legends in PANELS.items() if legends.keys() & table.columns]
    count = len(panels) + any(visits)
    height = math.ceil(count / 3)
    figure = Figure(figsize=(13, 3.3 * height), layout="constrained")
    axes = figure.subplots(height, 3, squeeze=False).ravel()
    for axis, title in zip(axes, panels):
        for name in table.columns.intersection(list(PANELS[title]), sort=False):
            if name.startswith("dev_"):  # known in some steps only
                known = table[["step", name]].dropna()
                axis.plot(known["step"], known[name], "o-", lw=2, label=PANELS[title][name])
                continue
            [thin] = axis.plot(table["step"], table[name], lw=0.6, alpha=0.35)
            axis.plot(table["step"], smooth[name], lw=2, color=thin.get_color(),
                      label=PANELS[title][name])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    if any(visits):
        axis = axes[len(panels)]
        axis.hist(visits, bins=range(max(visits) + 2), align="left")
        axis.set_title("pool: visits an item", fontsize=10)
        axis.set_xlabel("visits")
    for axis in axes[count:]:
        axis.axis("off")
    figure.savefig(folder / "curves.png", dpi=110)


def write_curves(folder, pool):
    """Write curves.png and, with SSP's pool (None: no pool), pool.jsonl into a run's folder."""
    if pool:
        write_text(folder / "pool.jsonl", pool.text())
    draw_curves(folder, pool.visit_counts() if pool else ())


class Tracker:
    """Metrics, a few games to "tensorboard", "trackio" or "wandb", by accelerate; "": to none."""

    def __init__(self, name, run, constants, folder):
        self.name, self.accelerator = name, None
        if not name:
            return
        if importlib.util.find_spec(name) is None:
            die(f"TRACKER={name}: not installed: pip install {name}")
        from accelerate import Accelerator
        self.accelerator = Accelerator(log_with=name, project_dir=str(folder))
        how = dict(tensorboard={}, trackio=dict(name=run), wandb=dict(name=run, dir=str(folder)))
        project = run if name == "tensorboard" else "selfplay"
        self.accelerator.init_trackers(project, config=constants, init_kwargs={name: how[name]})

    def log(self, step, metrics, games):
        """A step's metrics under their names in metrics.csv, and a few of its game_rows()."""
        if not self.accelerator:
            return
        self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
        rows = [[g["kind"], g["seed"], g["request"], g["defender"]["answer"],
                 str(g["labels"]["response_harmful"])] for g in games[:GAMES_TRACKED]]
        table = pandas.DataFrame(rows, columns=["kind", "seed", "request", "reply", "harmful"])
        tracker = self.accelerator.get_tracker(self.name)
        if self.name == "wandb":
            tracker.log_table("games", dataframe=table, step=step)
        elif self.name == "trackio":
            import trackio
            tracker.log({"games": trackio.Table(dataframe=table)}, step=step)
        else:  # tensorboard shows HTML; to_html escapes what models wrote
            tracker.log({"games": table.to_html(index=False)}, step=step)

    def finish(self):
        """Write what the tracker still holds."""
        for tracker in self.accelerator.trackers if self.accelerator else ():
            tracker.finish()  # end_training() would end the process group, too
