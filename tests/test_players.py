"""evaluation/players.py: finding checkpoints, who takes part, names and order in cross-play."""
import json

import pytest
from helpers import stops

from engine import models, run
from evaluation import players
from evaluation.players import Checkpoint


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """The user's own checkpoints/ must not matter."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)


def make_checkpoint(folder, meta):
    """A folder that looks like a checkpoint; meta: what its meta.json says, None: it has none."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta or dict(constants={})))
    return folder


def find(name, style="turns", base_style="chat"):
    return players.find_checkpoint(str(name), style, base_style)


# ---- finding checkpoints

def test_steps_resolve_to_the_newest_complete_one(tmp_path):
    folder = tmp_path / "02_rl"
    for n in (20, 100):
        make_checkpoint(folder / f"step_{n:06d}", dict(constants=dict(COT=False)))
    make_checkpoint(folder / "step_000120", None)                                 # no meta.json yet
    make_checkpoint(folder / "step_000140.tmp", dict(constants=dict(COT=False)))  # not renamed yet
    newest = find(folder)
    assert newest[:4] == ("02_rl/step_000100", str(folder / "step_000100"), "turns", False)
    old = find(folder / "step_000020")
    assert old.label == "02_rl/step_000020" and old.digest == newest.digest  # here: one meta.json


def test_formats_come_from_meta_json(tmp_path):
    trained = make_checkpoint(tmp_path / "01_sft", dict(constants=dict(COT=True)))
    foreign = make_checkpoint(tmp_path / "other", None)
    embedded = make_checkpoint(tmp_path / "00_base", dict(stage="engine"))
    assert [find(x).style for x in (trained, foreign, embedded)] == ["turns", "chat", "chat"]
    assert find(trained).cot and find(foreign).cot
    merged = make_checkpoint(tmp_path / "m", dict(stage="engine/merge.py", constants=dict(COT=False)))
    assert (find(merged).style, find(merged).cot) == ("turns", False)  # as before it was merged
    assert find(trained, style="chat").style == "chat"
    assert find(foreign, base_style="turns").style == "turns"


def test_the_embedded_model_is_called_base(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "00_base", dict(stage="engine"))
    monkeypatch.setattr(models, "unpack_embedded", lambda: folder)
    assert find("smollm2")[:4] == ("base", str(folder), "chat", True)


def test_a_name_may_say_how_a_model_is_asked(tmp_path, monkeypatch):
    """The base by the turn prompt is a row of its own, and so is a checkpoint in plain chat."""
    base = make_checkpoint(tmp_path / "00_base", dict(stage="engine"))
    monkeypatch.setattr(models, "unpack_embedded", lambda: base)
    assert find("smollm2@turns")[:4] == ("base_turns", str(base), "turns", True)
    trained = make_checkpoint(tmp_path / "01_sft", dict(constants=dict(COT=True)))
    assert find(f"{trained}@chat")[:3] == ("01_sft_chat", str(trained), "chat")
    odd = make_checkpoint(tmp_path / "a@b", dict(constants=dict(COT=True)))
    assert find(odd).label == "a@b"


def test_the_digest_is_of_the_weights(tmp_path):
    """Trained anew, with the same constants in the same second."""
    folder = make_checkpoint(tmp_path / "01_sft", dict(constants={}))
    before = find(folder).digest
    (folder / "model.safetensors").write_bytes(b"other")
    assert find(folder).digest != before


def test_the_base_asked_otherwise_plays_no_cross_play(tmp_path, monkeypatch):
    """It is one model, so it would meet itself."""
    base = make_checkpoint(tmp_path / "00_base", dict(stage="engine"))
    trained = make_checkpoint(tmp_path / "01_sft", dict(constants=dict(COT=True)))
    monkeypatch.setattr(models, "unpack_embedded", lambda: base)
    _, checkpoints, crossed = players.find_players(
        "smollm2", f"smollm2,smollm2@turns,{trained}", "", "turns", "chat")
    assert [c.label for c in checkpoints] == ["base", "base_turns", "01_sft"]
    assert [c.label for c in crossed] == ["base", "01_sft"]


def test_the_parent_is_asked_in_the_same_way(tmp_path, monkeypatch):
    """Change by training: turns against turns. Change by the prompt: the base against itself."""
    base = make_checkpoint(tmp_path / "00_base", dict(stage="engine"))
    monkeypatch.setattr(models, "unpack_embedded", lambda: base)
    trained = find(make_checkpoint(tmp_path / "01_sft", dict(constants=dict(COT=True),
                                                            parent="smollm2")))
    plain, turns = find("smollm2"), find("smollm2@turns")
    assert players.parent_of(trained, [plain, turns], None) == turns
    assert players.parent_of(turns, [plain], plain) == plain
    assert players.parent_of(trained, [plain], None) == plain


def test_a_name_of_the_hub_is_checked_and_kept(monkeypatch):
    asked = []
    monkeypatch.setattr(models, "check_hub", asked.append)
    found = find("someone/Some-Model")
    assert found[:4] == ("Some-Model", "someone/Some-Model", "chat", True)
    assert asked == ["someone/Some-Model"] and found.digest != find("other/Some-Model").digest


@pytest.mark.parametrize("name, word", [
    ("checkpoints/01_sft", "run 01_sft_warmup.py"),
    ("checkpoints/02_rl", "02_selfplay_rl.py"),
    ("checkpoints/mine", "no complete checkpoint"), ("./mine", "not found")])
