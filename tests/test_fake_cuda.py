"""tests/fake_cuda.py on a tiny model: devices and waits of what runs on CUDA, without CUDA."""
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

CHECKS = ("that_a_wrong_device_is_found", "the_plain_way", "slots",
          "logprobs_losses_and_optimizers", "the_judge")


@pytest.fixture(scope="module")
def found(tiny_models):
    """{check: "" or a traceback}"""
    env = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    command = [sys.executable, ROOT / "tests" / "fake_cuda.py", tiny_models["qwen2"]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    problems = json.loads(done.stdout.splitlines()[-1])
    return {name.removeprefix("check_"): problem for name, problem in problems.items()}


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_device_that_is_not_there(found, check):
    assert found[check] == ""


def test_all_checks_are_looked_at(found):
    assert set(found) == set(CHECKS)
