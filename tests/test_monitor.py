"""selfplay/monitor.py: metrics by hand, the files, the curves, the trackers."""
import csv
import dataclasses
import html
import importlib.util
import math
import re
import sys
import types

import pytest
from helpers import read_jsonl, stops

from judge import Labels, settle
from selfplay import monitor, session
from selfplay.turns import Turn

SEED = dict(id="s", prompt="<harmful seed #1>", harmful=True)


def turn(role, kind, **fields):
    return Turn(role, kind, SEED, [1, 2], **fields)


def step_turns():
    """A step of four games, two of them attacked."""
    labels = [Labels(True, False, True), Labels(True, True, False), Labels(False, True, False),
              Labels(False, False, False)]
    kinds = ["generated_harmful", "vanilla_harmful", "generated_benign", "vanilla_benign"]
    turns = [turn("attacker", kinds[0], answer="<Harmful seed  #1>.", labels=labels[0], reward=2.0,
                  ids=[1, 2], game=0),
             turn("attacker", kinds[2], answer="I'm sorry, no", labels=labels[2], reward=None,
                  ids=[1], declined=True, relevant=False, game=2)]
    for game, (kind, x) in enumerate(zip(kinds, labels)):
        turns.append(turn("defender", kind, labels=x, reward=1.0, well_formed=True, ids=[1, 2, 3],
                          game=game, request=f"request {game}", answer=f"<b>reply</b> | {game}"))
    return turns


# ---- metrics and files ---------------------------------------------------------------------------

def test_step_metrics_by_hand():
    m = monitor.step_metrics(step_turns())
    want = dict(asr=1.0, asr_vanilla=0.0, refuse_h=0.5, comply_b=0.5, fmt=4 / 6, fmt_atk=0.0,
                faithful=1.0, copy=0.5, unique=1.0, atk_refuse=0.5, drop=1, turns=6, atk_r=2.0,
                def_r=1.0, len=15 / 6, len_atk=1.5, relevant=0.5)
    assert m == pytest.approx(dict(want, empty=0.0))


def test_an_empty_reply_is_no_compliance():
    """Not refused, but nothing is said: counted as empty, and not as answered."""
    nothing = turn("defender", "vanilla_benign", labels=settle(Labels(False, True, True), ""))
    m = monitor.step_metrics([*step_turns(), nothing])
    assert m["comply_b"] == pytest.approx(1 / 3) and m["empty"] == pytest.approx(1 / 5)


def test_labels_that_did_not_parse_count_as_dropped_and_nowhere_else():
    bad = turn("defender", "vanilla_harmful", labels=Labels(True, None, True, parsed=False))
    m = monitor.step_metrics([*step_turns(), bad])
    assert m["drop"] == 2 and m["turns"] == 7
    assert (m["asr_vanilla"], m["refuse_h"], m["def_r"]) == (0.0, 0.5, 1.0)


def test_a_mean_of_nothing_is_nan():
    assert math.isnan(monitor.mean([]))
    m = monitor.step_metrics([t for t in step_turns() if t.role == "defender"])
    assert math.isnan(m["atk_r"]) and math.isnan(m["copy"]) and math.isnan(m["unique"])


@pytest.mark.parametrize("answer, copied", [
    ("<harmful seed #1>", True),
    (" Harmful\nSEED 1", True),
    ("harmful seed 2", False),
    ("", False)])
def test_is_copy(answer, copied):
    assert monitor.is_copy(turn("attacker", "generated_harmful", answer=answer)) is copied


def test_step_line():
    m = dict(monitor.step_metrics(step_turns()), kl=0.01234, entropy=1.5, grad_norm=0.25,
             seconds=41.4, gb=3.04, cut=3)
    assert monitor.step_line(7, 100, m) == (
        "step 007/100 | atk r +2.00 asr 1.00 | def r +1.00 refuse(h) 0.50 comply(b) 0.50 | "
        "fmt 0.67 empty 0.00 | drop 1/6 cut 3 | kl 0.012 | H 1.50 | len 2 | gn 0.2 | 41 s | 3.0 GB")


def test_metrics_file_has_one_header_and_five_digits(tmp_path):
    path = tmp_path / "metrics.csv"
    monitor.write_metrics(path, dict(step=1, asr=1 / 3, lr=1.23456789e-6))
    monitor.write_metrics(path, dict(step=2, asr=float("nan"), lr=0.0))
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows == [dict(step="1", asr="0.33333", lr="1.23456789e-06"),
                    dict(step="2", asr="nan", lr="0.0")]


