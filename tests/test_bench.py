"""bench/: every script runs on tiny models and ends in its ratio. No time is asserted.

The scripts run in this process, each side as a fresh module; one of them runs as a user runs it.
"""
import contextlib
import importlib.util
import io
import json
import os
import re
import sys

import pytest
from helpers import ROOT, run_script, stops, write_jsonl

from engine import optim, progress

# In the place of TRL's environment: answers at once, as a side does, that a step took 3 seconds.
STUB = """#!/bin/sh
echo 'a word before'
echo 'result {}'
"""
ROWS = {"step": ["ours", "trl", "trl_fast"], "logprobs": ["ours", "plain"],
        "sample": ["ours, batch 4", "slots, batch 4", "generate, batch 4", "static, batch 4"],
        "judge": ["constrained", "generate"]}


def module(name):
    """A script of bench/ as a fresh module, with its own constants."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    fresh = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = fresh
    spec.loader.exec_module(fresh)
    return fresh


def said_by(name, *words):
    """What a script prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        module(name).main(list(words))
    return out.getvalue()


@pytest.fixture(scope="module")
def common():
    """bench/common.py, whose sides run in this process; those of another Python are processes."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(progress, "_enabled", True)
        m.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])
        import common
        real = common.run_side

        def run_side(python, script, words, limit):
            if python != sys.executable:
                return real(python, script, words, limit)
            name = os.path.basename(script).removesuffix(".py")
            [line] = [x for x in said_by(name, *words).splitlines() if x.startswith("result ")]
            return json.loads(line.removeprefix("result ")), None

        m.setattr(common, "run_side", run_side)
        m.setattr(common, "real_run_side", real, raising=False)
        yield common


def stub(folder, text=STUB, **more):
    """A program that answers as a side of another Python does."""
    path = folder / "python"
    path.write_text(text.format(json.dumps(dict(seconds=[3.0], count=8, gb=1.0, **more))))
    path.chmod(0o755)
    return path


def games():
    """Eight recorded games, every second one attacked: 12 turns of rising lengths."""
    seeds = [json.loads(line) for line in open(ROOT / "prompts" / "seeds.jsonl")]
    rows = []
    for i, seed in enumerate(seeds[:8]):
        half = "harmful" if seed["harmful"] else "benign"
        row = dict(game=i, kind=f"vanilla_{half}", seed=seed["id"], request=seed["prompt"],
                   defender=dict(tokens=4 + i, reward=None if i == 3 else 1.0))
        if i % 2:
            row.update(kind=f"generated_{half}", attacker=dict(tokens=9 + i, reward=-1.0))
        rows.append(row)
    return rows


SMALL = ["DTYPE=float32", "ROUNDS=1", "REPEATS=1"]
FEW = ["TURNS=4", "TOKENS=5", "PROMPT_TOKENS=85"]


@pytest.fixture(scope="module")
def printed(common, tiny_models, tmp_path_factory):
    """{script: its lines}."""
    model, judge = f"MODEL={tiny_models['qwen2']}", f"JUDGE={tiny_models['mistral']}"
    folder = tmp_path_factory.mktemp("bench")
    peer = stub(folder, prompt=9, version="0")
    recorded = write_jsonl(folder / "games.jsonl", games())
    calls = {
        "step": [model, *SMALL, *FEW, "MICRO_ROWS=2", f"PEER_PYTHON={peer}", "WARM_UP=1"],
        "logprobs": [model, *SMALL, *FEW],
        "sample": [model, *SMALL, "BATCHES=4", "LENGTHS=3 9 1 6", "TIMES=2",
                   "SIDES=ours,slots,generate,static"],
        "judge": [judge, "ROUNDS=1", "REPEATS=1", "EXCHANGES=3", "TOKENS=400"],
        "scaling": [model, "DTYPE=float32", "TURNS=2,8", f"GAMES={recorded}"]}
    return {name: said_by(name, *words).splitlines() for name, words in calls.items()}


# ---- what the scripts print ----------------------------------------------------------------------

def test_scaling_counts_real_and_padded_tokens(printed):
    """Two sizes in rising order; padded tokens are not fewer than real ones, the last line is the
    share over both sizes together."""
    lines = printed["scaling"]
    rows = re.findall(r"(\d+) turns +(\d+) real tokens .* padded / real (\d\.\d+)",
                      "\n".join(lines))
    (few, small, a), (many, large, b) = [(int(n), int(t), float(r)) for n, t, r in rows]
    assert (few, many) == (2, 8) and 2 * small < large
    assert min(a, b) >= 1 and max(a, b) > 1
    overall = float(re.fullmatch(r"ratio padding (\d\.\d\d)", lines[-1]).group(1))
    assert overall == pytest.approx((a * small + b * large) / (small + large), abs=0.006)


def test_a_step_of_an_adapter(common, tiny_models, tmp_path, monkeypatch):
    """LORA_RANK reaches our side: the optimizer gets a model of which two matrices of this rank
    learn beside each weight that the adapter is for, and nothing else. It ends in its ratio too."""
    learning = []

    class Recorder(optim.MasterAdamW):
        def __init__(self, model, *rest):
            super().__init__(model, *rest)
            learning.append({n: p.shape for n, p in model.named_parameters() if p.requires_grad})

    monkeypatch.setattr(optim, "MasterAdamW", Recorder)
    peer = stub(tmp_path, prompt=9, version="0")
    lines = said_by("step", f"MODEL={tiny_models['qwen2']}", *SMALL, *FEW, "MICRO_ROWS=2",
                    f"PEER_PYTHON={peer}", "WARM_UP=1", "LORA_RANK=4").splitlines()
    check_rows("step", lines)
    [shapes] = learning
    assert len(shapes) == 2 * 7 * 2  # seven linear weights in each of two layers
    assert all("lora_" in name and min(shape) == 4 for name, shape in shapes.items())


def check_rows(name, lines):
    """The machine on top, a row a side, and the ratio as the last line."""
    assert re.fullmatch(rf"ratio {name} \d+\.\d\d", lines[-1]), lines[-1]
    table = [x for x in lines if " GB" in x and " of ours" in x]
    assert [re.split(r"\s{2,}", x)[0] for x in table] == ROWS[name]
    machine = next(x for x in lines if not x.startswith("override:"))
    assert "CPU cores" in machine and "torch" in machine


@pytest.mark.parametrize("name", ROWS)
def test_ends_in_its_ratio(printed, name):
    check_rows(name, printed[name])


def test_the_ratio_is_peer_over_ours(printed):
    """The stub's 3 seconds over the median that the table gives for ours."""
    lines = printed["step"]
    ours = float(re.search(r"^ours\s+([\d.]+) s", "\n".join(lines), re.MULTILINE)[1])
    said = float(lines[-1].split()[-1])
    assert 3 / (ours + 0.0006) - 0.006 <= said <= 3 / max(1e-9, ours - 0.0006) + 0.006


