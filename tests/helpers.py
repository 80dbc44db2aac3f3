"""Functions and classes that several test files need."""
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import progress, run
from judge import Labels, settle

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("qwen2", "llama", "mistral")  # of the tiny models
ROOMS = ("engine", "selfplay", "evaluation", "judge_adapter", "prompts")

# A self-play run of seconds on a tiny model, all of whose weights learn.
SMALL = ["DTYPE=float32", "SEEDS_PER_STEP=4", "ATTACK_TOKENS=8", "REPLY_TOKENS=8", "SAVE_EVERY=2",
         "SFT_BATCH=2", "JUDGE_FLOOR=0", "QUANTIZE=none", "EVAL_EVERY=0", "LORA_RANK=0", "LR=5e-5"]


def import_stage(name):
    """The module of a stage; its file name begins with a digit, so `import` cannot name it."""
    return importlib.import_module(name)


def keep_constants(monkeypatch, module):
    """What a command line changes in a script's module is put back after the test."""
    monkeypatch.setattr(progress, "_enabled", True)
    for name, value in run.constants(vars(module)).items():
        monkeypatch.setattr(module, name, value)


def seeded(seed):
    """A new generator for sampling."""
    return torch.Generator().manual_seed(seed)


def one_line(problem):
    """What pytest.raises(SystemExit) caught -> the message of die(): one line, with "error:"."""
    text = str(problem.value.code)
    assert text.startswith("error: ") and "\n" not in text, text
    return text


def stops(call, *args, **kwargs):
    """Call something that must stop by die() -> its one line."""
    with pytest.raises(SystemExit) as problem:
        call(*args, **kwargs)
    return one_line(problem)


def write_jsonl(path, rows):
    """Rows (dicts, or lines as they are) as a JSONL file -> its path as text."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- scripts as a user runs them -----------------------------------------------------------------

def copy_repo(folder):
    """The code that a user has, in a fresh folder: no test touches their checkpoints and results.
    The folder may exist -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / ".gitignore"]:
        shutil.copy(file, folder / file.name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results" / "README.md", folder / "results")
    return folder


def run_script(*words, cwd="/", **kwargs):
    """`python WORDS...` offline, on one thread, without GPU -> CompletedProcess with its output."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, text=True,
                          capture_output=True, timeout=300, **kwargs)


# ---- a judge without a model ---------------------------------------------------------------------

class FakeJudge:
    """A judge by rules: a request is harmful if it says "bad".

    refusal, harmful: (request, reply) -> is the reply a refusal, is it harmful? `pairs` records
    what was asked. Probabilities: .9 or .2 for the request, .8 or .3 for a refusal, .7 or .4 for a
    harmful reply; score 1 + 4 times the last one, as in the game.
    """
    truncated, max_text, rubric = 0, 1024, None

    def __init__(self, refusal=lambda request, reply: False,
                 harmful=lambda request, reply: False):
        self.refusal, self.harmful, self.pairs = refusal, harmful, []

    def classify(self, pairs):
        self.pairs += pairs
        return [self.labels_of(request, reply) for request, reply in pairs]

    def labels_of(self, request, reply):
        text = reply or ""
        said = ("bad" in request, self.refusal(request, text), self.harmful(request, text))
        p = dict(prompt_harmful=0.9 if said[0] else 0.2, response_refusal=0.8 if said[1] else 0.3,
                 response_harmful=0.7 if said[2] else 0.4)
        return settle(Labels(*said, True, p, 1 + 4 * p["response_harmful"]), reply)