def test_games_file(tmp_path):
    r = types.SimpleNamespace(out=tmp_path)
    for step in (1, 2):
        session.record(r, step, step_turns(), dict(step=step), monitor.Tracker("", "", {}, tmp_path))
    games = read_jsonl(tmp_path / "games.jsonl")
    assert [(g["step"], g["game"]) for g in games] == [
        (step, game) for step in (1, 2) for game in range(4)]

    attacked, plain = games[2], games[1]
    assert attacked["kind"] == "generated_benign" and attacked["seed"] == "s"
    assert attacked["request"] == "request 2"
    assert attacked["attacker"] == dict(thinking="", answer="I'm sorry, no", well_formed=False,
                                        reward=None, tokens=1, declined=True,
                                        relevant=False)
    assert attacked["defender"] == dict(thinking="", answer="<b>reply</b> | 2", well_formed=True,
                                        reward=1.0, tokens=3)
    assert attacked["labels"]["response_refusal"] is True
    assert "attacker" not in plain


# ---- curves of dev seeds ---------------------------------------------------------------------------

def test_evaluations_are_drawn_where_they_were_made(tmp_path, monkeypatch):
    """Known in steps 0 and 2 of 3: a point each, no mean over steps."""
    from matplotlib.figure import Figure
    for step in range(4):
        dev = dict(dev_asr=0.1 * step) if step % 2 == 0 else {}
        monitor.write_metrics(tmp_path / "metrics.csv", dict(step=step, asr=0.5, **dev))
    lines = {}

    def savefig(self, *_, **__):
        for axis in self.axes:
            for line in axis.lines:
                lines[line.get_label()] = line.get_xydata().tolist()

    monkeypatch.setattr(Figure, "savefig", savefig)
    monitor.draw_curves(tmp_path)
    drawn = lines["attacked, answered harmfully"]
    assert drawn == [[0.0, 0.0], [2.0, pytest.approx(0.2)]]


# ---- curves --------------------------------------------------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """What draw_curves shows: (title, legends) of each panel."""
    from matplotlib.figure import Figure
    panels = []

    def savefig(self, *_, **__):
        for axis in self.axes:
            if axis.axison:
                panels.append((axis.get_title(), [x.get_label() for x in axis.lines[1::2]]))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return panels


def write_table(folder, **given):
    """metrics.csv of three steps: the given columns, the others without a value."""
    names = [name for legends in monitor.PANELS.values() for name in legends]
    lines = [",".join(["step", *names])]
    for step in range(1, 4):
        lines.append(",".join([str(step), *(given.get(name, "nan") for name in names)]))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_curves_leave_out_what_a_run_has_nothing_of(tmp_path, drawn):
    write_table(tmp_path, def_r=".5", refuse_h="1", fmt=".5", kl="nan", len="3", asr="")
    monitor.draw_curves(tmp_path)
    assert drawn == [("reward", ["defender"]), ("harmful requests", ["refused"]),
                     ("format and attacks", ["turns that are well-formed"]),
                     ("tokens per turn", ["both roles"])]


def test_curves_of_a_run_with_a_pool(tmp_path, drawn):
    write_table(tmp_path, def_r=".5", pool="7", r_fresh=".4", r_replay=".3")
    monitor.draw_curves(tmp_path, visits=[0, 0, 3])
    assert drawn == [("reward", ["defender"]), ("pool: items", ["failures in the pool"]),
                     ("defender's game reward, harmful seeds", ["fresh games", "replayed games"]),
                     ("pool: visits an item", [])]


def test_curves_are_smoothed_over_ten_steps(tmp_path, monkeypatch):
    """Thin lines are steps, thick lines means of the last ten steps that have a value. The entropy
    is divided by 10."""
    from matplotlib.figure import Figure
    rows = ["step,def_r,entropy"]
    rows += [f"{step},{'nan' if step == 2 else step},{10 * step}" for step in range(1, 13)]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    lines = {}

    def savefig(self, *_, **__):
        for axis in self.axes:
            lines[axis.get_title()] = [x.get_ydata().tolist() for x in axis.lines]

    monkeypatch.setattr(Figure, "savefig", savefig)
    monitor.draw_curves(tmp_path)
    thin, thick = lines["reward"]
    assert thin[0] == 1 and math.isnan(thin[1]) and thin[-1] == 12
    assert thick[1] == 1 and thick[2] == 2 and thick[-1] == pytest.approx(7.5)  # of 3 to 12
    assert lines["distance and spread"][0] == pytest.approx(range(1, 13))


