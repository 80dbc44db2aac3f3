"""Checkpoints as players: find them by name, order them by training, name who answers whom.

In cross-play each one attacks and defends. Constants of the stage come in as arguments."""
import collections
import hashlib
from pathlib import Path

from engine import adapters, models
from engine.run import STEP, brief, check_fields, die, locate, read_json, short

# A model. label: its name in tables and folders, e.g. "02_rl/step_000200". path: folder or hub id.
# style: asked by "turns" or its own "chat" template. cot: hidden thinking. digest: of its weights
Checkpoint = collections.namedtuple("Checkpoint", "label path style cot digest")


def sha(*parts):
    """16 hex digits that change when one of the parts (anything with a repr) does."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find_checkpoint(name, style, base_style):
    """A folder, "smollm2" or a hub id -> Checkpoint; a folder of step_* means its newest complete
    step. style: of our checkpoints; base_style: of other models; NAME@turns, NAME@chat: its own."""
    model, _, asked = name.rpartition("@")
    if asked in ("turns", "chat"):
        plain = find_checkpoint(model, style, base_style)
        return plain._replace(label=f"{plain.label}_{asked}", style=asked)
    if not name.strip():
        die("BASE, CHECKPOINTS or CROSSPLAY: an empty name: give a folder, smollm2 or a hub id")
    path = models.unpack_embedded() if name == models.EMBEDDED else locate(name)
    if path is None and not name.startswith(("checkpoints", "adapters/")):
        commit = models.check_hub(name)  # stops by itself
        return Checkpoint(Path(name).name, name, base_style, True, sha(name, commit))
    if path and not (path / "config.json").is_file() and not adapters.is_adapter(path):
        newest = max(path.glob(f"{STEP}/meta.json"), default=None)  # not of a .tmp folder
        path = newest.parent if newest else None
    if not path or not any(path.glob("*model*.safetensors")):
        die(f"{brief(name)}: no complete checkpoint: run 01_sft_warmup.py, then 02_selfplay_rl.py"
            + (", or python bench/claims.py" if name.startswith("adapters/") else ""))
    meta, constants = path / "meta.json", {}
    if meta.is_file() and read_json(meta).get("stage") != "engine":  # not the unpacked smollm2
        constants = read_json(meta, constants=dict)["constants"]
        check_fields(dict(COT=True) | constants, short(meta), dict(COT=bool))
    label = path.resolve().name
    if path.name.startswith("step_"):
        label = f"{path.resolve().parent.name}/{label}"
    return Checkpoint("base" if name == models.EMBEDDED else label, str(path),
                      style if "COT" in constants else base_style, constants.get("COT", True),
                      sha(models.fingerprint(path)))


def find_players(base, names, crossplay, style, base_style):
    """BASE, CHECKPOINTS and CROSSPLAY of the stage -> (base, the checkpoints, the players of
    cross-play in the order of training, [] where there is no cross-play)."""
    def find(text):
        words = filter(None, map(str.strip, text.split(",")))
        return [find_checkpoint(word, style, base_style) for word in words]

    checkpoints = find(names)
    base = find_checkpoint(base, style, base_style)
    players = list(checkpoints)
    for c in find("" if crossplay == "none" else crossplay):
        if c not in checkpoints:
            players.append(c)
    labels = [c.label for c in players]
    files = {answers_name(None, c, base) for c in [base, *players]}
    if not checkpoints or len(set(labels)) < len(labels) or len(files) < len({base, *players}):
        die(f"CHECKPOINTS={names} CROSSPLAY={crossplay}: one checkpoint at least, and no two "
            f"with one label, / and _ being the same ({', '.join(labels)}; BASE: {base.label})")
    for c in checkpoints:  # the base, asked otherwise, would meet itself
        if c.path == base.path and c != base:
            players.remove(c)
    crossed = crossplay != "none" and len(players) > 1
    return base, checkpoints, line_up(players, base) if crossed else []


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
    runs = [c.label.split("/")[0] for c in players]
    return sorted(players, key=lambda c: (c != base, runs.index(c.label.split("/")[0]), c.label))


def parent_of(checkpoint, others, before):
    """The one of `others` that a checkpoint came from, if possible asked alike; else `before`."""
    name = read_json(Path(checkpoint.path, "meta.json"), missing={}).get("parent", "")
    path = models.unpack_embedded() if name == models.EMBEDDED else locate(str(name))
    for other in sorted(others, key=lambda other: other.style != checkpoint.style):
        if path and Path(other.path).resolve() == path.resolve():
            return other
    return before


def histories(players, base, find_parent):
    """Which players are compared as late and early -> [(late label, [its parent's label, labels of
    its run's earlier steps])]. One for each run of steps among the players (in line_up order).
    find_parent: a player -> the player it was trained from, or None; then the last player outside
    all runs stands for it. Without runs: each player whose parent is there, with it alone."""
    runs, single = {}, []
    for c in players:
        if "/" in c.label:
            runs.setdefault(c.label.split("/")[0], []).append(c)
        elif c != base:
            single.append(c)
    lines = [] if runs else [[find_parent(c), c] for c in single if find_parent(c)]
    for steps in runs.values():
        parent = find_parent(steps[0])
        lines.append([parent, *steps] if parent else single[-1:] + steps)
    past = []
    for *earlier, late in lines:
        if earlier:
            past.append((late.label, [c.label for c in earlier]))
    return past
