"""bench/gpu.py on a CPU: every check runs, a check that fails is reported, a step is timed."""
import json
import sys

import pytest
from helpers import ROOT
from test_bench import module


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])
    return module("gpu")


def test_it_runs_and_writes_what_it_found(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as end:
        gpu.main(["SHAPES=tiny", "ROWS=4", "TOKENS=20", "PROMPT=30", "RANK=4"])
    assert end.value.code == 0
    report = json.loads((tmp_path / "runs/gpu_cpu.json").read_text())
    assert set(report["checks"]) == set(gpu.CHECKS)
    step = report["steps"]["tiny"]
    assert step["defender"]["tokens"] == 20 and step["attacker"]["rows"] == 2
    assert step["learn"]["turns"] == 6 and step["learn"]["tokens_a_second"] > 0
    assert "failed: nothing" in capsys.readouterr().out


def test_what_fails_is_said_and_the_rest_goes_on(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "CHECKS", dict(nf4=gpu.check_nf4, attention=gpu.check_attention))
    monkeypatch.setattr(gpu, "pack", lambda model: 1 / 0)
    with pytest.raises(SystemExit) as end:
        gpu.main(["SHAPES=tiny", "ROWS=4", "TOKENS=20", "PROMPT=30"])
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said and "failed: nf4, tiny" in said
    report = json.loads((tmp_path / "runs/gpu_cpu.json").read_text())
    assert "failed" not in report["checks"]["attention"]


def test_a_cut_run_keeps_its_checks_and_a_stop_is_a_failure(gpu, monkeypatch, tmp_path):
    """What the engine says and how it stops is in the file; so is what came before an interrupt."""
    def stops():
        gpu.progress.say("rollouts without CUDA graphs: none here")
        gpu.die("the library's thread ended early")

    def interrupt():
        raise KeyboardInterrupt
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "CHECKS", dict(stops=stops, cut=interrupt))
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["SHAPES=tiny"])
    checks = json.loads((tmp_path / "runs/gpu_cpu.json").read_text())["checks"]
    assert list(checks) == ["stops"] and "thread ended early" in checks["stops"]["failed"]
    assert checks["stops"]["said"] == ["rollouts without CUDA graphs: none here"]