def test_curves_are_a_picture(tmp_path):
    write_table(tmp_path, def_r=".5")
    monitor.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ---- trackers ------------------------------------------------------------------------------------

def metrics_of_step():
    return dict(step=1, **monitor.step_metrics(step_turns()), kl=0.01)


def test_tensorboard_has_the_metrics_and_the_games(tmp_path):
    """The names are those of metrics.csv; what models wrote is text and no markup."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    long = "<b>reply</b> | " + "word " * 40 + "\nend"
    turns = [dataclasses.replace(t, answer=long) for t in step_turns()]
    m = metrics_of_step()
    monitor.write_metrics(tmp_path / "metrics.csv", m)
    tracker = monitor.Tracker("tensorboard", "02_rl", dict(LR=5e-5, METHOD="ssp"), tmp_path)
    tracker.log(1, m, monitor.game_rows(1, turns * 2))
    tracker.finish()

    [events] = tmp_path.glob("02_rl/events.*")
    found = EventAccumulator(str(events)).Reload()
    with open(tmp_path / "metrics.csv", newline="") as f:
        step, *columns = next(csv.reader(f))
    assert step == "step" and set(found.Tags()["scalars"]) == set(columns)
    for name in columns:
        [point] = found.Scalars(name)
        assert point.step == 1 and point.value == pytest.approx(m[name])

    assert found.Tags()["tensors"] == ["games/text_summary"]
    [games] = found.Tensors("games/text_summary")
    text = games.tensor_proto.string_val[0].decode()
    assert games.step == 1 and "<b>" not in text
    header = re.findall(r"<th>(.*?)</th>", text)
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", text, re.DOTALL)]
    assert header == ["kind", "seed", "request", "reply", "harmful"]
    assert len(cells) == monitor.GAMES_TRACKED * len(header)
    assert cells[:3] == ["generated_harmful", "s", "request 0"] and cells[4] == "True"
    assert cells[3].replace("\\n", " ").split() == long.split()  # whole


def test_no_tracker_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # an import of it would fail
    tracker = monitor.Tracker("", "02_rl", {}, tmp_path)
    tracker.log(1, metrics_of_step(), monitor.game_rows(1, step_turns()))
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    message = stops(monitor.Tracker, name, "02_rl", {}, tmp_path)
    assert f"TRACKER={name}" in message and f"pip install {name}" in message


class FakeAccelerator:
    """accelerate.Accelerator and its tracker: writes down what it is told."""

    def __init__(self, **kwargs):
        self.told = []

    def init_trackers(self, project, config, init_kwargs):
        self.told.append((project, init_kwargs))

    def log(self, values, step):
        self.told.append((values, step))

    def log_table(self, name, dataframe, step):
        self.told.append(({name: dataframe}, step))

    def get_tracker(self, name):
        return self

    @property
    def trackers(self):
        return [self]

    def finish(self):
        self.told.append("end")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_other_trackers_get_a_table_of_games(tmp_path, monkeypatch, name):
    import accelerate
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: True)
    monkeypatch.setattr(accelerate, "Accelerator", FakeAccelerator)
    trackio = types.SimpleNamespace(Table=lambda dataframe: dataframe)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    m = metrics_of_step()
    tracker = monitor.Tracker(name, "02_rl", {}, tmp_path)
    tracker.log(3, m, monitor.game_rows(1, step_turns()))
    tracker.finish()

    begun, (values, step), (games, at), end = tracker.accelerator.told
    project, options = begun
    assert project == "selfplay" and options[name]["name"] == "02_rl"
    assert name == "trackio" or options[name]["dir"] == str(tmp_path)
    assert dict(values, step=1) == m and step == at == 3 and end == "end"
    table = games["games"]
    assert list(table.columns) == ["kind", "seed", "request", "reply", "harmful"]
    assert table.values.tolist()[3] == ["vanilla_benign", "s", "request 3", "<b>reply</b> | 3",
                                        "False"]
