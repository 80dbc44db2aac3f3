"""What a self-play run is watched by: figures of a step, its line, the games file, the curves.

All names are those of the step line and of results/RUN/metrics.csv.
"""
import csv
import dataclasses
import json
import re


def rate(items):
    """Mean of booleans or numbers; nan where there is none."""
    items = list(items)
    return sum(map(float, items)) / len(items) if items else float("nan")


def is_copy(t):
    """Is an attack its seed up to case, spaces, punctuation? Legal in the paper's game; logged."""
    return re.sub(r"\W+", "", t.answer).lower() == re.sub(r"\W+", "", t.seed["prompt"]).lower()


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
        atk_refuse=rate(t.declined for t in atk),
        drop=sum(t.reward is None for t in turns), turns=len(turns),
        len=rate(len(t.ids) for t in turns), len_atk=rate(len(t.ids) for t in atk))


def step_line(step, steps, m):
    """One line a step, fixed order, the names of metrics.csv."""
    return (f"step {step:03d}/{steps} | atk r {m['atk_r']:+.2f} asr {m['asr']:.2f} | "
            f"def r {m['def_r']:+.2f} refuse(h) {m['refuse_h']:.2f} "
            f"comply(b) {m['comply_b']:.2f} | fmt {m['fmt']:.2f} | drop {m['drop']}/{m['turns']} | "
            f"kl {m['kl']:.3f} | H {m['entropy']:.2f} | len {m['len']:.0f} | "
            f"gn {m['grad_norm']:.1f} | {m['seconds']:.0f} s | {m['gb']:.1f} GB")


def write_metrics(path, m):
    """Append a step's figures to metrics.csv, with the header where the file is new."""
    new = not path.exists()
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=m)
        if new:
            writer.writeheader()
        writer.writerow({k: round(v, 5) if isinstance(v, float) and k != "lr" else v
                         for k, v in m.items()})


def write_games(file, step, turns):
    """One JSON line a game: seed id, both turns, labels, rewards (harmful text: see README)."""
    attacks = {t.game: t for t in turns if t.role == "attacker"}
    for t in (t for t in turns if t.role == "defender"):
        row = dict(step=step, game=t.game, kind=t.kind, seed=t.seed["id"], request=t.shown,
                   labels=dataclasses.asdict(t.labels))
        for name, x in (("attacker", attacks.get(t.game)), ("defender", t)):
            if x:
                row[name] = dict(thinking=x.thinking, answer=x.answer, well_formed=x.well_formed,
                                 reward=x.reward, tokens=len(x.ids),
                                 **({"declined": x.declined} if name == "attacker" else {}))
        file.write(json.dumps(row) + "\n")


def draw_curves(folder, visits=()):
    """folder/metrics.csv as curves.png: thin lines are steps, thick lines means over 10 steps.
    visits: of each item the pool has had (METHOD=ssp), drawn as a histogram."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(folder / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    panels = {"reward": ["atk_r", "def_r"], "harmful requests": ["asr", "asr_vanilla", "refuse_h"],
              "benign requests": ["comply_b"],
              "format and attacks": ["fmt", "faithful", "unique", "copy", "atk_refuse"],
              "KL to the start (per token), entropy / 10": ["kl", "entropy"],
              "tokens per turn": ["len", "len_atk"]}
    if "pool" in rows[0]:
        panels.update({"pool: items": ["pool"], "pool: share mastered": ["mastered"],
                       "defender's game reward on harmful seeds": ["r_fresh", "r_replay"]})
    panels = {title: known for title, names in panels.items() if  # not what a run has nothing of
              (known := [n for n in names if any(r[n] not in ("", "nan") for r in rows)])}
    height = -(-(len(panels) + any(visits)) // 3)
    figure, axes = plt.subplots(height, 3, squeeze=False, figsize=(13, 3.3 * height),
                                constrained_layout=True)
    for axis in axes.flat[len(panels) + any(visits):]:
        axis.axis("off")
    if any(visits):
        axis = axes.flat[len(panels)]
        axis.hist(visits, bins=range(max(visits) + 2), align="left")
        axis.set_title("pool: visits an item", fontsize=10)
        axis.set_xlabel("visits")
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
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
