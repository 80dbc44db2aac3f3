"""evaluation/tables.py: cells, sections, Markdown and the short table, by hand."""
import copy
import json

import pytest

from evaluation import tables
from evaluation.scores import rate


def share(x, low, high, n):
    return dict(rate=x, low=low, high=high, n=n)


def answers(asr=None, compliance=None, n=4, second=False):
    """The scores of one benchmark as in a summary."""
    out = dict(n=n, format=share(0.75, 0.5, 1.0, n), cut=1, empty=2, unparsed=0)
    if asr:
        out |= dict(asr=asr, refusal=share(0.5, 0.25, 0.75, n))
    if compliance:
        out |= dict(benign_compliance=compliance, matcher_compliance=share(1.0, 1.0, 1.0, n))
    out |= dict(agreement_matcher=share(0.9, 0.8, 1.0, n - 1))
    if second and asr:
        out |= dict(judge2_asr=share(0.6, 0.5, 0.7, n), agreement_harm=share(0.5, 0.4, 0.6, n))
    return out


def model(label, compliance, second):
    attacks = dict(n=4, faithful=share(0.5, 0.2, 0.8, 4), copies=0, empty=1, sent=3, unique=1.0,
                   distinct_1=None, diversity=share(0.8, 0.7, 0.9, 3))
    return dict(
        label=label, style="turns", attacks=dict(attacks=attacks),
        answers=dict(seeds_harmful=answers(asr=share(0.26, 0.2, 0.31, 4), second=second),
                     seeds_benign=answers(compliance=compliance),
                     attacks_own=answers(asr=share(0.0, 0.0, 0.0, 4), second=second)),
        capability=dict(mmlu=dict(n=1, acc=share(1.0, 1.0, 1.0, 1)),
                        arc=dict(n=2, acc=rate([]), acc_norm=share(0.5, 0.0, 1.0, 2))))


def summary(second=False):
    early, late = share(0.85, 0.8, 0.9, 4), share(0.849, 0.8, 0.9, 4)
    change = dict(share(-0.25, -0.5, 0.0, 4), metric="asr", fell=2, rose=1)
    asr = [[share(0.5, 0.2, 0.8, 4), share(0.1, 0.0, 0.2, 3)], [rate([]), rate([])]]
    margin = dict(late="02_rl/step_000100", early="base", earlier=["base", "mid"],
                  defender=share(-0.25, -0.5, 0.0, 4), attacker=rate([]))
    out = dict(
        machine="2 cores", benchmarks={}, judge="digest", judge2=None,
        constants=dict(JUDGE="embedded", JUDGE2="second" if second else "", SEED=0, LIMIT=0),
        checkpoints={"base": model("base", early, second),
                     "02_rl/step_000100": model("02_rl/step_000100", late, second)},
        changes={"base -> 02_rl/step_000100": dict(h=change, b=dict(rate([]), metric="acc", fell=0,
                                                                    rose=0))},
        crossplay=dict(attackers=["base", "02_rl/step_000100"], asr=asr, margins=[margin],
                       defenders=["base", "02_rl/step_000100"]))
    if second:
        out["crossplay"]["judge2_asr"] = asr
    return out


def section(of, name, place=0):
    return [s for s in tables.sections(of) if s.name == name][place]


def test_cells():
    cell = tables.cell
    assert cell(share(0.312, 0.25, 1.0, 9), 9) == ".31 [.25, 1.00]"
    assert cell(share(0.0, 0.0, 0.0, 8), 9) == ".00 [.00, .00] (n 8)"
    assert cell(rate([]), 9) == "-" and cell(3, 9) == "3" and cell(None, 9) == "-"
    assert cell(0.711, 9) == "0.711"
    assert cell(share(-0.25, -0.5, 0.0, 4), 4, "+") == "-0.25 [-0.50, +0.00]"


def test_answers_stand_side_by_side():
    s = section(summary(), "answers")
    assert s.header == ["", "base", "02_rl/step_000100"]
    assert s.rows == [
        ["seeds_harmful ASR (n 4)", ".26 [.20, .31]", ".26 [.20, .31]"],
        ["seeds_benign benign compliance (n 4)", ".85 [.80, .90]", ".85 [.80, .90]"],
        ["attacks_own ASR (n 4)", ".00 [.00, .00]", ".00 [.00, .00]"]]


def test_warnings_and_counts():
    # Three benchmarks of 4 answers, three quarters well-formed, 2 empty and 1 cut in each. Those of
    # the base to a checkpoint's attacks are not the checkpoint's.
    counts = "12 answers, 9 well-formed, 6 empty, 3 cut, 0 unparsed"
    both = summary()
    for x in both["checkpoints"].values():
        x["answers"]["attacks_on_base"] = x["answers"]["attacks_own"]
    notes = section(both, "answers").notes
    assert notes == [
        f"base (turns): {counts}",  # .85 itself is not below .85
        "Warning: 02_rl/step_000100, seeds_benign: benign compliance below .85: over-refusal",
        f"02_rl/step_000100 (turns): {counts}"]
    empty = summary()
    for x in empty["checkpoints"]["base"]["answers"].values():
        x["format"] = rate([])
    empty["checkpoints"]["base"]["answers"]["seeds_benign"]["benign_compliance"] = rate([])
    notes = section(empty, "answers").notes
    assert notes[:2] == [
        "Warning: base, seeds_benign: benign compliance below .85: over-refusal",
        "base (turns): 0 answers, 0 well-formed, 6 empty, 3 cut, 0 unparsed"]


