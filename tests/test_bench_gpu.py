"""bench/gpu.py on a CPU: every check runs, a check that fails is reported, a step is timed."""
import json
import subprocess
import sys
import types

import pytest
from helpers import ROOT
from test_bench import module

SMALL = ["SHAPES=tiny", "ROWS=4", "TOKENS=20", "PROMPT=30", "RANK=4", "UPDATES=2"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script as a module; its parts run in this process, and write below tmp_path."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])
    fresh = module("gpu")
    monkeypatch.setattr(fresh, "RESULTS", tmp_path)
    defaults = fresh.run.constants(vars(fresh))

    def here(command, timeout):
        for name, value in defaults.items():
            setattr(fresh, name, value)
        fresh.main(command[2:])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(fresh, "subprocess", types.SimpleNamespace(
        run=here, TimeoutExpired=subprocess.TimeoutExpired))
    return fresh


def ended(gpu, tmp_path, code):
    """Run all parts of a small shape -> what is in the file then."""
    with pytest.raises(SystemExit) as end:
        gpu.main(SMALL)
    assert end.value.code == code
    return json.loads((tmp_path / "runs/gpu_cpu.json").read_text())


def test_it_runs_and_writes_what_it_found(gpu, tmp_path, capsys):
    report = ended(gpu, tmp_path, 0)
    assert set(report["checks"]) == set(gpu.CHECKS)
    step = report["steps"]["tiny"]
    assert step["defender"]["tokens"] == 20 and step["attacker"]["rows"] == 2
    assert step["learn"]["turns"] == 6 and step["learn"]["tokens_a_second"] > 0
    assert abs(step["learn"]["kl"]) < 0.01 and step["learn"]["gap"] < 0.1  # in bfloat16
    assert step["judge"]["seconds"] > 0
    assert "failed: nothing" in capsys.readouterr().out


def test_what_fails_is_said_and_the_rest_goes_on(gpu, monkeypatch, tmp_path, capsys):
    """Without bitsandbytes the judge fails alone: rollouts and learning are timed all the same."""
    monkeypatch.setattr(gpu, "CHECKS", dict(nf4=gpu.check_nf4, attention=gpu.check_attention))
    monkeypatch.setattr(gpu, "pack", lambda model: 1 / 0)
    report = ended(gpu, tmp_path, 1)
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said and "failed: nf4, tiny judge\n" in said
    assert "failed" not in report["checks"]["attention"]
    assert report["steps"]["tiny"]["learn"]["seconds"] > 0


def test_an_update_that_fails_keeps_the_rollouts(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "CHECKS", {})
    monkeypatch.setattr(gpu, "time_learning", lambda *_: 1 / 0)
    step = ended(gpu, tmp_path, 1)["steps"]["tiny"]
    assert step["defender"]["tokens"] == 20 and "ZeroDivisionError" in step["learn"]["failed"]


def test_a_part_that_hangs_or_dies_costs_its_own_time(gpu, monkeypatch, tmp_path, capsys):
    """The checks are cut, the shape is killed after its attacks: what both had found stays."""
    def run(command, timeout):
        file = tmp_path / "runs/gpu_cpu.json"
        report = json.loads(file.read_text())
        if "PART=checks" in command:
            report["checks"]["attention"] = dict(worst=0)
            file.write_text(json.dumps(report))
            raise subprocess.TimeoutExpired(command, timeout)
        report["steps"]["tiny"] = dict(attacker=dict(rows=2))
        file.write_text(json.dumps(report))
        return types.SimpleNamespace(returncode=-9)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    report = ended(gpu, tmp_path, 1)
    assert report["checks"] == dict(attention=dict(worst=0)) and "cut after" in report["failed"]
    assert report["steps"]["tiny"] == dict(attacker=dict(rows=2), failed="ended with -9")
    assert "failed: checks, tiny\n" in capsys.readouterr().out


def test_each_part_is_a_process_and_their_time_is_the_whole(gpu, monkeypatch, tmp_path):
    seen = []

    def run(command, timeout):
        seen.append((command[:2], command[2:], timeout))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    with pytest.raises(SystemExit):
        gpu.main(["SHAPES=tiny,3B", "MINUTES=6"])
    for (program, words, timeout), (part, seconds) in zip(
            seen, (("checks", 120), ("tiny", 180), ("3B", 360)), strict=True):
        assert program == [sys.executable, gpu.__file__] and f"PART={part}" in words
        assert seconds - 5 < timeout <= seconds and f"MINUTES={timeout / 60:.2f}" in words


def test_a_cut_run_keeps_its_checks_and_a_stop_is_a_failure(gpu, monkeypatch, tmp_path):
    """What the engine says and how it stops is in the file; so is what came before an interrupt."""
    def stops():
        gpu.progress.say("rollouts without CUDA graphs: none here")
        gpu.die("the library's thread ended early")

    def interrupt():
        raise KeyboardInterrupt
    monkeypatch.setattr(gpu, "CHECKS", dict(stops=stops, cut=interrupt))
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["SHAPES=tiny"])
    checks = json.loads((tmp_path / "runs/gpu_cpu.json").read_text())["checks"]
    assert list(checks) == ["stops"] and "thread ended early" in checks["stops"]["failed"]
    assert checks["stops"]["said"] == ["rollouts without CUDA graphs: none here"]
