"""engine/run.py: constants as the interface, meta.json, results folders, paths, resume."""
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest
from helpers import keep_constants, stops

from engine import progress, run

SCRIPTS = ("01_sft_warmup", "02_selfplay_rl", "03_evaluate", "judge", "judge_adapter.train")

FAKE = f'''"""A fake stage.

    python 09_fake.py
"""
import sys
from typing import Literal

from engine.run import Share, configure

{run.RULER}
MODEL = "smollm2"         # any model
STEPS = 20                # rollouts (ours)
LIMIT = 0                 # 0: all
LR = 1e-5                 # peak (ours)
ATTACKED: Share = 0.5     # share of the seeds
ROLES: Literal["both", "attacker", "defender"] = "both"  # who learns
COT = True                # hidden thinking
BATCH = 4                 # rows at a time (hardware)
DTYPE: Literal["auto", "float32"] = "auto"  # of the weights (hardware)
COLOUR = "red"            # of the bar (display)
PAPER = dict(STEPS=200, MODEL="Qwen/Qwen2.5-7B-Instruct")
{run.RULER}
TABLE = dict(a=1)
lower = 3

if __name__ == "__main__":
    configure(globals(), sys.argv[1:])
    print("went on")
'''
DEFAULTS = dict(MODEL="smollm2", STEPS=20, LIMIT=0, LR=1e-5, ATTACKED=0.5, ROLES="both", COT=True,
                BATCH=4, DTYPE="auto", COLOUR="red")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The globals() of the fake stage; it lies in tmp_path."""
    (tmp_path / "09_fake.py").write_text(FAKE)
    spec = importlib.util.spec_from_file_location("fake_stage", tmp_path / "09_fake.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_stage", module)
    monkeypatch.setattr(progress, "_enabled", True)  # configure sets it
    spec.loader.exec_module(module)
    return vars(module)


def python(*words, cwd):
    """A process of this Python that finds engine/; nothing is printed but by its script."""
    return subprocess.run([sys.executable, *words], cwd=cwd, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(run.ROOT)}, timeout=60)


# ---- constants -----------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, changed", [
    ([], {}),
    (["STEPS=7"], dict(STEPS=7)),
    (["STEPS=1"], dict(STEPS=1)),
    (["STEPS=2147483647"], dict(STEPS=2 ** 31 - 1)),
    (["LIMIT=0"], dict(LIMIT=0)),
    (["LIMIT=3"], dict(LIMIT=3)),
    (["LR=3e-6"], dict(LR=3e-6)),
    (["LR=1"], dict(LR=1.0)),
    (["LR=0"], dict(LR=0.0)),
    (["ATTACKED=0"], dict(ATTACKED=0.0)),
    (["ATTACKED=1"], dict(ATTACKED=1.0)),
    (["COT=false"], dict(COT=False)),
    (["COT=False"], dict(COT=False)),
    (["COT=0"], dict(COT=False)),
    (["COT=1"], dict(COT=True)),
    (["MODEL=a/b=c"], dict(MODEL="a/b=c")),
    (["MODEL=12"], dict(MODEL="12")),
    (["COLOUR="], dict(COLOUR="")),
    (["ROLES=attacker", "STEPS=2"], dict(ROLES="attacker", STEPS=2)),
    (["--paper"], dict(STEPS=200, MODEL="Qwen/Qwen2.5-7B-Instruct")),
    (["--paper", "STEPS=3"], dict(STEPS=3, MODEL="Qwen/Qwen2.5-7B-Instruct")),
    (["STEPS=3", "--paper"], dict(STEPS=3, MODEL="Qwen/Qwen2.5-7B-Instruct")),
])
def test_configure_sets(fake, capsys, argv, changed):
    run.configure(fake, argv)
    want = {**DEFAULTS, **changed}
    got = run.constants(fake)
    assert got == want
    assert [type(got[k]) for k in want] == [type(v) for v in want.values()]
    printed = capsys.readouterr().out
    for word in argv:  # every override is printed
        assert word == "--paper" or f"{word.partition('=')[0]} = " in printed
    assert ("Qwen/Qwen2.5-7B-Instruct" in printed) == ("--paper" in argv)


def test_a_recipe_without_a_gpu_is_said(fake, capsys, monkeypatch):
    """A driver that is too old, or torch without CUDA: the run would go on, on the CPU, for weeks."""
    for there, plan_only, warns in ((False, False, True), (True, False, False), (False, True, False)):
        monkeypatch.setattr("torch.cuda.is_available", lambda: there)
        run.configure(dict(fake, PLAN_ONLY=plan_only), ["--paper"])
        assert ("torch finds none" in capsys.readouterr().out) is warns


@pytest.mark.parametrize("argv, says", [
    # names: the nearest one is said
    (["STEP=3"], ["'STEP'", "nearest: STEPS", "09_fake.py --help"]),
    (["ROLE=both"], ["'ROLE'", "nearest: ROLES"]),
    (["modle=x"], ["'modle'", "nearest: MODEL"]),
    (["lower=4"], ["'lower'"]),
    (["TABLE=4"], ["'TABLE'"]),
    (["PAPER=4"], ["'PAPER'"]),
    (["STEPS"], ["STEPS"]),
    (["--papre"], ["--papre"]),
    (["--STEPS=3"], ["--STEPS"]),
    # types
    (["STEPS=many"], ["STEPS", "'many'", "int"]),
    (["STEPS=2.5"], ["STEPS", "int"]),
    (["STEPS="], ["STEPS", "int"]),
    (["LR=fast"], ["LR", "float"]),
    (["ATTACKED=half"], ["ATTACKED", "float"]),
    (["COT=maybe"], ["COT", "bool"]),
    (["COT=2"], ["COT", "bool"]),
    # whole numbers: 1 or more; 0 or more where the default is 0
    (["STEPS=0"], ["STEPS=0", "from 1 to 2147483647"]),
    (["STEPS=-3"], ["STEPS=-3", "from 1 to"]),
    (["STEPS=2147483648"], ["STEPS=2147483648", "from 1 to 2147483647"]),
    (["LIMIT=-1"], ["LIMIT=-1", "from 0 to 2147483647"]),
    # other numbers: finite and not negative
    (["LR=-1e-5"], ["LR=-1e-05", "finite", "0 or more"]),
    (["LR=nan"], ["LR=nan", "finite"]),
    (["LR=inf"], ["LR=inf", "finite"]),
    # the annotation
    (["ATTACKED=1.01"], ["ATTACKED=1.01", "from 0.0 to 1.0"]),
    (["ATTACKED=-0.1"], ["ATTACKED=-0.1", "from 0.0 to 1.0"]),
    (["ATTACKED=nan"], ["ATTACKED=nan", "from 0.0 to 1.0"]),
    (["ROLES=nobody"], ["ROLES='nobody'", "both, attacker, defender"]),
    (["ROLES="], ["ROLES=''", "both, attacker, defender"]),
])
def test_configure_refuses(fake, argv, says):
    text = stops(run.configure, fake, argv)
    for words in says:
        assert words in text


@pytest.mark.parametrize("name, good", [
    ("demo_02", True), ("a.b-c", True), ("7", True), ("", False), (".hidden", False),
    ("../up", False), ("a/b", False), ("two words", False), ("-x", False), ("a,b", False)])
def test_a_run_is_the_name_of_a_folder(fake, name, good):
    fake["RUN"] = "02_rl"
    if good:
        run.configure(fake, [f"RUN={name}"])
        assert fake["RUN"] == name
        return
    assert f"RUN={name!r}" in stops(run.configure, fake, [f"RUN={name}"])


def test_a_bad_paper_block_is_refused_too(fake):
    fake["PAPER"] = dict(ROLES="nobody")
    assert "ROLES='nobody'" in stops(run.configure, fake, ["--paper"])


def test_configure_without_paper_block(fake):
    del fake["PAPER"]
    assert "09_fake.py has no --paper block" in stops(run.configure, fake, ["--paper"])


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_configure_help(fake, capsys, word):
    with pytest.raises(SystemExit) as end:
        run.configure(fake, ["STEPS=3", word])
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert printed.startswith("A fake stage.") and "python 09_fake.py" in printed
    for name in (*DEFAULTS, "PAPER"):
        assert re.search(rf"^{name}(: .*)? = ", printed, re.MULTILINE), name
    assert "===" not in printed and "TABLE" not in printed


def test_as_a_script(fake, tmp_path):
    """The annotations of __main__ count too; a mistake is one line on stderr and exit code 1."""
    done = python("09_fake.py", "ATTACKED=2", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: ATTACKED=2.0: must be from 0.0 to 1.0\n"
    done = python("09_fake.py", "ATTACKED=1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "went on"


@pytest.mark.parametrize("name", SCRIPTS)
def test_constants_of_every_script(name, capsys, monkeypatch):
    """Both blocks keep to the rules beside the constants. What can be given is what --help shows:
    an imported name is no constant of the script."""
    module = importlib.import_module(name)
    keep_constants(monkeypatch, module)
    scope = dict(vars(module))
    names = set(run.constants(scope))
    run.configure(scope, [])
    assert run.constants(scope) == run.constants(vars(module))
    for flag, block in run.RECIPES.items():
        if block in scope:
            run.configure(scope, [flag])
            assert set(scope[block]) <= names
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run.configure(scope, ["--help"])
    shown = re.findall(r"^([A-Z][A-Z_0-9]*)(?:: .*)? = ", capsys.readouterr().out, re.MULTILINE)
    assert set(shown) - set(run.RECIPES.values()) == names


# ---- meta.json -----------------------------------------------------------------------------------

def test_make_meta(fake, monkeypatch, tmp_path):
    import torch
    import transformers
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "b.txt").write_text("y")
    (tmp_path / "prompts" / "a.txt").write_text("x")
    monkeypatch.setattr(run, "PROMPTS", tmp_path / "prompts")
    run.configure(fake, ["STEPS=3"])
    meta = run.make_meta(fake, run.ROOT / "checkpoints" / "01_sft")
    assert meta["stage"] == fake["__file__"] and meta["parent"] == "checkpoints/01_sft"
    assert meta["constants"] == {**DEFAULTS, "STEPS": 3}
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"x", b"y"))
    assert meta["prompts_sha256"] == hashlib.sha256(
        f"a.txt {one}\nb.txt {two}\n".encode()).hexdigest()
    assert meta["versions"] == dict(torch=torch.__version__, transformers=transformers.__version__,
                                    python=".".join(map(str, sys.version_info[:3])))
    assert meta["machine"] == run.machine() and "\n" not in meta["machine"]
    assert abs(time.time() - time.mktime(time.strptime(meta["time"], "%Y-%m-%d %H:%M:%S"))) < 60
    assert meta["command"] == run.command()
    assert json.loads(json.dumps(meta)) == meta


@pytest.mark.parametrize("words, typed", [
    (["tool.py", "STEPS=3", "SEEDS=two words.jsonl"],
     "python {here}/tool.py STEPS=3 'SEEDS=two words.jsonl'"),
    (["-m", "room.tool", "STEPS=3"], "python -m room.tool STEPS=3")])
def test_command_is_what_a_user_types(tmp_path, words, typed):
    (tmp_path / "room").mkdir()
    for path in (tmp_path / "tool.py", tmp_path / "room" / "tool.py"):
        path.write_text("from engine import run\nprint(run.command())\n")
    done = python(*words, cwd=tmp_path)
    assert done.stdout.strip() == typed.format(here=tmp_path.resolve()), done.stderr


def test_command_of_a_script_of_the_repository(tmp_path):
    """Seen from the repository, whatever folder it was started in."""
    script = "import runpy, sys; from engine import run; sys.argv = [str(run.ROOT / 'judge.py')]"
    done = python("-c", f"{script}; print(run.command())", cwd=tmp_path)
    assert done.stdout.strip() == "python judge.py", done.stderr


def test_machine_and_peak():
    assert re.match(rf"{os.cpu_count()} CPU cores \(\w+ \w+\), \d+ GB", run.machine())
    block = bytearray(300 * 2 ** 20)
    block[::4096] = b"x" * len(block[::4096])  # touched, so that it is resident
    assert 0.3 < run.peak_gb() < 100


# ---- folders of results --------------------------------------------------------------------------

@pytest.fixture
def mine(fake, monkeypatch, tmp_path):
    """The fake stage with RUN=mine, whose results go below tmp_path."""
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    fake["RUN"] = "mine"
    return fake


def meta_of(stage, **constants):
    return dict(stage=stage, constants=constants)


def test_results_name_no_folder_of_this_machine(mine):
    """The constants that stand beside results may be published; those handed over stay."""
    meta = meta_of("09_fake.py", SEEDS="/home/me/mine.jsonl", STEPS=3, COT=True)
    folder = run.RUNS / "mine"
    folder.mkdir(parents=True)
    run.write_meta(folder, meta)
    written = json.loads((folder / "meta.json").read_text())["constants"]
    assert written == dict(SEEDS="mine.jsonl", STEPS=3, COT=True)
    assert meta["constants"]["SEEDS"] == "/home/me/mine.jsonl"


# ---- paths and files -----------------------------------------------------------------------------

def test_short():
    root = run.ROOT
    assert run.short(root / "checkpoints" / "00_base") == "checkpoints/00_base"
    assert run.short(root / "engine" / ".." / "judge.py") == "judge.py"
    assert run.short("checkpoints/01_sft") == "checkpoints/01_sft"
    assert run.short("org/model") == "org/model"
    assert run.short(root.parent / "elsewhere") == str(root.parent / "elsewhere")


@pytest.mark.parametrize("text, public", [
    ("a/b,/x/y/z.jsonl, /x/w", "a/b,z.jsonl,w"),
    (str(run.ROOT / "prompts" / "seeds.jsonl"), "prompts/seeds.jsonl"),
    ("../private/mine.jsonl,../../x", "mine.jsonl,x"),
    ("prompts/../judge_adapter", "prompts/../judge_adapter"),
    ("allenai/wildguard", "allenai/wildguard"), ("", ""), (3, 3), (True, True), (0.5, 0.5)])
def test_publishable(monkeypatch, text, public):
    monkeypatch.chdir(run.ROOT)
    got = run.publishable(text)
    assert got == public and type(got) is type(public)


def test_locate(monkeypatch, tmp_path):
    root, here = tmp_path / "root", tmp_path / "here"
    for folder in (root, here):
        (folder / "checkpoints").mkdir(parents=True)
    (root / "checkpoints" / "01_sft").mkdir()
    (root / "both").write_text("root's")
    (here / "both").write_text("here's")
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.chdir(here)
    assert run.locate("checkpoints/01_sft") == root / "checkpoints" / "01_sft"
    assert run.locate("both").read_text() == "here's"  # as given comes first
    assert run.locate(str(root / "both")) == root / "both"
    assert run.locate("checkpoints/02_rl") is None and run.locate("") is None


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run.write_text(tmp_path / "a.json", "old ☃")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old ☃"


# ---- resume --------------------------------------------------------------------------------------

def test_newest_checkpoint(tmp_path):
    assert run.newest_checkpoint(tmp_path / "nothing") is None
    for name, complete in (("step_000020", True), ("step_000100", True), ("step_000120", False),
                           ("step_000140.tmp", True), ("other_000200", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("x")
        if complete:
            (tmp_path / name / "state.safetensors").write_text("x")
    assert run.newest_checkpoint(tmp_path) == tmp_path / "step_000100"


def test_constants_that_may_change_on_resume():
    source = (run.ROOT / "02_selfplay_rl.py").read_text(encoding="utf-8")
    free = run.free_to_change(source)
    assert {"STEPS", "SAVE_EVERY", "SAMPLE_BATCH", "TRAIN_TOKENS", "DTYPE", "QUANTIZE", "TRACKER",
            "PROGRESS", "PLAN_ONLY"} <= free
    assert not {"LR", "SEED", "KL_COEF", "SEEDS_PER_STEP", "MODEL", "ATTACKED", "METHOD", "SEEDS",
                "OPTIMIZER"} & free


def resumed(fake, folder, *argv, **inputs):
    """check_resume of a checkpoint that was made with the defaults and MODEL of digest abc."""
    made = dict(constants=DEFAULTS, inputs=dict(MODEL="abc", SFT=""))
    (folder / "meta.json").write_text(json.dumps(made))
    run.configure(fake, list(argv))
    run.check_resume(fake, folder, dict(made["inputs"], **inputs))


@pytest.mark.parametrize("inputs, named", [
    (dict(MODEL="abd"), "MODEL"), (dict(SFT="new"), "SFT"), (dict(JUDGE="never noted"), "JUDGE")])
def test_a_run_goes_on_only_with_its_inputs(fake, tmp_path, inputs, named):
    assert f"other content of {named}" in stops(resumed, fake, tmp_path, **inputs)


def test_file_digest(tmp_path):
    """It changes with a name and with content, not with the order; what is no file is left out."""
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("1")
    b.write_text("2")
    first = run.file_digest(a, b)
    assert first == run.file_digest(str(b), f" {a} ", None, "someone/a-hub-id")
    assert run.file_digest(None) == run.file_digest("nowhere") == ""
    b.write_text("3")
    assert run.file_digest(a, b) != first
    b.rename(tmp_path / "c.txt")
    b = tmp_path / "c.txt"
    b.write_text("2")
    assert run.file_digest(a, b) != first


@pytest.mark.parametrize("word", ["STEPS=40", "BATCH=8", "DTYPE=float32", "COLOUR=blue"])
def test_a_run_goes_on_with_other_hardware(fake, tmp_path, word):
    resumed(fake, tmp_path, word)


def test_a_run_goes_on_only_with_its_constants(fake, tmp_path):
    text = stops(resumed, fake, tmp_path, "LR=1e-3", "ROLES=attacker", "STEPS=40")
    assert "(LR 1e-05 -> 0.001; ROLES 'both' -> 'attacker')" in text
    assert "RUN=" in text and run.short(tmp_path) in text


def test_a_constant_that_did_not_exist_counts_as_changed(fake, tmp_path):
    fake["NEW"] = 3
    assert "NEW None -> 3" in stops(resumed, fake, tmp_path)


def test_only_the_newest_step_keeps_its_optimizer(tmp_path):
    """Also after a kill between a save and the removal of the state before it."""
    for name in ("step_000010", "step_000020", "step_old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_text("x")
        (tmp_path / name / "model.safetensors").write_text("x")
    run.drop_old_states(run.newest_checkpoint(tmp_path))
    assert not (tmp_path / "step_000010" / "state.safetensors").exists()
    assert (tmp_path / "step_000010" / "model.safetensors").exists()
    for name in ("step_000020", "step_old"):  # step_old is no step of the run
        assert (tmp_path / name / "state.safetensors").exists()
