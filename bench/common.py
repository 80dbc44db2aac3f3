"""What the benchmarks share: sides in turn, each in a process of its own, and the table at the end.

A side is one way to do the work: ours, or a peer's. A script runs itself once for every side and
round (SIDE=name), so that no side finds another's memory or caches. A side does its work once to
warm up, then times it and reports by one line on stdout. Peak memory is that of its process, the
loading of the model included (engine.run.peak_gb: ru_maxrss, on CUDA max_memory_allocated). A
child's ru_maxrss begins at what its parent holds, so the parent loads no model.
"""
import importlib.metadata
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine import models, run
from engine.run import CHECKPOINTS, ROOT, die
from selfplay.data import load_seeds
from selfplay.turns import defender_prompt

ENVIRONMENT = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


# ---- in a side's process -------------------------------------------------------------------------

def prompts(tok, count, tokens):
    """Prompt ids of `count` defender turns on the seeds that ship: those nearest to `tokens`."""
    rows = []
    for seed in load_seeds("prompts/seeds.jsonl", "train"):
        rows.append(defender_prompt(tok, seed["prompt"], True))
    rows.sort(key=lambda row: abs(len(row) - tokens))
    while len(rows) < count:
        rows = rows + rows
    return rows[:count]


def stage(script, *words):
    """A stage's globals, with constants set by NAME=value words as on its command line.

    Nothing imports a stage: it is a script. So it is executed as a file, under another name than
    __main__, and then configured like any run.
    """
    scope = runpy.run_path(str(ROOT / script), run_name=Path(script).stem)
    scope = scope["main"].__globals__  # run_path gives a copy; the functions look here
    run.configure(scope, ["PROGRESS=false", *words])
    return scope


def wait():
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work):
    """Wall-clock seconds of work()."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def repeat(work, times):
    """Wall-clock seconds of work(), `times` times."""
    return [seconds(work) for _ in range(times)]


def report(times, count, **more):
    """A side's last word: seconds of each timed run, units of work in one, what else it knows."""
    print("result " + json.dumps(dict(seconds=times, count=count, gb=run.peak_gb(), **more)))


# ---- in the script's own process -----------------------------------------------------------------

def head(line):
    """The machine's line on top, then what is measured."""
    version = importlib.metadata.version
    print(f"{run.machine()}, {torch.get_num_threads()} threads, torch {version('torch')}, "
          f"transformers {version('transformers')}")
    print(line, flush=True)


def make_base(name):
    """Unpack the embedded model once, in a process that ends before a side starts."""
    if name == models.EMBEDDED and not (CHECKPOINTS / "00_base" / "config.json").exists():
        unpack = "from engine.models import unpack_embedded; unpack_embedded()"
        done = subprocess.run([sys.executable, "-c", unpack], cwd=ROOT, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            die(last_line(done.stderr).removeprefix("error: "))


def last_line(text):
    """The last line of a text that is not empty."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def run_side(python, script, words, limit):
    """One side in its own process -> (what it reported, None) or (None, what went wrong)."""
    try:
        done = subprocess.run([str(python), str(script), *words], env=ENVIRONMENT, text=True,
                              capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"no end in {limit} s"
    reported = None
    for line in done.stdout.splitlines():
        if line.startswith("result "):
            reported = json.loads(line.removeprefix("result "))
    if done.returncode or reported is None:
        return None, last_line(done.stderr).removeprefix("error: ")
    return reported, None


def alternate(script, sides, rounds, optional=(), limit=3600):
    """Every side in turn, `rounds` times -> {side: its reports}.

    sides: {name: (python, words)}. One in `optional` that does not run here says so and is left
    out; any other ends the script with the same line. limit: seconds of a side at most.
    """
    results, left_out = {}, set()
    for turn in range(rounds):
        for name, (python, words) in sides.items():
            if name in left_out:
                continue
            reported, wrong = run_side(python, script, words, limit)
            if reported:
                results.setdefault(name, []).append(reported)
            elif name in optional and turn == 0:
                left_out.add(name)
                print(f"{name}: does not run here ({wrong})", flush=True)
            else:
                die(f"{Path(script).name}, side {name}: {wrong}")
    return results


def table(results, ours, unit):
    """Print one row a side -> {side: median seconds}. unit: what `count` counts."""
    times, peak, medians = {}, {}, {}
    for name, reports in results.items():
        times[name], peak[name] = [], 0.0
        for reported in reports:
            times[name] += reported["seconds"]
            peak[name] = max(peak[name], reported["gb"])
        medians[name] = statistics.median(times[name])
    width = max(map(len, medians))
    for name, s in medians.items():
        print(f"{name:{width}s}  {s:8.3f} s ({min(times[name]):.3f} to {max(times[name]):.3f}, "
              f"n {len(times[name])})  {results[name][0]['count'] / s:9.1f} {unit}/s  "
              f"peak {peak[name]:6.2f} GB  x {s / medians.get(ours, s):.2f} of ours")
    return medians


def ratio(name, peer, ours):
    """The last line: the peer's median seconds over ours."""
    print(f"ratio {name} {peer / ours:.2f}")
