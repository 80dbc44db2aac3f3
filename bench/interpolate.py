"""Between two adapters: what safety costs in refused benign requests, without training anything.

    python bench/interpolate.py                       warm-up to self-play, a quarter at a time
    python bench/interpolate.py END=adapters/ssp_plain SHARES=0.5
    python 03_evaluate.py CHECKPOINTS=adapters/warmup,checkpoints/interpolated_050,adapters/selfplay

The weights of the new adapter are (1 - share) START + share END (WiSE-FT, arXiv 2109.01903). Their
change of a weight matrix is B A alpha / r, which is not linear in A and B. So the new adapter has
the rows of both A, the columns of both B, each with its share, and the sum of their ranks.
Output: checkpoints/interpolated_NNN, NNN the share in hundredths.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import adapters, models, run  # noqa: E402

# ==================================================================================================
START = "adapters/warmup"
END = "adapters/selfplay"
SHARES = "0.25,0.5,0.75"  # of END
# ==================================================================================================


def interpolate(start, end, share):
    """Two adapters' (config, tensors) and a share of the second -> those of the new one."""
    config, tensors = dict(start[0]), {}
    config["r"] = config["lora_alpha"] = start[0]["r"] + end[0]["r"]  # so its own scale is 1
    for name in start[1]:
        both, along = [], 0 if "lora_A" in name else 1
        for (of, its), weight in ((start, 1 - share), (end, share)):
            scale = 1 if "lora_A" in name else weight * of["lora_alpha"] / of["r"]
            both.append(scale * its[name].float())
        tensors[name] = torch.cat(both, along).contiguous()
    return config, tensors


def read(folder):
    """An adapter's folder -> (config, tensors); stops where it is none."""
    path = run.locate(folder) or Path(folder)
    config = run.read_json(path / adapters.CONFIG, r=int, lora_alpha=int, use_rslora=bool)
    if config["use_rslora"]:
        run.die(f"{folder}: its scale is not alpha / r (use_rslora)")
    return config, models.read_tensors(path / adapters.WEIGHTS)


def main(argv):
    """One new adapter for each share."""
    run.configure(globals(), argv)
    from safetensors.torch import save_file
    start, end = read(START), read(END)
    if start[1].keys() != end[1].keys() or start[0][adapters.BASE] != end[0][adapters.BASE]:
        run.die(f"{START} and {END} are adapters of different models")
    made = run.read_json(run.locate(f"{END}/meta.json"), constants=dict)
    shares = []
    for word in SHARES.split(","):
        try:
            shares.append(float(word))
        except ValueError:
            shares.append(-1.0)
        if not 0 <= shares[-1] <= 1:
            run.die(f"SHARES={SHARES}: numbers from 0 to 1, divided by commas")
    for share in shares:
        out = run.CHECKPOINTS / f"interpolated_{round(100 * share):03d}"
        out.mkdir(parents=True, exist_ok=True)
        config, tensors = interpolate(start, end, share)
        save_file(tensors, out / adapters.WEIGHTS)
        run.write_meta(out, dict(made, stage="bench/interpolate.py", parent=END,
                                 interpolated=dict(START=START, END=END, share=share)))
        run.write_text(out / adapters.CONFIG, json.dumps(config, indent=1, sort_keys=True))
        print(f"made {run.short(out)}")


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