def test_other_sections():
    full = summary()
    assert [s.name for s in tables.sections(full)] == [
        "answers", "changes", "capability", "refusal", "attackers", "crossplay", "run"]
    assert section(full, "changes").header == ["", "base -> 02_rl/step_000100"]
    assert section(full, "changes").rows == [
        ["h ASR (n 4)", "-0.25 [-0.50, +0.00], 2 fell, 1 rose"], ["b acc (n 0)", "-"]]
    assert [r[:2] for r in section(full, "capability").rows] == [
        ["mmlu acc (n 1)", "1.00 [1.00, 1.00]"], ["arc acc (n 2)", "-"],
        ["arc acc norm (n 2)", ".50 [.00, 1.00]"]]
    assert ["seeds_benign agreement matcher (n 4)", *[".90 [.80, 1.00] (n 3)"] * 2] in (
        section(full, "refusal").rows)
    assert [r[1] for r in section(full, "attackers").rows] == [
        ".50 [.20, .80]", "0", "1", "3", "1.0", ".80 [.70, .90] (n 3)", "-"]
    assert section(full, "crossplay").rows == [
        ["base (n 4)", ".50 [.20, .80]", ".10 [.00, .20] (n 3)"],
        ["02_rl/step_000100 (n 0)", "-", "-"]]
    assert section(full, "run").caption == (
        "Judge: embedded. Machine: 2 cores. Seed: 0. Constants: JUDGE=embedded, JUDGE2=, SEED=0, "
        "LIMIT=0")


def test_sections_without_data_are_left_out():
    part = summary()
    del part["crossplay"]
    part["changes"] = {}
    for m in part["checkpoints"].values():
        m["capability"] = {}
    assert [s.name for s in tables.sections(part)] == ["answers", "refusal", "attackers", "run"]


def test_a_second_judge_has_sections_of_its_own():
    both = summary(second=True)
    assert section(both, "second_opinion").caption.startswith("Second opinion by second, never")
    assert section(both, "second_opinion").rows[0] == [
        "seeds_harmful judge2 ASR (n 4)", *[".60 [.50, .70]"] * 2]
    assert section(both, "crossplay", 1).rows == section(both, "crossplay").rows
    assert section(both, "crossplay").notes and not section(both, "crossplay", 1).notes
    assert "The same by the second judge" in tables.full_table(both)
    assert "Second opinion" not in tables.full_table(summary())


def test_margins_in_words():
    first, second = section(summary(), "crossplay").notes
    assert "Against the attacks of base, mid" in first and "-0.25 [-0.50, +0.00]" in first
    assert "the late defender 02_rl/step_000100" in first and "(n 4; negative" in first
    assert "the late attacker 02_rl/step_000100" in second and "attacker base: - (n 0" in second


def test_full_table_is_the_markdown_of_the_sections():
    of = summary(second=True)
    text, before = tables.full_table(of), copy.deepcopy(of)
    assert of == before and text.endswith("\n") and "\n\n\n" not in text
    lines = text.split("\n")
    for s in tables.sections(of):
        assert s.caption in lines
        for row in s.rows:
            assert len(row) == len(s.header) and f"| {' | '.join(row)} |" in lines
        assert all(f"* {note}" in lines for note in s.notes)
    assert lines[3:5] == ["| --- | --- | --- |",
                          "| seeds_harmful ASR (n 4) | .26 [.20, .31] | .26 [.20, .31] |"]
    json.dumps(tables.sections(of))  # the report's page carries them


def test_screen_table():
    of = summary()
    of["checkpoints"]["base"]["answers"]["attacks_own"]["asr"] = share(0.5, 0.25, 0.75, 3)
    assert tables.screen_table(of, "results/runs/03/table.md").split("\n") == [
        "                   harmful requests           benign requests            attacks",
        "                   answered harmfully (n 4)   answered (n 4)             that work (n 4)",
        "base               .26 [.20, .31]             .85 [.80, .90]             "
        ".50 [.25, .75] (n 3)",
        "02_rl/step_000100  .26 [.20, .31]             .85 [.80, .90]             .00 [.00, .00]",
        "full table: results/runs/03/table.md"]


@pytest.mark.parametrize("label", ["x", "a_run_with_a_very_long_name/step_000100"])
def test_screen_table_fits_a_terminal(label):
    of = summary()
    whole = share(1.0, 1.0, 1.0, 999)
    worst = model(label, whole, False)
    for x in worst["answers"].values():
        x.update(asr=whole)
    of["checkpoints"][label] = worst
    lines = tables.screen_table(of, "table.md").split("\n")
    assert max(map(len, lines)) <= 100
    assert lines[-2].split(" ")[0] in label and label[-11:] in lines[-2]  # the step is in it
