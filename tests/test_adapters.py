"""engine/adapters.py: LoRA in the stages, its files, and two models on one set of weights."""
import copy
import json
import shutil

import pandas
import pytest
import torch
from helpers import KINDS, ROOT, SMALL, import_stage, keep_constants, stops
from safetensors.torch import load_file

from engine import adapters, merge, models
from engine.logprobs import token_logprobs
from engine.optim import MasterAdamW
from selfplay import session
from selfplay.turns import Turn

IDS = torch.arange(3, 19)[None]


def with_lora(model, rank=2, noise=0.1):
    """A copy of a model with an adapter that does something."""
    model = copy.deepcopy(model)
    adapters.choose_weights(model, rank, 4, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(noise * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_alone_learns(loaded, kind):
    plain = loaded[kind][0]
    model = with_lora(plain, noise=0.0)
    assert type(model) is type(plain) and torch.equal(model(IDS).logits, plain(IDS).logits)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    linear = [name for name, m in plain.named_modules() if type(m) is torch.nn.Linear]
    assert len(learning) == 2 * (len(linear) - 1)  # all but the head
    assert {p.dtype for p in model.parameters()} == {next(plain.parameters()).dtype}


def test_the_adapter_is_what_lora_says(loaded):
    """W + alpha / rank B A, against weights that were changed by hand."""
    model = with_lora(loaded["llama"][0]).double()
    plain, state = copy.deepcopy(loaded["llama"][0]).double(), model.get_adapter_state_dict()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if f"{name}.lora_A.weight" in state:
                a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
                module.weight += 4 / 2 * b @ a
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


def test_shared_weights_and_adapters_apart(loaded):
    policy = with_lora(loaded["qwen2"][0])
    reference = adapters.twin(policy)
    for (name, a), b in zip(policy.named_parameters(), reference.parameters()):
        assert ("lora_" in name) == (a.data_ptr() != b.data_ptr())
    before = reference(IDS).logits.detach()
    optimizer = MasterAdamW(policy, (0.9, 0.95), 0.0)
    policy(IDS).logits.square().sum().backward()
    optimizer.collect()
    optimizer.step(1e-2, 1.0)
    assert torch.equal(reference(IDS).logits, before)
    assert not torch.equal(policy(IDS).logits, before)
    plain = copy.deepcopy(loaded["qwen2"][0])
    fresh = adapters.twin(plain)  # of a model without an adapter
    adapters.choose_weights(fresh, 2, 4, 0)
    assert not adapters.has_adapter(plain) and adapters.has_adapter(fresh)


def test_files_and_what_damages_them(loaded, tiny_models, tmp_path):
    from peft import PeftModel
    base, tok = models.load_model(tiny_models["llama"], "float32")
    model = with_lora(base)
    model.base_name = tiny_models["llama"]
    folder = tmp_path / "a"
    models.save_checkpoint(folder, model, tok, dict(stage="x"), dict(state=torch.zeros(1)))
    assert {p.name for p in folder.iterdir()} == {
        adapters.CONFIG, adapters.WEIGHTS, "meta.json", "state.safetensors"}
    config = json.loads((folder / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == tiny_models["llama"]
    assert config["target_modules"] == sorted(config["target_modules"])
    again, _ = models.load_model(str(folder), "float32")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_" not in n)
    by_peft = PeftModel.from_pretrained(copy.deepcopy(base), folder)  # as anybody loads it
    torch.testing.assert_close(by_peft(IDS).logits, model(IDS).logits)
    assert models.peek(str(folder))[0].hidden_size == base.config.hidden_size
    assert models.fingerprint(str(folder)) != models.fingerprint(tiny_models["llama"])

    tensors = load_file(folder / adapters.WEIGHTS)
    first = sorted(tensors)[0]
    damages = {
        "damaged": lambda f: (f / adapters.WEIGHTS).write_bytes(b"x"),
        "another model": lambda f: (f / adapters.CONFIG).write_text(
            json.dumps(dict(config, r=3))),
        "finite": lambda f: models_save(dict(tensors, **{first: tensors[first] / 0}), f),
        "not found": lambda f: (f / adapters.CONFIG).write_text(
            json.dumps(dict(config, base_model_name_or_path="checkpoints/nowhere")))}
    for n, (says, damage) in enumerate(damages.items()):
        other = tmp_path / f"d{n}"
        shutil.copytree(folder, other)
        damage(other)
        assert says in stops(models.load_model, str(other), "float32")


def test_layers_named_by_a_pattern_are_saved_as_one(loaded, tiny_models, tmp_path):
    from peft import LoraConfig
    base, tok = models.load_model(tiny_models["llama"], "float32")
    base.add_adapter(LoraConfig(r=2, target_modules=r".*\.(q_proj|v_proj)"))
    base.base_name = tiny_models["llama"]
    models.save_checkpoint(tmp_path / "a", base, tok, dict(stage="x"))
    again, _ = models.load_model(str(tmp_path / "a"), "float32")
    assert torch.equal(again(IDS).logits, base(IDS).logits)


def test_an_adapter_over_an_adapter_is_refused(tmp_path):
    """In one folder with its base, it names itself."""
    (tmp_path / "a").mkdir()
    config = dict(base_model_name_or_path=str(tmp_path / "a"), r=2, target_modules=["q_proj"])
    (tmp_path / "a" / adapters.CONFIG).write_text(json.dumps(config))
    for call in (models.peek, models.fingerprint, models.load_model):
        assert "is an adapter, not a model" in stops(call, str(tmp_path / "a"))


def models_save(tensors, folder):
    from safetensors.torch import save_file
    save_file(tensors, folder / adapters.WEIGHTS)


def test_rank_and_alpha_must_be_those_of_the_adapter(loaded):
    model = with_lora(loaded["llama"][0], rank=2)
    assert "LORA_RANK=2" in stops(adapters.choose_weights, model, 4, 4, 0)
    assert "LORA_RANK=2" in stops(adapters.choose_weights, model, 0, 4, 0)
    assert "LORA_RANK=2 LORA_ALPHA=4" in stops(adapters.choose_weights, model, 2, 8, 0)
    adapters.choose_weights(model, 2, 4, 0)


# ---- in the stages -------------------------------------------------------------------------------

@pytest.fixture
def chain(workplace, tiny_models):
    """-> functions that run stages 01 and 02 on tiny models, below tmp_path."""
    judge = [f"JUDGE={tiny_models['mistral']}", "PROGRESS=false", "DTYPE=float32", "LR=1e-2"]

    def sft(*words):
        with pytest.MonkeyPatch.context() as patch:
            stage = import_stage("01_sft_warmup")
            keep_constants(patch, stage)
            stage.main([f"MODEL={tiny_models['qwen2']}", *judge, "DEFENDER_EXAMPLES=4", "EPOCHS=1",
                        "ATTACKER_EXAMPLES=4", "PROBE=4", "REPLY_TOKENS=6", "THINK_TOKENS=6",
                        "LORA_RANK=2", *words])

    def rl(*words):
        with pytest.MonkeyPatch.context() as patch:
            stage = import_stage("02_selfplay_rl")
            keep_constants(patch, stage)
            stage.main(["MODEL=checkpoints/01_sft", *judge, *SMALL, "STEPS=3", "SAVE_EVERY=1",
                        "LORA_RANK=2", *words])
    return sft, rl


def adapter_of(folder):
    return load_file(folder / adapters.WEIGHTS)


def test_after_the_warm_up_of_a_recipe_comes_its_self_play(chain, monkeypatch, capsys):
    """Which begins with the instruct model, and takes the warm-up's examples alone."""
    sft, _ = chain
    stage = import_stage("01_sft_warmup")
    monkeypatch.setattr(stage, "GPU24", dict(EPOCHS=1))
    for _ in range(2):  # also where it is complete
        sft("--gpu24", "RUN=w")
        said = capsys.readouterr().out
        assert "02_selfplay_rl.py --gpu24 SFT=checkpoints/w/defender.jsonl\n" in said


def test_warm_up_and_self_play_with_an_adapter(chain, workplace, tiny_models, monkeypatch, capsys):
    """The warm-up's adapter is where self-play begins and its reference; resume is bit for bit; an
    adapter of another rank stops; a whole model can be the start too."""
    sft, rl = chain
    sft()
    start = workplace / "checkpoints" / "01_sft"
    assert {p.name for p in start.iterdir()} == {
        adapters.CONFIG, adapters.WEIGHTS, "meta.json", "defender.jsonl"}
    assert "LORA_RANK=2" in stops(rl, "LORA_RANK=4", "RUN=no")
    rl("RUN=whole")
    rl("RUN=cut", "STEPS=1")
    capsys.readouterr()
    rl("RUN=cut")
    assert "resumed from checkpoints/cut/step_000001" in capsys.readouterr().out
    runs = [workplace / "checkpoints" / name / "step_000003" for name in ("whole", "cut")]
    first, whole, cut = adapter_of(start), *map(adapter_of, runs)
    assert first.keys() == whole.keys()
    assert any(not torch.equal(first[name], whole[name]) for name in first)
    for name in whole:
        assert torch.equal(whole[name], cut[name])
    games = [workplace / "results" / "runs" / name / "games.jsonl" for name in ("whole", "cut")]
    assert games[0].read_bytes() == games[1].read_bytes()
    metrics = pandas.read_csv(games[0].with_name("metrics.csv"))
    assert abs(metrics["kl"][0]) < 1e-5 < abs(metrics["kl"][2])  # the reference is the warm-up
    assert sum(p.stat().st_size for p in runs[0].iterdir()) < 200_000

    rl(f"MODEL={tiny_models['llama']}", f"SFT={start}/defender.jsonl", "RUN=fresh")
    config = json.loads((runs[0].parents[1] / "fresh" / "step_000003" / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == tiny_models["llama"]
    model, _ = models.load_model(str(runs[0]), "float32")
    assert type(model).__name__ == "Qwen2ForCausalLM"


def test_the_policy_is_as_large_as_the_adapter(chain, workplace, monkeypatch):
    """Reference and policy hold one set of weights, and the optimizer knows the adapter alone."""
    sft, rl = chain
    sft()
    stage, seen = import_stage("02_selfplay_rl"), []
    monkeypatch.setattr(stage, "one_step", lambda r, step: seen.append(r) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rl("RUN=a")
    policy, reference = dict(seen[0].policy["defender"].named_parameters()), seen[0].ref.named_parameters()
    shared = [name for name, p in reference if p.data_ptr() == policy[name].data_ptr()]
    assert shared == [name for name in policy if "lora_" not in name]
    assert len(seen[0].optimizer.params) == len(policy) - len(shared)
    assert not any(p.requires_grad for p in seen[0].ref.parameters())


def test_merge_makes_an_ordinary_model(loaded, tiny_models, tmp_path):
    base, tok = models.load_model(tiny_models["qwen2"], "float32")
    model = with_lora(base)
    models.save_checkpoint(tmp_path / "a", model, tok, dict(stage="02", constants=dict(COT=False)))
    merge.main([str(tmp_path / "a"), str(tmp_path / "out")])
    from transformers import AutoModelForCausalLM
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["constants"]["COT"] is False
    assert "exists" in stops(merge.main, [str(tmp_path / "a"), str(tmp_path / "out")])
    assert "adapter_config.json" in stops(merge.main, [tiny_models["qwen2"], str(tmp_path / "x")])
    assert "usage" in stops(merge.main, ["x"])


def test_interpolate_lies_between_two_adapters(workplace, tiny_models, monkeypatch):
    """Against the weighted sum of both models' merged weights in float64; ranks and scales may
    differ. Shares 0 and 1 give the two ends; another base, or a word for a share, stops."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import interpolate
    base, tok = models.load_model(tiny_models["qwen2"], "float32")
    ends, weights = [], []
    for name, rank, noise in (("a", 2, 0.1), ("b", 3, -0.2)):
        model = with_lora(base, rank, noise)
        ends.append(str(workplace / name))
        models.save_checkpoint(workplace / name, model, tok, dict(constants=dict(COT=True)))
        weights.append({n: w.double() for n, w in merge.merge(model).state_dict().items()})
    changed = [n for n in weights[0] if not torch.equal(weights[0][n], weights[1][n])]
    assert len(changed) > 6
    words = [f"START={ends[0]}", f"END={ends[1]}"]
    keep_constants(monkeypatch, interpolate)
    interpolate.main([*words, "SHARES=0,0.3,1"])
    for share in (0.0, 0.3, 1.0):
        folder = workplace / "checkpoints" / f"interpolated_{round(100 * share):03d}"
        between = merge.merge(models.load_model(str(folder), "float32")[0]).state_dict()
        for n in changed:
            want = (1 - share) * weights[0][n] + share * weights[1][n]
            torch.testing.assert_close(between[n].double(), want, atol=1e-6, rtol=1e-5)
        made = json.loads((folder / "meta.json").read_text())
        assert made["interpolated"]["share"] == share and made["constants"]["COT"] is True
    for word in ("1.5", "half", "nan"):
        assert "SHARES" in stops(interpolate.main, [*words, f"SHARES={word}"])
    other, tok = models.load_model(tiny_models["llama"], "float32")
    models.save_checkpoint(workplace / "c", with_lora(other), tok, dict(constants={}))
    assert "different models" in stops(interpolate.main, [words[0], f"END={workplace / 'c'}"])


# ---- less memory ---------------------------------------------------------------------------------

def token_gradients(model, prompts, completions):
    """Log-probabilities, and the gradient of their sum, of each adapter weight."""
    logp, _ = token_logprobs(model, prompts, completions)
    logp.sum().backward()
    return [logp.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(tiny_models, kind, quantize):
    """With an adapter, over bfloat16 and over NF4 weights: the same log-probabilities and gradients
    (a shared opening is computed once without checkpointing, so up to rounding)."""
    prompts, out = [[5, 6, 7, 8, 9], [5, 6, 7, 11]], []
    for checkpointing in (False, True):
        model, _ = models.load_model(tiny_models[kind], "float32", quantize=quantize)
        model = with_lora(model)
        assert sum(p.requires_grad for p in model.parameters()) == 28
        if checkpointing:
            models.checkpoint_gradients(model)
            assert model.training and model.is_gradient_checkpointing
        out.append(token_gradients(model, prompts, [[12, 13, 14], [15]]))
    for a, b in zip(*out):
        tolerance = 0.03 * float(a.abs().max()) if quantize else 1e-5  # NF4 computes in bfloat16
        torch.testing.assert_close(a, b, rtol=1e-4, atol=tolerance)


def test_nf4_weights_are_shared_too(tiny_models):
    model, _ = models.load_model(tiny_models["llama"], "float32", quantize=True)
    policy = adapters.twin(model)
    adapters.choose_weights(policy, 2, 4, 0)
    plain = dict(model.named_parameters())
    for name, p in policy.named_parameters():
        if "lora_" not in name:
            assert p.data_ptr() == plain[name.replace(".base_layer", "")].data_ptr(), name
    scales = 0
    for name, module in model.named_modules():
        if getattr(module, "quant_state", None) is not None:
            other = policy.get_submodule(name)
            other = getattr(other, "base_layer", other)
            assert other.quant_state is module.quant_state is module.weight.quant_state, name
            scales += 1
    assert scales
    assert torch.equal(policy(IDS).logits, model(IDS).logits)


def test_self_play_on_nf4_with_checkpointing(chain, workplace, capsys):
    sft, rl = chain
    sft("BASE_QUANT=nf4", "CHECKPOINTING=true")
    rl("BASE_QUANT=nf4", "CHECKPOINTING=on", "RUN=a", "STEPS=2", "UPDATES=2")
    rl("BASE_QUANT=nf4", "CHECKPOINTING=on", "RUN=b", "STEPS=1", "UPDATES=2")
    rl("BASE_QUANT=nf4", "CHECKPOINTING=on", "RUN=b", "STEPS=2", "UPDATES=2")
    out = capsys.readouterr().out
    assert "folded attention, checkpointing" in out
    folders = [workplace / "checkpoints" / name / "step_000002" for name in "ab"]
    for name, x in adapter_of(folders[0]).items():
        assert torch.equal(x, adapter_of(folders[1])[name])
    assert "LORA_RANK" in stops(rl, "BASE_QUANT=nf4", "LORA_RANK=0", "RUN=c")


def test_an_adapter_for_each_role(chain, workplace, capsys):
    """Two adapters that begin alike; each learns from its own turns, the defender's from the SFT
    mix too. Resume is bit for bit; 03 attacks with the one and answers with the other."""
    sft, rl = chain
    sft()
    start = adapter_of(workplace / "checkpoints" / "01_sft")
    # else all attacks lose alike: those of tiny models have no text
    words = ["ADAPTERS=per_role", "EVAL_EVERY=0", "DECLINED_LOSES=false"]
    rl("RUN=a", *words)
    rl("RUN=b", "STEPS=1", *words)
    rl("RUN=b", *words)
    folders = [workplace / "checkpoints" / name / "step_000003" for name in "ab"]
    own = [adapter_of(folders[0]), adapter_of(folders[0] / "attacker")]
    for kind, place in (("defender", "."), ("attacker", "attacker")):
        first, again = (adapter_of(folder / place) for folder in folders)
        assert first.keys() == start.keys()
        for name in first:
            assert torch.equal(first[name], again[name]), (kind, name)
        assert any(not torch.equal(first[name], start[name]) for name in first)
    assert any(not torch.equal(own[0][name], own[1][name]) for name in start)
    model, _ = models.load_model(str(folders[0] / "attacker"), "float32")
    assert torch.equal(model.get_adapter_state_dict()[
        "model.layers.0.mlp.up_proj.lora_A.weight"],
        own[1]["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"])
    assert "lose its attacker" in stops(rl, f"MODEL={folders[0]}", "RUN=d", "SFT_COEF=0")
    before = models.fingerprint(str(folders[0]))
    (folders[0] / "attacker" / adapters.WEIGHTS).write_bytes(b"x")
    assert models.fingerprint(str(folders[0])) != before
    assert "LORA_RANK" in stops(rl, "LORA_RANK=0", "RUN=c", *words)


@pytest.mark.parametrize("kind", ["per_role", "shared"])
def test_whose_adapter_lies_where(workplace, tiny_models, monkeypatch, kind):
    """A checkpoint of 02 has the defender's adapter in the folder itself and, with
    ADAPTERS=per_role alone, the attacker's in attacker/: bit for bit those of the policy."""
    monkeypatch.setattr(session.monitor, "write_curves", lambda *_: None)
    base, tok = models.load_model(tiny_models["llama"], "float32")
    defender, attacker = with_lora(base), with_lora(base, noise=0.2)
    defender.base_name = attacker.base_name = tiny_models["llama"]
    r = session.Run(dict(attacker=attacker, defender=defender), base, tok, None, None, None, [], [],
                    None, [], {}, 0, workplace)
    scope = dict(vars(import_stage("02_selfplay_rl")), ADAPTERS=kind, RUN="x")
    session.save(scope, r, 3, {})
    folder = workplace / "checkpoints" / "x" / "step_000003"
    places = dict(defender=folder)
    if kind == "per_role":
        places["attacker"] = folder / "attacker"
    assert (folder / "attacker").exists() == ("attacker" in places)
    for role, place in places.items():
        kept, _ = models.load_model(str(place), "float32")
        kept, want = kept.get_adapter_state_dict(), r.policy[role].get_adapter_state_dict()
        assert kept.keys() == want.keys()
        assert all(torch.equal(kept[name], want[name]) for name in want)


def test_only_its_own_turns_move_an_adapter(loaded):
    """With ADAPTERS=per_role the gradient of the attacker's turns is the attacker's alone."""
    stage = import_stage("02_selfplay_rl")
    plain = copy.deepcopy(loaded["llama"][0])
    defender = with_lora(plain)
    policy = dict(attacker=adapters.twin(defender), defender=defender)
    turn = Turn("attacker", "generated_harmful", {}, [5, 6], ids=[7, 8], logps=[-1.0, -1.0])
    logp_N, _ = stage.scored(policy, [turn], [0])
    logp_N.sum().backward()
    assert all(p.grad is None for p in defender.parameters())
    assert any(p.grad is not None for p in policy["attacker"].parameters())