def test_a_missing_checkpoint_says_what_to_run(name, word):
    line = stops(find, name)
    assert name.split("/")[-1] in line and word in line


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_folder_without_weights_is_no_checkpoint(tmp_path, file):
    folder = make_checkpoint(tmp_path / "02_rl" / "step_000001", {})
    (folder / file).unlink()
    assert "no complete checkpoint" in stops(find, folder)


# ---- who takes part

@pytest.fixture
def folders(tmp_path):
    """{name: folder} of a base, a warm-up and three steps of the run rl."""
    made = {name: make_checkpoint(tmp_path / name, {}) for name in ("plain", "sft")}
    for n in (20, 40, 100):
        made[f"rl{n}"] = make_checkpoint(tmp_path / "rl" / f"step_{n:06d}", {})
    return {name: str(folder) for name, folder in made.items()}


def take_part(folders, base, names, crossplay):
    """Names of `folders`, spaces between -> labels of base, checkpoints, players."""
    names, crossplay = (" , ".join(folders.get(w, w) for w in text.split())
                        for text in (names, crossplay))
    base, *rest = players.find_players(folders[base], names, crossplay, "turns", "chat")
    return base.label, *([c.label for c in part] for part in rest)


def test_players_are_the_checkpoints_and_those_of_crossplay(folders):
    assert take_part(folders, "plain", "sft plain rl100", "rl40 rl20 sft") == (
        "plain", ["sft", "plain", "rl/step_000100"],
        ["plain", "sft", "rl/step_000020", "rl/step_000040", "rl/step_000100"])
    assert take_part(folders, "plain", "sft rl40", "") == (
        "plain", ["sft", "rl/step_000040"], ["sft", "rl/step_000040"])


@pytest.mark.parametrize("names, crossplay", [("sft rl40", "none"), ("sft", "")])
def test_without_crossplay_nobody_plays(folders, names, crossplay):
    assert take_part(folders, "plain", names, crossplay)[2] == []


def test_labels_are_different(folders, tmp_path):
    twin = make_checkpoint(tmp_path / "other" / "sft", {})
    alike = make_checkpoint(tmp_path / "rl_step_000020", {})
    for names, crossplay in (("sft sft", ""), (f"sft {twin}", ""), ("sft", str(twin)), ("", ""),
                             ("", "sft rl20"), (f"rl20 {alike}", "")):
        assert "one checkpoint at least" in stops(take_part, folders, "plain", names, crossplay)


def test_a_parent_is_found_by_its_folder(folders, tmp_path, monkeypatch):
    _, [sft, rl], _ = players.find_players(folders["plain"], f"{folders['sft']},{folders['rl40']}",
                                           "none", "turns", "chat")
    meta = tmp_path / "rl/step_000040/meta.json"
    for parent in (folders["sft"], "sft", "plain/../sft"):  # seen from the repository too
        meta.write_text(json.dumps(dict(parent=parent)))
        assert players.parent_of(rl, [rl, sft], None) is sft
    for parent in ("nowhere", folders["plain"]):
        meta.write_text(json.dumps(dict(parent=parent)))
        assert players.parent_of(rl, [rl, sft], "before") == "before"
    meta.unlink()
    assert players.parent_of(rl, [rl, sft], "before") == "before"
    monkeypatch.setattr(models, "unpack_embedded", lambda: tmp_path / "sft")
    meta.write_text(json.dumps(dict(parent="smollm2")))
    assert players.parent_of(rl, [rl, sft], None) is sft


# ---- cross-play

def player(label):
    return Checkpoint(label, label, "turns", True, "")


def test_names_of_the_answers_files():
    base, sft, late = map(player, ("base", "01_sft", "02_rl/step_000040"))
    pairs = ((base, base), (sft, sft), (sft, base), (base, sft), (sft, late))
    assert [players.answers_name(a, d, base) for a, d in pairs] == [
        "attacks_own", "attacks_own", "attacks_on_base", "attacks_on_01_sft",
        "attacks_on_02_rl_step_000040"]


def test_line_up_and_histories():
    base, sft, *steps = map(player, ("base", "01_sft", "rl/step_000100", "pilot/step_000040",
                                     "rl/step_000020"))
    order = players.line_up([sft, *steps, base], base)
    assert [c.label for c in order] == ["base", "01_sft", "rl/step_000020", "rl/step_000100",
                                        "pilot/step_000040"]

    def histories(of, parent=None):
        return players.histories(of, base, lambda c: parent)

    assert histories(order, sft) == [("rl/step_000100", ["01_sft", "rl/step_000020"]),
                                     ("pilot/step_000040", ["01_sft"])]
    assert histories(order) == histories(order, sft)
    assert histories(order, base)[1] == ("pilot/step_000040", ["base"])
    # the pilot has nobody before it
    assert histories(order[2:]) == [("rl/step_000100", ["rl/step_000020"])]
    assert histories(list(map(player, "xyz"))) == [] == histories([base, sft])
    assert histories([base, sft], base) == [("01_sft", ["base"])]
    arms = list(map(player, ("warmup", "selfplay", "zero_sum")))  # two of one parent
    got = players.histories(arms, base, lambda c: arms[0] if c != arms[0] else None)
    assert got == [("selfplay", ["warmup"]), ("zero_sum", ["warmup"])]