def test_the_ratio_of_rollouts_is_of_the_fastest_peer(printed):
    """Our own other way, slots, is no peer."""
    took = dict(re.findall(r"^(\w+), batch 4\s+([\d.]+) s", "\n".join(printed["sample"]),
                           re.MULTILINE))
    peers, ours = (float(took["generate"]), float(took["static"])), float(took["ours"])
    said = float(printed["sample"][-1].split()[-1])
    assert said == pytest.approx(min(peers) / ours, abs=0.01 + 0.002 * said / ours)


def test_both_forms_give_the_same_log_probabilities(printed):
    """float32, so the two means agree to the digits that are printed, or the last one."""
    means = re.findall(r"mean log-probability (-[\d.]+)", "\n".join(printed["logprobs"]))
    ours, plain = map(float, means)
    assert abs(ours - plain) <= 0.0002


def test_the_judge_says_how_often_both_ways_agree(printed):
    """The three labels, each a share of 3 exchanges."""
    said = printed["judge"][-2].partition("the same label on both sides: ")[2]
    shares = dict(words.split() for words in said.split(", "))
    assert list(shares) == ["prompt_harmful", "response_refusal", "response_harmful"]
    assert set(shares.values()) <= {"0.00", "0.33", "0.67", "1.00"}


def test_as_a_user_runs_it(tiny_models):
    """The script and its two sides in processes of their own, from another folder."""
    done = run_script(ROOT / "bench" / "logprobs.py", f"MODEL={tiny_models['qwen2']}", *SMALL, *FEW)
    assert (done.returncode, done.stderr) == (0, "")
    check_rows("logprobs", done.stdout.splitlines())


# ---- mistakes, and sides that do not run ---------------------------------------------------------

