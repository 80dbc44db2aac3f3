"""evaluation/crossplay.py: outcomes, matrix and margins by hand, and the files it reads."""
import collections
import json

import pandas
import pytest

from evaluation import crossplay
from evaluation.scores import rate

Checkpoint = collections.namedtuple("Checkpoint", "label path style", defaults=["turns"])


def test_outcomes_keep_failed_and_unparsed_attacks_apart():
    rows = [dict(id="1", answer="<a>"), dict(id="2", answer=""), dict(id="3", answer="<b>"),
            dict(id="4", answer="<c>")]
    labels = [dict(id="1", response_harmful=True), dict(id="3", response_harmful=None),
              dict(id="4", response_harmful=False)]
    found = crossplay.outcomes(rows, labels)
    assert list(found.index) == ["1", "2", "3", "4"]
    assert found[["1", "2", "4"]].tolist() == [1, 0, 0] and found.isna().tolist() == [
        False, False, True, False]
    with pytest.raises(KeyError):  # an attack with text that nobody labelled is a mistake
        crossplay.outcomes(rows, labels[:2])


def game(**by_seed):
    return pandas.Series(by_seed, dtype=float)


GAMES = {  # attacker: defender: seed: harmful answer?
    "early": {"early": game(a=True, b=True, c=False, d=None),
              "late": game(a=False, b=True, c=False, d=True)},
    "late": {"early": game(a=True, b=True, c=True, d=True),
             "late": game(a=True, b=False, c=False, d=False)}}


def test_matrix_and_margins_by_hand():
    out = crossplay.cross(GAMES, ["early", "late"], [("late", ["early"])])
    assert out["attackers"] == out["defenders"] == ["early", "late"]
    assert [[x["rate"] for x in row] for row in out["asr"]] == [
        [pytest.approx(2 / 3), 0.5], [1.0, 0.25]]
    assert out["asr"][0][0]["n"] == 3
    [m] = out["margins"]
    # Seeds a, b, c: d is unlabelled in early on early. Late defender minus early one: -1, 0, 0.
    assert m["defender"] == rate([-1, 0, 0])
    # Late attacker minus early one, on the early defender: 0, 0, +1.
    assert m["attacker"] == rate([0, 0, 1])
    json.dumps(out)


def test_margin_of_several_earlier_attackers_is_their_mean():
    games = {**GAMES, "mid": {"early": game(a=False, b=False, c=False, d=True),
                              "late": game(a=False, b=True, c=False, d=False)}}
    m = crossplay.margins(games, "late", ["early", "mid"])
    # By seed, early's and mid's difference: a -1 and 0, b 0 and +1, c 0 and 0; d is unlabelled.
    assert m["defender"] == rate([-0.5, 0.5, 0])
    assert m["earlier"] == ["early", "mid"] and games["early"]["late"]["a"] == 0  # unchanged


def test_cross_play_reads_the_files_of_every_pair(tmp_path):
    """A base that obeys, and two steps of a run that was trained from it."""
    for name in ("base", "run/step_000001", "run/step_000002"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "meta.json").write_text(json.dumps(dict(parent=str(tmp_path / "base"))))
    base, early, late = players = [Checkpoint(x, str(tmp_path / x)) for x in (
        "base", "run/step_000001", "run/step_000002")]
    names = {(base, base): "attacks_own", (base, early): "attacks_on_run_step_000001",
             (base, late): "attacks_on_run_step_000002", (early, base): "attacks_on_base",
             (early, early): "attacks_own", (early, late): "attacks_on_run_step_000002",
             (late, base): "attacks_on_base", (late, early): "attacks_on_run_step_000001",
             (late, late): "attacks_own"}
    folders = {p.label: tmp_path / "results" / p.label for p in players}
    for (attacker, defender), name in names.items():
        folder = folders[attacker.label]
        folder.mkdir(parents=True, exist_ok=True)
        sent = [dict(id="s1", answer="<attack>"), dict(id="s2", answer="" if attacker is early
                                                       else "<attack>")]
        (folder / "attacks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sent))
        for suffix in ("labels", "labels2"):
            harmful = defender is base or suffix == "labels2"
            (folder / f"{name}.{suffix}.jsonl").write_text("".join(
                json.dumps(dict(id=r["id"], response_harmful=harmful)) + "\n"
                for r in sent if r["answer"]))
    out = crossplay.cross_play(players, folders, base)
    assert [[x["rate"] for x in row] for row in out["asr"]] == [
        [1, 0, 0], [0.5, 0, 0], [1, 0, 0]]
    assert {x["n"] for row in out["asr"] for x in row} == {2}
    assert [(m["late"], m["earlier"]) for m in out["margins"]] == [
        ("run/step_000002", ["base", "run/step_000001"])]  # the base is the parent by meta.json
    assert "judge2_asr" not in out
    out = crossplay.cross_play(players, folders, base, second=True)
    assert [[x["rate"] for x in row] for row in out["judge2_asr"]] == [
        [1, 1, 1], [0.5, 0.5, 0.5], [1, 1, 1]]
    assert out["asr"][0][1]["rate"] == 0


def test_heat_map_is_a_picture_with_the_same_bytes(tmp_path):
    out = crossplay.cross(GAMES, ["early", "late"], [])
    full = dict(out, asr=[list(row) for row in out["asr"]])
    out["asr"][1][1] = rate([])  # nothing parsed
    for name, what in dict(a=out, b=out, c=full).items():
        crossplay.heat_map(tmp_path / f"{name}.png", what)
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    assert a.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and len(a.read_bytes()) > 5000
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
