"""LoRA (arXiv 2106.09685): adapters of a few MB that learn while the model's own weights stay.

They sit on all linear layers but the head, in the type of the weights, without dropout, and are
never merged while a run lasts: sampling and training go through the same forward pass. What is
saved are peft's files; `python -m engine.merge` makes an ordinary model of them."""
import copy
import json

import torch

from engine.run import die, read_json, short, write_text

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "base_model_name_or_path"  # in CONFIG: the model that an adapter was made for


def is_adapter(folder):
    """Does a folder hold an adapter, not a whole model?"""
    return (folder / CONFIG).is_file()


def base_of(folder):
    """The name of the model that the adapter in a folder was made for."""
    return read_json(folder / CONFIG, **{BASE: str})[BASE]


def attach(model, folder, read_tensors):
    """Give a model the adapter in a folder; one that is damaged or of another model stops."""
    from peft import LoraConfig, set_peft_model_state_dict
    read_json(folder / CONFIG, "r", "target_modules")
    tensors = read_tensors(folder / WEIGHTS)
    model.requires_grad_(False)
    try:
        model.add_adapter(LoraConfig.from_pretrained(str(folder)))
    except Exception as problem:  # of many types; each means a config that does not fit
        die(f"{short(folder / CONFIG)} does not fit the model ({str(problem)[:80]})")
    want = {name: x.shape for name, x in model.get_adapter_state_dict().items()}
    found = {name.removeprefix("base_model.model."): x for name, x in tensors.items()}
    if want != {name: x.shape for name, x in found.items()}:
        die(f"{short(folder)}: an adapter of another model or rank, or damaged")
    if not all(x.isfinite().all() for x in found.values()):
        die(f"{short(folder)}: its weights are not finite")
    set_peft_model_state_dict(model, found)


def twin(model):
    """A second model with the same weights, in the same memory, and its own copy of the adapter:
    the frozen reference beside the policy, or one player beside the other."""
    memo = {}
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" not in name:
            memo[id(p)] = p
    for module in model.modules():
        scales = getattr(module, "quant_state", None)  # of weights in NF4
        memo[id(scales)] = scales
    return copy.deepcopy(model, memo)


def has_adapter(model):
    """Has a model an adapter?"""
    return getattr(model, "_hf_peft_config_loaded", False)


def choose_weights(model, rank, alpha, seed):
    """Say what of a loaded model learns: all weights (rank 0), its adapter, which must be of that
    rank and alpha, or a new one, which changes nothing yet (B is 0)."""
    from peft import LoraConfig
    own = model.peft_config["default"] if has_adapter(model) else None
    if own and (own.r, own.lora_alpha) != (rank, alpha):
        die(f"MODEL is an adapter: give LORA_RANK={own.r} LORA_ALPHA={own.lora_alpha}, or make an "
            "ordinary model of it (python -m engine.merge)")
    if rank and not own:
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear",
                                     lora_dropout=0.0))
    for name, p in model.named_parameters():
        p.requires_grad_(not rank or "lora_" in name)


def tidy(folder, base):
    """Put peft's config in a fixed order, name its base, drop what the library saves beside it."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = dict(read_json(folder / CONFIG), **{BASE: base})
    if isinstance(config["target_modules"], list):  # not a pattern
        config["target_modules"].sort()
    write_text(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True))
