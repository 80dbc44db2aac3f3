"""engine/parallel.py and engine/shards.py: the stages in two processes on a CPU (gloo), beside the
same run in one."""
import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, read_jsonl
from safetensors.torch import load_file

from engine import models, parallel, run, sampling, shards

LAUNCH = str(ROOT / "tests" / "launch.py")
STEPS = ["STEPS=5", "SAVE_EVERY=5", "SEEDS_PER_STEP=8", "WARMUP=0", "COT=false", "PROGRESS=false"]


def start(processes, folder, stage, *words):
    """A stage below `folder`, in that many processes -> what it printed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                    "--master_port", str(free_port())]
    done = subprocess.run([*command, LAUNCH, folder, stage, *words], timeout=300, text=True,
                          capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts").symlink_to(run.PROMPTS)
    return tmp_path


@pytest.fixture
def words(tiny_models):
    return [f"MODEL={tiny_models['qwen2']}", f"JUDGE={tiny_models['mistral']}", *SMALL, *STEPS]


def games(folder, name):
    return read_jsonl(folder / "results" / "runs" / name / "games.jsonl")


def close(a, b):
    """Equal but for the last digits of numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return abs(a - b) < 1e-4 if isinstance(a, float) else a == b


def apart(one, two):
    """The largest difference of two checkpoints' weights."""
    names = [file.name for file in one.glob("*model.safetensors")]
    assert names
    a, b = load_file(one / names[0]), load_file(two / names[0])
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def moved(tiny_models, checkpoint):
    return apart(checkpoint, Path(tiny_models["qwen2"]))


@pytest.mark.parametrize("how", [
    ["METHOD=self_redteam", "UPDATES=1"], ["METHOD=ssp", "UPDATES=3"],
    ["METHOD=ssp", "LORA_RANK=4", "ADAPTERS=per_role", "LR=5e-4"]])
def test_two_processes_play_and_learn_as_one(folder, words, tiny_models, how):
    for n, name in ((1, "one"), (2, "two")):
        said = start(n, folder, "02_selfplay_rl", *words, *how, f"RUN={name}")
        assert said.count("step 005/5") == 1 and said.count("made checkpoints") == 1
    one, two = (folder / "checkpoints" / name / "step_000005" for name in ("one", "two"))
    assert len(games(folder, "one")) >= 40
    with open(folder / "results/runs/two/metrics.csv", encoding="utf-8") as f:
        assert all(1 <= float(row["imbalance"]) < 2 for row in csv.DictReader(f))
    assert close(games(folder, "one"), games(folder, "two"))
    assert apart(one, two) < 1e-5
    if not any(word.startswith("LORA") for word in how):
        assert moved(tiny_models, two) > 1e-4


def test_the_launcher_of_accelerate(folder, words):
    """On a CPU it starts one process: the same games as by `python`."""
    words = [*words, "STEPS=2"]
    start(1, folder, "02_selfplay_rl", *words, "RUN=one")
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--cpu",
                           "--num_processes", "2", LAUNCH, folder, "02_selfplay_rl", *words,
                           "RUN=two"], timeout=300, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 002/2") == 1
    assert games(folder, "one") == games(folder, "two") != []


def test_shares_of_the_weights_and_back(folder, words, tiny_models):
    """FSDP2: three steps in two processes, then two more in one, as five in one."""
    how = ["METHOD=ssp", "UPDATES=3"]
    start(1, folder, "02_selfplay_rl", *words, *how, "RUN=one")
    start(2, folder, "02_selfplay_rl", *words, *how, "RUN=two", "STEPS=3", "SHARD=fsdp")
    said = start(1, folder, "02_selfplay_rl", *words, *how, "RUN=two")
    assert "resumed from checkpoints/two/step_000003, made by 2 processes, now 1" in said
    one, two = (folder / "checkpoints" / name / "step_000005" for name in ("one", "two"))
    assert close(games(folder, "one"), games(folder, "two"))
    assert apart(one, two) < 1e-5 and moved(tiny_models, two) > 1e-4
    state = [load_file(path / "state.safetensors") for path in (one, two)]
    assert {k: x.shape for k, x in state[0].items()} == {k: x.shape for k, x in state[1].items()}


def test_when_a_process_is_killed_the_others_end(folder, words):
    """kill -9 of the second of two processes that nothing watches; then the run goes on."""
    words = [*words, "RUN=k", "SAVE_EVERY=2"]
    env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE="2",
               MASTER_PORT=str(free_port()), LOCAL_WORLD_SIZE="2")
    both = []
    for rank in "01":
        both.append(subprocess.Popen(
            [sys.executable, LAUNCH, folder, "02_selfplay_rl", *words, "STEPS=10000"], text=True,
            env=dict(env, RANK=rank, LOCAL_RANK=rank), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE))
    try:
        for line in both[0].stdout:
            if line.startswith("step 003/"):
                break
        both[1].send_signal(signal.SIGKILL)
        began = time.time()
        _, said = both[0].communicate(timeout=60)
        assert time.time() - began < 60 and both[0].returncode == 1
        assert [line for line in said.splitlines() if line.startswith("error: ")] == [
            said.splitlines()[-1]]
        assert "another process of this run has ended" in said and "Traceback" not in said
    finally:
        for process in both:
            process.kill()
            process.communicate()
    last = run.newest_checkpoint(folder / "checkpoints" / "k")
    assert "resumed from" in start(1, folder, "02_selfplay_rl", *words,
                                   f"STEPS={int(last.name[5:]) + 1}")


