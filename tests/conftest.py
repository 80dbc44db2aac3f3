"""What all tests share: the repo root on sys.path, no network, no GPU, two threads, tiny models."""
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


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """{"qwen2" | "llama" | "mistral": folder} of tiny models; shared, so do not write to them."""
    import tiny
    return {kind: tiny.make_tiny(kind, tmp_path_factory.mktemp("tiny") / kind)
            for kind in tiny.KINDS}
