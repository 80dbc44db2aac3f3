"""A stage whose files lie below a folder: for tests that need it in processes of its own.

    python tests/launch.py FOLDER 02_selfplay_rl NAME=value ...
    python -m torch.distributed.run --nproc_per_node 2 tests/launch.py FOLDER 02_selfplay_rl ..."""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from helpers import import_stage  # noqa: E402

from engine import run  # noqa: E402

if __name__ == "__main__":
    folder, name, *words = sys.argv[1:]
    folder = Path(folder).resolve()
    torch.set_num_threads(1)
    stage = import_stage(name)
    run.ROOT, run.RUNS = folder, folder / "results" / "runs"
    run.CHECKPOINTS = folder / "checkpoints"
    os.chdir(folder)
    run.guarded(stage.main, words)
