"""The scripts as a user runs them: the README's commands on tiny models in a repository of its own,
resume bit for bit, what git sees afterwards, and mistakes in one line."""
import csv
import json
import re
import shutil
import subprocess
import time

import pytest
from helpers import (ROOT, SMALL, copy_repo, import_stage, keep_constants, read_jsonl, run_script,
                     stops)

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL_SFT = ["DTYPE=float32", "PROBE=4", "DEFENDER_EXAMPLES=8", "ATTACKER_EXAMPLES=4",
             "REPLY_TOKENS=8", "THINK_TOKENS=8", "EPOCHS=1", "BATCH=4", "LORA_RANK=0", "LR=4e-5"]
SMALL_EVAL = ["CHECKPOINTS=checkpoints/01_sft,checkpoints/02_rl", "LIMIT=3", "EVAL_TOKENS=8",
              "ATTACK_TOKENS=8", "DTYPE=float32", "JUDGE2="]


def git(repo, *words):
    done = subprocess.run(["git", *words], cwd=repo, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_in_step_3(repo):
    """What a run leaves that is killed in the middle of saving: lines after its last checkpoint, a
    torn line, half a checkpoint."""
    results = repo / "results/runs/02_rl"
    games = read_jsonl(results / "games.jsonl")
    with open(results / "games.jsonl", "a") as f:
        for game in games[-4:]:
            f.write(json.dumps(dict(game, step=3)) + "\n")
        f.write('{"step": 4, "ga')
    rows = (results / "metrics.csv").read_text().splitlines()
    with open(results / "metrics.csv", "a") as f:
        f.write("3" + rows[-1][1:] + "\n4,0.5")
    half = repo / "checkpoints/02_rl/step_000004.tmp"
    half.mkdir()
    (half / "state.safetensors").write_text("half")


@pytest.fixture(scope="module")
def chain(tiny_models, tmp_path_factory):
    """01 -> 02 (2 + 2 steps, killed between; and 4 steps at once) -> 03 -> chat. Tiny Mistral
    judges, in NF4 in 01 -> dict of what each process said, and "repo", the folder."""
    repo = copy_repo(tmp_path_factory.mktemp("chain") / "repo")
    if shutil.which("git"):
        git(repo, "init", "--quiet")
        git(repo, "add", "--all")
        git(repo, "-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "--quiet",
            "--message", "As it ships")
    judge = f"JUDGE={tiny_models['mistral']}"
    scripts = re.findall(r"^python (\d\d_\w+\.py)$", README, re.MULTILINE)
    assert scripts == ["01_sft_warmup.py", "02_selfplay_rl.py", "03_evaluate.py"]
    sft, selfplay, evaluate = scripts

    said = {"repo": repo}
    said["01"] = run_script(sft, f"MODEL={tiny_models['qwen2']}", judge, "QUANTIZE=nf4",
                            *SMALL_SFT, cwd=repo)
    said["02"] = run_script(selfplay, judge, *SMALL, "STEPS=2", cwd=repo)
    assert said["02"].returncode == 0, said["01"].stderr[-2000:] + said["02"].stderr[-2000:]
    kill_in_step_3(repo)
    said["02 goes on"] = run_script(repo / selfplay, judge, *SMALL, "STEPS=4")  # from any folder
    said["02 at once"] = run_script(selfplay, judge, *SMALL, "STEPS=4", "RUN=b", cwd=repo)
    said["03"] = run_script(evaluate, judge, f"BASE={tiny_models['qwen2']}", *SMALL_EVAL, cwd=repo)
    said["chat"] = run_script("-m", "selfplay.chat", "checkpoints/02_rl/step_000004",
                              "--show-thinking", cwd=repo, input="Hello?\n\n")
    return said


@pytest.mark.parametrize("process", ["01", "02", "02 goes on", "02 at once", "03", "chat"])
def test_every_process_ends_well(chain, process):
    done = chain[process]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_stage_1_shows_an_example_and_rates(chain):
    text = chain["01"].stdout
    assert "before: well-formed" in text and "after : well-formed" in text
    assert "[[" in text and "next: python 02" in text
    mix = read_jsonl(chain["repo"] / "checkpoints/01_sft/defender.jsonl")
    assert len(mix) == 8 and all(row["request"] and row["answer"] for row in mix)
    examples = read_jsonl(chain["repo"] / "results/runs/01_sft/examples.jsonl")
    assert [row["role"] for row in examples] == ["defender"] * 8 + ["attacker"] * 4


def test_stage_2_writes_what_it_says(chain):
    folder = chain["repo"] / "results/runs/02_rl"
    games = read_jsonl(folder / "games.jsonl")
    assert len(games) == 4 * 4 and {g["step"] for g in games} == {1, 2, 3, 4}
    assert (folder / "curves.png").stat().st_size > 10000
    steps = [x for x in chain["02 at once"].stdout.splitlines() if x.startswith("step ")]
    assert len(steps) == 4
    assert re.match(r"step 001/4 \| atk r [+-]\S+ asr \S+ \| def r \S+ refuse\(h\) \S+ "
                    r"comply\(b\)", steps[0])
    assert "SFT examples" in chain["02"].stdout


def test_meta_says_what_made_a_folder(chain):
    """The command as a user would type it, constants, and the same in results and checkpoint."""
    repo = chain["repo"]
    meta = json.loads((repo / "checkpoints/02_rl/step_000004/meta.json").read_text())
    assert meta["stage"] == "02_selfplay_rl.py" and meta["parent"] == "checkpoints/01_sft"
    assert meta["constants"]["SEEDS_PER_STEP"] == 4 and meta["step"] == 4 and meta["prompts_sha256"]
    for name in ("01_sft", "02_rl"):
        written = json.loads((repo / "results/runs" / name / "meta.json").read_text())
        assert written["command"].startswith(f"python {written['stage']} ")
        assert "SAVE_EVERY=2" in written["command"] or name == "01_sft"


def test_resume_is_bit_for_bit(chain):
    """2 steps, a kill and 2 steps == 4 steps: weights, optimizer, metrics (times aside), games."""
    repo = chain["repo"]
    for name in ("model.safetensors", "state.safetensors"):
        resumed, whole = (repo / "checkpoints" / x / "step_000004" / name for x in ("02_rl", "b"))
        assert resumed.read_bytes() == whole.read_bytes()
    assert "resumed from checkpoints/02_rl/step_000002" in chain["02 goes on"].stdout
    assert "resumed" not in chain["02 at once"].stdout

    texts, tables = [], []
    for run in ("02_rl", "b"):
        folder = repo / "results/runs" / run
        texts.append((folder / "games.jsonl").read_text())
        with open(folder / "metrics.csv", newline="") as f:
            tables.append(list(csv.DictReader(f)))
        for row in tables[-1]:
            for time_or_memory in ("seconds", "play_s", "gb"):
                row.pop(time_or_memory)
    assert texts[0] == texts[1]
    assert tables[0] == tables[1] and len(tables[0]) == 4


def test_stage_3_writes_a_table(chain):
    folder = chain["repo"] / "results/runs/03_limit3"
    table = (folder / "table.md").read_text()
    assert "01_sft" in table and "02_rl/step_000004" in table
    summary = json.loads((folder / "summary.json").read_text())
    assert {"01_sft", "02_rl/step_000004"} <= set(summary["checkpoints"])
    assert not (chain["repo"] / "results/runs/03").exists()


def test_chat_answers(chain):
    assert "one question a line" in chain["chat"].stdout
    assert "[thinking]" in chain["chat"].stdout


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_sees_nothing_of_a_run(chain):
    """What runs write is ignored, and nothing that ships has changed."""
    repo = chain["repo"]
    assert git(repo, "status", "--porcelain") == ""
    ignored = set()
    for line in git(repo, "status", "--porcelain", "--ignored").splitlines():
        path = line.removeprefix("!! ")
        if "__pycache__" not in path:
            ignored.add(path)
    assert ignored == {"checkpoints/", "results/runs/"}, "a run wrote elsewhere"


# ---- mistakes ------------------------------------------------------------------------------------

def test_a_mistake_is_one_line_on_stderr(tmp_path):
    """Stage 2 before stage 1, as a process: exit code 1, one line, no traceback."""
    repo, began = copy_repo(tmp_path / "repo"), time.time()
    done = run_script("02_selfplay_rl.py", cwd=repo)
    assert done.returncode == 1
    assert done.stderr == (
        "error: checkpoints/01_sft not found: run python 01_sft_warmup.py first\n")
    assert time.time() - began < 60  # 5 s; the machine may be busy
    assert not (repo / "checkpoints").exists() and not (repo / "results" / "runs").exists()


@pytest.mark.parametrize("script, words, says", [
    ("01_sft_warmup", ["SEEDS=no_such_file.jsonl"], "not found"),
    ("01_sft_warmup", ["SEEDS=bad.jsonl"], "bad.jsonl line 2"),
    ("01_sft_warmup", ["MODEL=some-org/some-model", "JUDGE={judge}"], "hub"),
    ("01_sft_warmup", ["JUDGE=/no/such/folder"], "'/no/such/folder' not found"),
    ("02_selfplay_rl", ["LRR=1"], "nearest: LR"),
    ("02_selfplay_rl", ["STEPS=many"], "type int"),
    ("02_selfplay_rl", ["ATTACKED=2.0"], "from 0.0 to 1.0"),
    ("02_selfplay_rl", ["SCHEME=negative_sum"], "one of general_sum, zero_sum"),
    ("02_selfplay_rl", ["RUN=../x"], "it names folders"),
    ("03_evaluate", ["CHECKPOINTS=checkpoints/nothing"], "checkpoints/nothing"),
    ("03_evaluate", ["CHECKPOINTS={model}", "BASE={model}", "DATA_DIR=/no/such/folder"],
     "DATA_DIR=/no/such/folder"),
])
def test_mistakes_are_one_line(workplace, tiny_models, monkeypatch, script, words, says):
    """main() of each stage: it stops before it writes anything."""
    (workplace / "bad.jsonl").write_text(
        '{"prompt": "x", "harmful": true}\n{"prompt": "y", "harmful": "perhaps"}\n')
    stage = import_stage(script)
    keep_constants(monkeypatch, stage)
    judge, model = tiny_models["mistral"], tiny_models["qwen2"]
    assert says in stops(stage.main, [word.format(judge=judge, model=model) for word in words])
    assert {path.name for path in workplace.iterdir()} == {"bad.jsonl", "prompts"}
