"""Checkpoints as players: find them by name, order them by training, name who answers whom.

A checkpoint is a model in a folder or on the Hugging Face hub. In cross-play each one attacks and
defends. Constants of the stage come in as arguments.
"""
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from engine import models
from engine.run import die, locate


class Checkpoint(NamedTuple):
    """A model that is evaluated."""
    label: str   # its name in tables and folders, e.g. "02_rl/step_000200"
    path: str    # folder or hub id
    style: str   # how it is asked: "turns" (this repository's format) or "chat" (its own template)
    cot: bool    # it thinks before it answers
    digest: str  # changes when the checkpoint is trained anew


def sha(*parts):
    """16 hex digits that change when one of the parts (anything with a repr) does."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# ---- finding checkpoints -------------------------------------------------------------------------

def find_checkpoint(name, style, base_style):
    """A folder, "smollm2" or a hub id -> Checkpoint; a folder of step_* means its newest complete
    step. style: of this repository's checkpoints; base_style: of all other models."""
    path = models.unpack_embedded() if name == models.EMBEDDED else locate(name)
    parts, hint = Path(name).parts, ""
    if "01_sft" in parts:
        hint = ": run python 01_sft_warmup.py first"
    elif "02_rl" in parts:
        hint = ": run python 02_selfplay_rl.py first"
    if path is None and not hint:
        models.check_hub(name)  # stops by itself
        return Checkpoint(parts[-1], name, base_style, True, sha(name))
    if path and not (path / "config.json").is_file():
        steps = [p.parent for p in path.glob("step_*/meta.json") if p.parent.name[5:].isdigit()]
        path = max(steps, key=lambda step: int(step.name[5:]), default=None)
    if not (path and (path / "config.json").is_file() and any(path.glob("model*.safetensors"))):
        die(f"{name}: not found, or no complete checkpoint in it{hint}")
    file = path / "meta.json"
    file = file if file.is_file() else path / "config.json"  # of a model that is not ours
    constants = json.loads(file.read_text(encoding="utf-8")).get("constants", {})
    label = path.resolve().name
    if path.name.startswith("step_"):
        label = f"{path.resolve().parent.name}/{label}"
    return Checkpoint("base" if name == models.EMBEDDED else label, str(path),
                      style if "COT" in constants else base_style, constants.get("COT", True),
                      sha(file.read_bytes()))


def find_players(base, names, crossplay, style, base_style):
    """BASE, CHECKPOINTS and CROSSPLAY of the stage -> (base, the checkpoints, the players of
    cross-play in the order of training, [] where there is no cross-play)."""
    checkpoints, more = _words(names), [] if crossplay == "none" else _words(crossplay)
    found = {}  # the embedded model comes last: it may have to be unpacked
    for word in sorted({base, *checkpoints, *more}, key=lambda w: (w == models.EMBEDDED, w)):
        found[word] = find_checkpoint(word, style, base_style)
    base, checkpoints = found[base], [found[word] for word in checkpoints]
    players = checkpoints + [found[word] for word in more if found[word] not in checkpoints]
    labels = [c.label for c in players]
    files = {answers_name(None, c, base) for c in [base, *players]}
    if not checkpoints or len(set(labels)) < len(labels) or len(files) < len({base, *players}):
        die(f"CHECKPOINTS={names} CROSSPLAY={crossplay}: one checkpoint at least, and no two "
            f"with one label, / and _ being the same ({', '.join(labels)}; BASE: {base.label})")
    crossed = crossplay != "none" and len(players) > 1
    return base, checkpoints, line_up(players, base) if crossed else []


def _words(text):
    return [word.strip() for word in text.split(",") if word.strip()]


# ---- cross-play ----------------------------------------------------------------------------------

def answers_name(attacker, defender, base):
    """The file of a defender's answers to an attacker's attacks, in the attacker's folder, without
    its ending. Attacks on oneself and on the base are evaluated without cross-play too."""
    if defender == attacker:
        return "attacks_own"
    if defender == base:
        return "attacks_on_base"
    return "attacks_on_" + defender.label.replace("/", "_")


def line_up(players, base):
    """Players in the order of training: the base, then as given, steps of one run by number."""
    runs = list(map(_run, players))

    def place(c):
        digits = c.label.rpartition("/")[2].removeprefix("step_")
        return c != base, runs.index(_run(c)), int(digits) if digits.isdigit() else 0

    return sorted(players, key=place)


def _run(c):
    """The run that a checkpoint belongs to: its label without the step."""
    return c.label.rpartition("/")[0] or c.label


def parent_of(checkpoint, others, before):
    """The one of `others` that a checkpoint was trained from (by its meta.json), else `before`."""
    meta = Path(checkpoint.path) / "meta.json"
    name = json.loads(meta.read_text(encoding="utf-8")).get("parent", "") if meta.is_file() else ""
    path = models.unpack_embedded() if name == models.EMBEDDED else locate(name)
    for other in others:
        if path and Path(other.path).resolve() == path.resolve():
            return other
    return before


def histories(players, base, find_parent):
    """Which players are compared as late and early -> [(late label, [its parent's label, labels of
    its run's earlier steps])]. One for each run of steps among the players (in line_up order).
    find_parent: a player -> the player it was trained from, or None; then the last player outside
    all runs stands for it. Without runs: the last player and those before it."""
    runs, single = {}, []
    for c in players:
        if "/" in c.label:
            runs.setdefault(_run(c), []).append(c)
        elif c != base:
            single.append(c)
    lines = []
    for steps in runs.values():
        parent = find_parent(steps[0]) or (single[-1] if single else None)
        lines.append([parent, *steps] if parent else steps)
    if not runs:
        lines.append(single if len(single) > 1 else players)
    past = []
    for *earlier, late in lines:
        if earlier:
            past.append((late.label, [c.label for c in earlier]))
    return past