def test_an_error_is_said_and_ends_all(folder, words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", str(free_port()), LAUNCH, folder, "02_selfplay_rl", *words, "LR=x"]
    done = subprocess.run(command, timeout=120, text=True, capture_output=True)
    assert done.returncode and done.stderr.count("error: LR='x'") == 1


def test_the_warm_up_and_the_evaluation_in_two_processes(folder, tiny_models):
    """01: the same examples, weights within 1e-5. 03: the same bytes."""
    first = [f"MODEL={tiny_models['qwen2']}", f"JUDGE={tiny_models['mistral']}", "DTYPE=float32",
             "DEFENDER_EXAMPLES=8", "ATTACKER_EXAMPLES=8", "REPLY_TOKENS=8", "THINK_TOKENS=8",
             "PROBE=8", "EPOCHS=1", "QUANTIZE=none", "PROGRESS=false", "LR=1e-3", "LORA_RANK=0"]
    for n, name in ((1, "one"), (2, "two")):
        start(n, folder, "01_sft_warmup", *first, f"RUN={name}")
    one, two = (folder / "checkpoints" / name for name in ("one", "two"))
    assert apart(one, two) < 1e-5 < 1e-4 < moved(tiny_models, two)
    assert (one / "defender.jsonl").read_bytes() == (two / "defender.jsonl").read_bytes()

    words = [f"CHECKPOINTS={one}", f"BASE={tiny_models['qwen2']}", "LIMIT=12", "EVAL_TOKENS=8",
             f"JUDGE={tiny_models['mistral']}", "JUDGE2=", "JUDGE_QUANTIZE=none", "DTYPE=float32",
             "ATTACK_TOKENS=8", "CROSSPLAY=none", "SAMPLE_TOKENS=600", "PROGRESS=false"]
    for n, name in ((1, "e1"), (2, "e2")):
        start(n, folder, "03_evaluate", *words, f"RUN={name}")
    files = {}
    for name in ("e1", "e2"):
        out = folder / "results" / "runs" / f"{name}_limit12"
        for file in out.rglob("*.jsonl"):
            files.setdefault(file.relative_to(out), []).append(file.read_bytes())
    assert sum(bool(each[0]) for each in files.values()) >= 4
    assert all(len(each) == 2 and each[0] == each[1] for each in files.values())


# ---- in this process ---------------------------------------------------------------------------

@pytest.fixture
def three(monkeypatch):
    """This is the second of three processes."""
    monkeypatch.setattr(parallel, "_state", type("S", (), dict(num_processes=3, process_index=1)))


def test_work_is_dealt_by_size(three):
    sizes = [5, 9, 1, 8, 7, 3]
    shares = parallel.deal(sizes)
    assert sorted(sum(shares, [])) == list(range(6)) and parallel.mine(sizes) == shares[1]
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) <= 12
    assert parallel.imbalance([[i] for i in range(6)], sizes) == max(loads) / 11
    assert parallel.deal([]) == [[], [], []] and parallel.imbalance([], []) == 0
    with parallel.alone():
        assert parallel.mine(sizes) == list(range(6)) and parallel.number_of() == 1
    assert parallel.share([[0, 1], [2], [3, 4, 5]], sizes) == [[0, 1]]  # of 14, 1 and 18


def test_one_process_does_all_the_work():
    assert parallel.mine([3, 1]) == [0, 1] and parallel.imbalance([[0], [1]], [3, 1]) == 1
    assert parallel.gather({1: 2}) == {1: 2} and parallel.once(max, 1, 2) == 2
    assert parallel.total(dict(a=1)) == dict(a=1)


def test_a_sharded_model_gets_as_many_batches_everywhere(three, monkeypatch):
    """The batch that fills up has no weight; the others make up for the mean of three gradients."""
    model = torch.nn.Linear(1, 1)
    assert shards.rounds([[0], [1]], [4, 3], model) == [([1], 1.0)]
    model.in_shards = True
    monkeypatch.setattr(parallel, "total", lambda values, most: dict(n=2))
    assert shards.rounds([[0], [1]], [4, 3], model) == [([1], 3.0), ([0], 0.0)]


@pytest.mark.parametrize("rows", [2, 4])
def test_processes_share_whole_batches(monkeypatch, tiny_models, rows):
    """A row is completed in the batch that it has in one process: so its rounding is the same."""
    model, tok = models.load_model(tiny_models["qwen2"], "float32")
    prompts = [list(range(5, 5 + n)) for n in (3, 30, 4, 28, 9, 12, 17, 25)]
    batches, decode, found = [], sampling._decode, {}

    def spy(model, tok, prompts, *more):
        batches.append(prompts)
        return decode(model, tok, prompts, *more)

    def completions():
        batches.clear()
        generator = torch.Generator().manual_seed(0)
        out = sampling.sample(model, tok, prompts, 12, 1.0, rows, generator)
        return out, list(batches)

    def keep(own):
        found.update(own)
        return dict.fromkeys(range(len(prompts)))

    monkeypatch.setattr(sampling, "_decode", spy)
    (whole, want), shares = completions(), []
    monkeypatch.setattr(parallel, "gather", keep)
    for index in range(2):
        state = types.SimpleNamespace(num_processes=2, process_index=index)
        monkeypatch.setattr(parallel, "_state", state)
        shares.append(completions()[1])
    assert len(want) == 8 // rows and all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(want)
    assert [found[i] for i in range(len(prompts))] == whole
