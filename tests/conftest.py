"""Fixtures of all tests: no network, no GPU, tiny models, stages whose constants are put back.

Plain functions that several files need are in helpers.py, the tiny models in tiny.py.
"""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"          # before anything imports huggingface_hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # expected values are compared on the CPU
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning: 20 times slower beside training
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))


def pytest_configure(config):
    """With pytest -n, a file's tests go to one worker, so that its fixtures are made once."""
    config.addinivalue_line("markers", "slow: minutes; not part of make test")
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadfile"


@pytest.fixture(autouse=True)
def prompts_as_on_disk():
    """A process reads each prompt once; each test is a new one."""
    from selfplay import turns
    turns.read_prompt.cache_clear()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """{"qwen2" | "llama" | "mistral": folder} of tiny models; shared, so do not write to them.
    Each xdist worker makes its own: all three take 0.2 seconds."""
    import tiny
    folder = tmp_path_factory.mktemp("tiny")
    return {kind: tiny.make_tiny(kind, folder / kind) for kind in tiny.KINDS}


@pytest.fixture(scope="session")
def loaded(tiny_models):
    """{kind: (model, tokenizer)} in float32; shared, so a test that changes one takes a copy."""
    from engine.models import load_model
    return {kind: load_model(folder, "float32") for kind, folder in tiny_models.items()}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """main() of stages 1 and 2 in this process: what they write goes below tmp_path, and constants
    that a command line overrides are put back afterwards -> tmp_path."""
    from engine import run
    from helpers import import_stage, keep_constants

    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "results" / "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").symlink_to(run.PROMPTS)
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "checkpoints")
    for name in ("01_sft_warmup", "02_selfplay_rl"):
        stage = import_stage(name)
        keep_constants(monkeypatch, stage)
    return tmp_path


def pytest_collection_modifyitems(config, items):
    """Tests marked slow run only where they are asked for: -m slow."""
    if not config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: python -m pytest -m slow"))
