"""bench/: every script runs on tiny models and ends in its ratio. No time is asserted."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# In the place of TRL's environment: answers at once, as a side does, that a step took 3 seconds.
STUB = """#!/bin/sh
echo 'a word before'
echo 'result {}'
"""
ROWS = {"step": ["ours", "trl", "trl_fast"], "logprobs": ["ours", "plain"],
        "sample": ["ours, batch 4", "generate, batch 4", "static, batch 4"],
        "judge": ["constrained", "generate"]}


def start(name, *words):
    return subprocess.Popen([sys.executable, str(ROOT / "bench" / f"{name}.py"), *words], cwd="/",
                            env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def ran(tiny_models, tmp_path_factory):
    """{script: (exit code, stdout, stderr)}, all at the same time: most of it is importing."""
    q, m = tiny_models["qwen2"], tiny_models["mistral"]
    stub = tmp_path_factory.mktemp("peer") / "python"
    stub.write_text(STUB.format(json.dumps(dict(seconds=[3.0], count=8, gb=1.0, prompt=9,
                                                version="0"))))
    stub.chmod(0o755)
    small = [f"MODEL={q}", "DTYPE=float32", "ROUNDS=1", "REPEATS=1"]
    rows = ["TURNS=4", "TOKENS=5", "PROMPT_TOKENS=85"]
    going = {
        "step": start("step", *small, *rows, "MICRO_ROWS=2", f"PEER_PYTHON={stub}"),
        "logprobs": start("logprobs", *small, *rows),
        "sample": start("sample", *small, "BATCHES=4", "LENGTHS=3 9 1 6",
                        "SIDES=ours,generate,static"),
        "judge": start("judge", f"JUDGE={m}", "ROUNDS=1", "REPEATS=1", "EXCHANGES=3", "TOKENS=400"),
        "scaling": start("scaling", f"MODEL={q}", "DTYPE=float32", "TURNS=2,8"),
        "lost": start("step", *small, *rows, "PEER_PYTHON=nowhere/python")}
    return {name: end(process) for name, process in going.items()}


def test_scaling_counts_real_and_padded_tokens(ran):
    """Two sizes in rising order; padded tokens are not fewer than real ones, the last line is the
    share over both sizes together."""
    code, out, err = ran["scaling"]
    assert code == 0, out[-2000:] + err[-2000:]
    rows = re.findall(r"(\d+) turns +(\d+) real tokens .* padded / real (\d\.\d+)", out)
    (few, small, a), (many, large, b) = [(int(n), int(t), float(r)) for n, t, r in rows]
    assert (few, many) == (2, 8) and 2 * small < large
    assert min(a, b) >= 1 and max(a, b) > 1
    overall = float(re.fullmatch(r"ratio padding (\d\.\d\d)", out.splitlines()[-1]).group(1))
    assert overall == pytest.approx((a * small + b * large) / (small + large), abs=0.006)


@pytest.mark.parametrize("name", ROWS)
def test_ends_in_its_ratio(ran, name):
    code, out, err = ran[name]
    assert code == 0, out[-2000:] + err[-2000:]
    lines = out.splitlines()
    assert re.fullmatch(rf"ratio {name} \d+\.\d\d", lines[-1]), lines[-1]
    table = [x for x in lines if " GB" in x and " of ours" in x]
    assert [re.split(r"\s{2,}", x)[0] for x in table] == ROWS[name]
    machine = next(x for x in lines if not x.startswith("override:"))
    assert "CPU cores" in machine and "torch" in machine


def test_the_ratio_is_peer_over_ours(ran):
    """The stub's 3 seconds over the median that the table gives for ours."""
    lines = ran["step"][1].splitlines()
    ours = float(re.search(r"^ours\s+([\d.]+) s", "\n".join(lines), re.MULTILINE)[1])
    said = float(lines[-1].split()[-1])
    assert 3 / (ours + 0.0006) - 0.006 <= said <= 3 / max(1e-9, ours - 0.0006) + 0.006


def test_both_forms_give_the_same_log_probabilities(ran):
    """float32, so the two means agree to the digits that are printed, or the last one."""
    means = [float(x) for x in re.findall(r"mean log-probability (-[\d.]+)", ran["logprobs"][1])]
    assert len(means) == 2 and abs(means[0] - means[1]) <= 0.0002


def test_no_peer_says_how_to_make_it(ran):
    code, out, err = ran["lost"]
    assert code == 1 and len(err.splitlines()) == 1
    assert "nowhere/python not found" in err and "requirements-trl.txt" in err