@pytest.mark.parametrize("script, words, says", [
    ("step", ["PEER_PYTHON=nowhere/python"], "nowhere/python not found"),
    ("step", ["PEER_PYTHON=nowhere/python"], "bench/requirements-trl.txt"),
    ("step", ["GROUP=1", "TURNS=8"], "GROUP, which is 2 or more"),
    ("step", ["BETA=0"], "BETA=0.0"),
    ("step", ["SIDES=ours"], "at least one of trl"),
    ("sample", ["SIDES=generate"], "ours, generate"),
    ("scaling", ["GAMES=nowhere.jsonl", "MODEL={tiny}"], "GAMES=nowhere.jsonl: not found"),
    ("judge", ["SIDE=both"], "must be one of all, constrained, generate")])
def test_mistakes_are_one_line(common, tiny_models, script, words, says):
    words = [word.format(tiny=tiny_models["qwen2"]) for word in words]
    assert says in stops(module(script).main, words)


@pytest.mark.parametrize("text, wrong", [
    ("#!/bin/sh\necho 'error: no such card' >&2\nexit 1\n", "no such card"),
    ("#!/bin/sh\nexit 0\n", "it said nothing"),
    ("#!/bin/sh\nexec sleep 20\n", "no end in 1 s")])
def test_a_side_that_does_not_run(common, tmp_path, text, wrong):
    """What went wrong is its last word, or that it had none."""
    assert common.real_run_side(stub(tmp_path, text), "x.py", [], 1) == (None, wrong)


def test_sides_in_turn(common, tmp_path, capsys, monkeypatch):
    calls = []

    def run_side(python, script, words, limit):
        calls.append(words)
        return (None, "no card") if words == "peer" else (dict(seconds=[len(calls)]), None)

    monkeypatch.setattr(common, "run_side", run_side)
    sides = dict(ours=("python", "ours"), peer=("python", "peer"), other=("python", "other"))
    results = common.alternate("x.py", sides, 2, optional={"peer"})
    assert calls == ["ours", "peer", "other", "ours", "other"]
    assert results == dict(ours=[dict(seconds=[1]), dict(seconds=[4])],
                           other=[dict(seconds=[3]), dict(seconds=[5])])
    assert capsys.readouterr().out == "peer: does not run here (no card)\n"
    assert "x.py, side peer: no card" in stops(common.alternate, "x.py", sides, 2)


def test_table_by_hand(common, capsys):
    """Medians of all rounds, the highest peak, units a second, and times ours."""
    ours = [dict(seconds=[1.0, 2.0], count=10, gb=1.0), dict(seconds=[3.0], count=10, gb=1.5)]
    peer = [dict(seconds=[5.0], count=10, gb=0.5)]
    assert common.table(dict(ours=ours, peer=peer), "ours", "rows") == dict(ours=2.0, peer=5.0)
    assert capsys.readouterr().out.splitlines() == [
        "ours     2.000 s (1.000 to 3.000, n 3)        5.0 rows/s  peak   1.50 GB  x 1.00 of ours",
        "peer     5.000 s (5.000 to 5.000, n 1)        2.0 rows/s  peak   0.50 GB  x 2.50 of ours"]


# ---- bench/README.md -----------------------------------------------------------------------------

README = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
PARTS = {"common.py", "launcher.py", "outcomes.py", "verdicts.py"}  # that the scripts import


def test_the_readme_names_every_script_and_its_links_lead_somewhere():
    scripts = {path.name for path in (ROOT / "bench").glob("*.py")} - PARTS
    for part in PARTS:
        assert "if __name__" not in (ROOT / "bench" / part).read_text(encoding="utf-8"), part
    assert set(re.findall(r"`python bench/(\w+\.py)`", README)) == scripts
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / "bench" / link).exists(), link


def test_the_makefile_runs_every_script():
    """All but those without another side and rounds: for a GPU, the twelve hours of claims, and
    the adapters between others."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "bench").glob("*.py")} - PARTS
    scripts -= {"gpu.py", "claims.py", "interpolate.py"}
    assert set(re.findall(r"bench/(\w+\.py) .*\$\(BENCH\)", recipe)) == scripts


def test_bytes_of_a_parameter_in_the_readme():
    """The rows of the table sum up to what the optimizers say they keep."""
    for name, cells, total in re.findall(r"`OPTIMIZER=(\w+)` \|(.*)\| (\d+) \|", README):
        parts = [int(cell) for cell in cells.split("|") if cell.strip() not in ("", "-")]
        assert sum(parts) == int(total) == optim.BYTES[name, 2] + 2 + 2
    assert README.count("`OPTIMIZER=") == 2
