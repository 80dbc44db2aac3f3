"""Kills at file operations. At each distinct place of 01, 02 and 03 that makes, writes, renames or
removes a file the process is killed (os._exit, nothing is flushed). The same command is started
again, and its files must be those of a run that nobody disturbed, times and memory apart. Slow (some
minutes), so `make test` leaves it out: python -m pytest -m slow tests/test_kills.py"""
import builtins
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import traceback
from pathlib import Path

import pandas
import pytest
from helpers import ROOT, SMALL, import_stage, write_jsonl

from engine import progress, run

pytestmark = pytest.mark.slow
CHANGING = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
KILLED = 9


# ---- in the process that is killed ---------------------------------------------------------------

class Torn(io.TextIOWrapper):
    """A log of which the process writes half a line and dies."""

    def write(self, text):
        super().write(text[:len(text) // 2])
        self.flush()
        os._exit(KILLED)


def place_of(event, path):
    """Where in the repository an operation comes from, with the kind of file it is about."""
    for frame in reversed(traceback.extract_stack()):
        inside = Path(frame.filename).is_relative_to(ROOT)
        if inside and "/tests/" not in frame.filename and ".venv" not in frame.filename:
            return f"{event} {Path(path).suffix} at {Path(frame.filename).name}:{frame.lineno}"
    return None


def watch(folder, places, kill_at, torn):
    """Note each operation below `folder`; die before operation number `kill_at`, or, if `torn`,
    while it appends its first line."""
    def hook(event, args):
        if event not in CHANGING or not isinstance(args[0], (str, Path)):
            return
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.path.abspath(args[0])
        place = place_of(event, path) if path.startswith(str(folder)) else None
        if place is None or path.endswith("/lock"):
            return
        places.append(place)
        if len(places) == kill_at and not torn:
            os._exit(KILLED)

    sys.addaudithook(hook)
    real = builtins.open

    def opened(file, mode="r", *args, **kwargs):
        handle = real(file, mode, *args, **kwargs)
        if torn and mode == "a" and len(places) == kill_at:
            return Torn(handle.detach(), encoding="utf-8")
        return handle

    builtins.open = opened


def child(stage, words, folder, kill_at, torn, pipe):
    """main() of a stage below `folder`; sends its places."""
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    run.ROOT, run.RUNS = folder, folder / "results" / "runs"
    run.CHECKPOINTS = folder / "checkpoints"
    module = import_stage(stage)
    os.chdir(folder)
    places = []
    watch(folder, places, kill_at, torn)
    module.main(words)
    pipe.send(places)


# ---- in this process -----------------------------------------------------------------------------

def live(stage, words, folder, kill_at=0, torn=False):
    """Run child() in a process of its own -> (exit code, its places)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "safetensors.torch", "pandas",
                                    "matplotlib.figure", "sklearn.metrics"])
    pipe, far = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(stage, words, folder, kill_at, torn, far))
    process.start()
    far.close()
    places = []
    with contextlib.suppress(EOFError):
        places = pipe.recv()
    process.join()
    return process.exitcode, places


def content(folder):
    """{file: what must be the same} below checkpoints/ and results/."""
    out = {}
    for path in sorted((folder / "checkpoints").rglob("*")) + sorted((folder / "results").rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name in ("lock", "times.json"):
            continue
        data = path.read_bytes()
        if path.name == "meta.json":
            data = {k: v for k, v in json.loads(data).items() if k != "time"}
        elif path.name == "metrics.csv":
            data = pandas.read_csv(path).drop(columns=["seconds", "play_s", "gb"]).to_csv()
        elif path.name == "summary.json":
            data = {k: v for k, v in json.loads(data).items() if k not in ("times", "meta", "time")}
        out[name] = data
    return out


@pytest.fixture
def start(tmp_path, tiny_models):
    """-> a function: a fresh folder with what the stages begin from."""
    def fresh(name, before=None):
        folder = tmp_path / name
        if before:
            shutil.copytree(before, folder, symlinks=True)
            return folder
        (folder / "results").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        (folder / "prompts").symlink_to(run.PROMPTS)
        seeds = []
        for split in ("train", "dev"):
            for i in range(6):
                seeds.append(dict(id=f"{split}{i}", prompt=f"{split} request {i}", split=split,
                                  harmful=i % 2 == 0))
        write_jsonl(folder / "seeds.jsonl", seeds)
        return folder
    return fresh


def words_of(stage, tiny_models, method="self_redteam"):
    judge = [f"JUDGE={tiny_models['mistral']}", "SEEDS=seeds.jsonl", "PROGRESS=false", "DTYPE=float32"]
    if stage.startswith("01"):
        return [f"MODEL={tiny_models['qwen2']}", *judge, "DEFENDER_EXAMPLES=4", "EPOCHS=1",
                "ATTACKER_EXAMPLES=2", "PROBE=4", "REPLY_TOKENS=6", "THINK_TOKENS=6", "QUANTIZE=none",
                "LORA_RANK=0"]
    if stage.startswith("02"):
        return ["MODEL=checkpoints/01_sft", *judge, *SMALL, "STEPS=3", "SAVE_EVERY=1",
                f"METHOD={method}", "COT=false"]
    return ["CHECKPOINTS=checkpoints/01_sft,checkpoints/02_rl", f"BASE={tiny_models['qwen2']}", *judge,
            "EVAL_TOKENS=6", "ATTACK_TOKENS=6", "JUDGE_QUANTIZE=none", "JUDGE2="]


def chain_to(stage, start, tiny_models, method):
    """A folder in which all stages before `stage` have been run."""
    folder = start("before")
    for earlier in ("01_sft_warmup", "02_selfplay_rl"):
        if earlier < stage:
            code, _ = live(earlier, words_of(earlier, tiny_models, method), folder)
            assert code == 0, (folder / "said.txt").read_text()
    return folder


@pytest.mark.parametrize("stage, method", [
    ("01_sft_warmup", "self_redteam"), ("02_selfplay_rl", "self_redteam"), ("02_selfplay_rl", "ssp"),
    ("03_evaluate", "self_redteam")])
def test_killed_anywhere_ends_with_the_same_bytes(stage, method, start, tiny_models, tmp_path,
                                                  capsys):
    before = chain_to(stage, start, tiny_models, method)
    words = words_of(stage, tiny_models, method)
    whole = start("whole", before)
    code, places = live(stage, words, whole)
    assert code == 0, (whole / "said.txt").read_text()
    want, kills = content(whole), []
    for place in dict.fromkeys(places):
        first = places.index(place) + 1
        last = len(places) - places[::-1].index(place)
        kills += [(place, at, False) for at in sorted({first, last})]
        if place.startswith("open .jsonl"):
            kills.append((place, last, True))
    different = []
    for n, (place, at, torn) in enumerate(kills):
        folder = start(f"kill{n}", before)
        code, _ = live(stage, words, folder, at, torn)
        if code == 0 and torn:
            continue  # not a log that is appended to
        assert code == KILLED, (place, code, (folder / "said.txt").read_text())
        code, _ = live(stage, words, folder)
        got = content(folder)
        if code or got != want:
            names = sorted(k for k in got.keys() | want.keys() if got.get(k) != want.get(k))
            different.append((place, at, torn, code, names,
                              (folder / "said.txt").read_text()[-300:] if code else ""))
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{stage} {method}: {len(kills)} kills at {len(set(places))} places, "
              f"{len(different)} differences")
    assert not different, different
