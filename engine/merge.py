"""Make an ordinary model of a checkpoint that is an adapter, for vLLM, lm-eval or a further run.

    python -m engine.merge CHECKPOINT OUT

CHECKPOINT: a folder with adapter_model.safetensors. OUT: a new folder, float32, 4 bytes a weight.
The sum of weights and adapter is made in float32, since bfloat16 would round most of it away."""
import sys
from pathlib import Path

from engine import adapters, models, run


def merge(model):
    """The model with its adapter added to the weights -> the same model, without an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    return model


def main(argv):
    """The command of the docstring."""
    run.show_help(argv, __doc__)
    if len(argv) != 2:
        run.die("usage: python -m engine.merge CHECKPOINT OUT")
    folder, out = run.locate(argv[0]) or Path(argv[0]), Path(argv[1])
    if not adapters.is_adapter(folder):
        run.die(f"{run.brief(argv[0])}: no {adapters.CONFIG} there")
    if out.exists():
        run.die(f"{run.brief(argv[1])} exists: give a new folder")
    model, tok = models.load_model(str(folder), "float32", where="cpu")  # 28 GB of a 7B model
    made = run.read_json(folder / "meta.json", missing=dict(constants={}))
    models.save_checkpoint(out, merge(model), tok, dict(made, stage="engine/merge.py"))
    print(f"made {run.short(out)}")


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
