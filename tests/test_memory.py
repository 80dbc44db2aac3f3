"""engine/memory.py and what 02 hands to it: parameters, cache and activations of real tiny models;
7B by hand; what to change; PLAN_ONLY."""
import copy

import pytest
import torch
import transformers
from helpers import KINDS, import_stage, keep_constants, stops

import judge
from engine import adapters, cost, memory, models, run, sampling
from selfplay import session
from selfplay.turns import attacker_prompt, defender_prompt

rl = import_stage("02_selfplay_rl")
SEEDS = dict(prompt="words " * 5, harmful=True), dict(prompt="more words " * 5, harmful=False)


# ---- real models ---------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(tiny_models, kind, tied):
    config = transformers.AutoConfig.from_pretrained(tiny_models[kind])
    config.tie_word_embeddings = tied
    model = transformers.AutoModelForCausalLM.from_config(config)
    s = memory.shape(config)
    assert s.weights == sum(p.numel() for p in model.parameters())
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    packed = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    assert len(linear) == 2 * 7 + 1 and s.packed == packed
    embedding = config.vocab_size * 64
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert s.weights == packed + biases + 5 * 64 + embedding * (1 if tied else 2)
    assert (s.layers, s.hidden, s.inner, s.heads, s.kv_heads, s.head_dim, s.vocab) == (
        2, 64, 128, 4, 2, 16, config.vocab_size)
    adapters.choose_weights(model, 3, 3, 0)
    assert 3 * s.ports == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_is_that_of_sampling(tiny_models, monkeypatch, dtype):
    """The room of sampling's cache, and a hand count: 2 x 2 layers x 2 heads x 16 numbers."""
    model, tok = models.load_model(tiny_models["llama"], dtype)
    tok, caches, real = copy.copy(tok), [], sampling._kv_cache
    tok.stop_ids = {-1}
    monkeypatch.setattr(sampling, "_kv_cache", lambda *a: caches.append(real(*a)) or caches[-1])
    sampling.sample(model, tok, [[5] * 11] * 3, 7, 1.0, 8, torch.Generator().manual_seed(0))
    there = 0
    for layer in caches[0].layers:
        for x in (layer.all_keys, layer.all_values):
            there += x.untyped_storage().nbytes()
    s, size = memory.shape(model.config), model.dtype.itemsize
    assert memory.kv_bytes(s, size) == 2 * 2 * 2 * 16 * size
    assert there == 3 * (11 + 7) * memory.kv_bytes(s, size)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_that_autograd_keeps(tiny_models, kind, dtype, rank):
    """All storages that the backward pass of a base model waits for, parameters aside."""
    model, _ = models.load_model(tiny_models[kind], dtype)
    adapters.choose_weights(model, rank, 16, 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()  # keeps the storage, so that no address comes twice

    ids = torch.arange(4 * 48).view(4, 48)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    there = sum(n for at, n in kept.items() if at not in weights) / ids.numel()
    assert out.requires_grad
    s, size = memory.shape(model.config), model.dtype.itemsize
    arithmetic = memory.activation_bytes(s, size, 48, True, rank) - memory.kv_bytes(s, size)  # no cache
    assert there == pytest.approx(arithmetic, rel=0.05)


# ---- 7B, by hand ---------------------------------------------------------------------------------

TURNS = dict(reply=(128, 150, 300), attack=(64, 120, 200))


@pytest.fixture(scope="module")
def seven():
    """(Qwen2.5-7B's shape, that of Mistral-7B, which WildGuard is)."""
    qwen = transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
    mistral = transformers.MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    return memory.shape(qwen), memory.shape(mistral)


def planned(seven, optimizer="master", turns=TURNS, train_tokens=4096, **more):
    return memory.plan(seven[0], [(seven[1], 2, True)], 2, optimizer, turns, train_tokens,
                       judge_tokens=8192, eager=False, **more)


def by_name(rows):
    return {(r.phase, r.name): r.bytes for r in rows}


def test_seven_billion_by_hand(seven):
    """Qwen2.5-7B: a layer has 12,848,640 (q) + 2 x 1,835,520 (k, v) + 12,845,056 (o) + 3 x
    67,895,296 (feed-forward) + 7,168 (norms) = 233,057,792 parameters; 28 of them, 2 x 544,997,376
    (embedding, head) and 3,584 (norm) make 7,615,616,512: 15.2 GB of 10^9 bytes in bfloat16."""
    rows = by_name(planned(seven))
    assert rows["always", "policy"] == rows["always", "reference"] == 15_231_233_024
    assert rows["always", "optimizer master"] == 16 * 7_615_616_512
    assert rows["collect", "gradients"] == 15_231_233_024
    # Mistral: 32 x 218,103,808 packed at 4.5 bits; 2 x 131,072,000 + 65 x 4,096 at 2 bytes
    assert rows["always", "judge"] == 3_925_868_544 + 524_820_480
    # 2 x 28 layers x 4 heads x 128 numbers x 2 bytes = 57,344 a position; 128 rows of 450
    assert rows["reply", "key/value cache"] == 128 * 450 * 57_344 == 3_303_014_400
    assert rows["attack", "key/value cache"] == 64 * 320 * 57_344
    # 128 x 150 positions x ((3 x 18,944 + 2 x 3,584) x 2 bytes + 57,344 that slots copy)
    assert rows["reply", "one pass"] == 4096 * 185_344  # of 19,200: the rest in further pieces
    # 512 x 152,064 x 10 bytes; a head of 544,997,376 x 6 bytes
    assert rows["learn", "logits"] == 778_567_680
    assert rows["learn", "gradient of the head"] == 3_269_984_256
    # a layer: norms 2 x 8 x 3,584, q k v out 4 x 3,584 x 2, feed-forward 4 x 18,944 x 2, mask and
    # sums 450 x 2 + 4 x 28: 238,580; 28 of them, one norm more 28,672, the cache 57,344: 6,766,256
    assert rows["learn", "activations"] == 4096 * 6_766_256
    need, phase = memory.peak(planned(seven))
    assert phase == "learn"
    assert need == sum(n for (when, _), n in rows.items() if when in ("always", "learn"))


def test_kahan_by_hand(seven):
    """10 bytes a parameter; its gradients stay while the next micro-batch is computed."""
    rows = by_name(planned(seven, "kahan"))
    assert rows["always", "optimizer kahan"] == 6 * 7_615_616_512
    assert rows["learn", "gradients"] == 15_231_233_024 and ("collect", "gradients") not in rows
    assert 76_156_165_120 == (rows["always", "policy"] + rows["always", "optimizer kahan"]
                              + rows["learn", "gradients"])


def test_weights_that_do_not_learn_need_no_optimizer(seven):
    """An adapter of rank 8: 16 bytes of state and 2 of gradient each. Its parameters by hand: q and
    o 2 x 7168, k and v 2 x 4096, gate, up and down 3 x 22528, in 28 layers."""
    rows, n = by_name(planned(seven, rank=8)), 8 * 28 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert rows["always", "optimizer master"] == 16 * n
    assert rows["collect", "gradients"] == 2 * n
    assert rows["always", "policy"] == 15_231_233_024 and ("always", "reference") not in rows
    assert rows["always", "adapters"] == 4 * n


def test_a_turn_longer_than_a_micro_batch_is_one(seven):
    rows = planned(seven, turns=dict(reply=(8, 3000, 2000)))
    [activations] = [r for r in rows if r.name == "activations"]
    assert activations.how.startswith("5,000 tokens")


def test_the_paper_block_fits_into_141_gb(seven):
    """By arithmetic; nobody has run it. Prompts of 200 tokens before the attack."""
    c = rl.PAPER
    rows = c["SAMPLE_BATCH"]
    turns = dict(attack=(rows, 300, c["ATTACK_TOKENS"]),
                 reply=(rows, 200 + c["ATTACK_TOKENS"], c["REPLY_TOKENS"]))
    need, _ = memory.peak(planned(seven, c["OPTIMIZER"], turns, c["TRAIN_TOKENS"]))
    assert 100 * memory.GB < need < 131 * memory.GB  # an H200 has 141e9 bytes


@pytest.mark.parametrize("name, gb", [("GPU24", 22.5), ("GPU48", 45.0), ("GPU80", 76.0)])
def test_the_recipes_fit_into_their_cards(seven, name, gb):
    """By arithmetic, WildGuard in NF4 included. Prompts of 200 tokens before the attack."""
    c = dict(vars(rl), **getattr(rl, name))
    turns = dict(attack=(c["SAMPLE_BATCH"], 300, c["ATTACK_TOKENS"]),
                 reply=(c["SAMPLE_BATCH"], 200 + c["ATTACK_TOKENS"], c["REPLY_TOKENS"]))
    need, _ = memory.peak(planned(seven, c["OPTIMIZER"], turns, c["TRAIN_TOKENS"],
                                  rank=c["LORA_RANK"], nf4=c["BASE_QUANT"] == "nf4",
                                  checkpointing=True))
    assert 0.6 * gb * memory.GB < need < gb * memory.GB


def test_nf4_and_checkpointing_by_hand(seven):
    """NF4: .5625 bytes of 6.5e9 packed weights, 2 of the rest. Checkpointing: 28 inputs of 3,584
    numbers a token, and one layer."""
    rows = by_name(planned(seven, rank=32, nf4=True, checkpointing=True))
    packed = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert rows["always", "policy"] == int(0.5625 * packed) + 2 * (7_615_616_512 - packed)
    plain = by_name(planned(seven, rank=32))
    assert rows["learn", "activations"] < plain["learn", "activations"] / 8
    assert rows["learn", "activations"] > 4096 * 28 * 3584 * 2


@pytest.mark.parametrize("rank", [0, 8])
def test_checkpointing_keeps_what_the_plan_says(tiny_models, rank):
    """The inputs of the layers are kept between the two passes; one layer's rest comes later."""
    model, _ = models.load_model(tiny_models["llama"], "float32")
    adapters.choose_weights(model, rank, 16, 0)
    models.checkpoint_gradients(model)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    ids = torch.arange(4 * 48).view(4, 48)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.base_model(input_ids=ids).last_hidden_state.sum()
    there = sum(n for at, n in kept.items() if at not in weights) / ids.numel()
    s = memory.shape(model.config)
    one = memory.activation_bytes(s, 4, 48, True, rank, True)
    layer = memory.activation_bytes(s._replace(layers=1), 4, 48, True, rank)
    assert there < one and one < memory.activation_bytes(s, 4, 48, True, rank)
    assert one == pytest.approx(s.layers * s.hidden * 4 + layer - memory.kv_bytes(
        s._replace(layers=1), 4))


# ---- what 02 plans -------------------------------------------------------------------------------

@pytest.fixture
def here(tiny_models, monkeypatch):
    """02 with a tiny policy and a tiny judge; the folder of the policy."""
    for name, value in dict(MODEL=tiny_models["qwen2"], JUDGE=tiny_models["mistral"],
                            DTYPE="bfloat16", QUANTIZE="none").items():
        monkeypatch.setattr(rl, name, value)
    return tiny_models["qwen2"]


@pytest.fixture
def cuda(monkeypatch):
    """A machine that says it has a GPU."""
    def switch_on():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: True)
    return switch_on


def test_a_plan_is_printed(here, capsys, monkeypatch):
    monkeypatch.setattr(rl, "LORA_RANK", 0)  # an adapter's reference has no weights of its own
    session.plan_memory(vars(rl), here, SEEDS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("memory: ") and lines[-1].endswith("GB free on the CPU")
    for name in ("policy", "reference", "optimizer master", "judge", "key/value cache",
                 "activations", "logits", "gradients"):
        assert sum(f" {name} " in x for x in lines[:-1]) >= 1, name


def test_a_plan_on_a_small_machine(here, cuda, capsys, monkeypatch):
    """On a CPU a warning, on CUDA the end of the run unless MEMORY_CHECK is off."""
    monkeypatch.setattr(memory, "free_bytes", lambda: (1, "a small device"))
    session.plan_memory(vars(rl), here, SEEDS)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("WARNING: will not fit: give a smaller TRAIN_TOKENS")
    assert "smaller MODEL" in said
    cuda()
    for name, value in (("MEMORY_CHECK", False), ("PLAN_ONLY", True)):
        with monkeypatch.context() as m:
            m.setattr(rl, name, value)
            session.plan_memory(vars(rl), here, SEEDS)
        assert "WARNING: will not fit" in capsys.readouterr().out
    text = stops(session.plan_memory, vars(rl), here, SEEDS)
    assert text.startswith("error: will not fit (") and "MEMORY_CHECK=false" in text


@pytest.mark.parametrize("what", ["judge", "policy"])
def test_a_plan_without_a_config(here, capsys, monkeypatch, tmp_path, what):
    """A damaged folder: a line, and the run goes on to where it loads the model. A model that is
    neither here nor to be had stops at once."""
    (tmp_path / "config.json").write_text("{")

    def words(name):
        if what == "judge":
            monkeypatch.setattr(rl, "JUDGE", name)
        return vars(rl), here if what == "judge" else name, SEEDS

    session.plan_memory(*words(str(tmp_path)))
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("memory: not planned")
    name = "some-org/some-model"
    assert f"{name!r} is no local folder" in stops(session.plan_memory, *words(name))


@pytest.fixture
def handed(here, monkeypatch):
    """plan_memory(SEEDS) -> the arguments that memory.plan() got, by name."""
    seen, real = [], memory.plan
    names = "model judges size optimizer turns train_tokens judge_tokens".split()

    def plan(*args, **kwargs):
        seen.append({**dict(zip(names, args)), **kwargs})
        return real(*args, **kwargs)

    monkeypatch.setattr(memory, "plan", plan)

    def call(**constants):
        seen.clear()
        with monkeypatch.context() as m:
            for name, value in constants.items():
                m.setattr(rl, name, value)
            session.plan_memory(vars(rl), here, SEEDS)
        return seen[0]
    return call


@pytest.mark.parametrize("constants, rows, more", [
    (dict(), dict(reply=32, attack=16), 96),                        # half of 32 seeds are attacked
    (dict(SAMPLE_BATCH=8), dict(reply=8, attack=8), 96),
    (dict(ROLES="defender"), dict(reply=32), None),                 # then the longest seed
    (dict(EVAL_EVERY=20), dict(reply=96, attack=96), 96),           # of 4 x 48 dev games
    (dict(EVAL_EVERY=20, EVAL_SEEDS=10), dict(reply=40, attack=20), 96),
    (dict(EVAL_EVERY=20, EVAL_SEEDS=10, ROLES="defender"), dict(reply=40, attack=20), 96),
    # 8 of the pool on top, with as many benign games
    (dict(METHOD="ssp", REPLAY="plain"), dict(reply=48, attack=16), 96),
    (dict(METHOD="ssp", REPLAY="off"), dict(reply=32, attack=16), 96),
    (dict(METHOD="ssp"), dict(reply=48, attack=16), 96 + 112)])     # and an earlier reply is shown
def test_turns_as_long_as_they_may_become(handed, tiny_models, constants, rows, more):
    constants = dict(dict(EVAL_EVERY=0), **constants)
    tok = models.load_model(tiny_models["qwen2"], "float32")[1]
    turns = handed(**constants)["turns"]
    assert {k: v[0] for k, v in turns.items()} == rows
    assert turns["reply"][2] == 112 and turns.get("attack", (0, 0, 96))[2] == 96
    unsafe = "" if more == 96 + 112 else None
    if more is None:
        more = max(len(tok(s["prompt"], add_special_tokens=False).input_ids) for s in SEEDS)
    assert turns["reply"][1] == len(defender_prompt(tok, "", True, unsafe)) + more
    if "attack" in turns:
        assert turns["attack"][1] == max(len(attacker_prompt(tok, s, True)) for s in SEEDS)


def test_other_constants_that_are_handed_over(handed, tiny_models):
    plain = handed()
    assert plain["size"] == 2 and plain["optimizer"] == "master" and plain["eager"] is True
    assert plain["train_tokens"] == rl.TRAIN_TOKENS and plain["judge_tokens"] == judge.JUDGE_TOKENS
    assert [nf4 for _, _, nf4 in plain["judges"]] == [False]
    changed = handed(DTYPE="float32", OPTIMIZER="kahan", TRAIN_TOKENS=64, QUANTIZE="nf4")
    assert changed["size"] == 4 and changed["optimizer"] == "kahan"
    assert changed["train_tokens"] == 64 and [nf4 for _, _, nf4 in changed["judges"]] == [True]
    rubric = dict(RUBRIC_JUDGE=tiny_models["llama"])
    assert len(handed(**rubric)["judges"]) == 1  # only SSP asks it
    assert len(handed(METHOD="ssp", **rubric)["judges"]) == 2


def test_an_embedded_judge_is_never_quantized(tmp_path, cuda):
    """By its name or as a folder with an adapter, as load_judge refuses it; another judge is."""
    (tmp_path / "adapter_config.json").write_text("{}")
    assert not judge.uses_nf4("some/judge", "auto")
    for name, want in (("embedded", False), (str(tmp_path), False), ("some/judge", True)):
        assert bool(judge.uses_nf4(name, "nf4")) is want
        assert not judge.uses_nf4(name, "none")
    cuda()
    assert judge.uses_nf4("some/judge", "auto") and not judge.uses_nf4("embedded", "auto")


# ---- PLAN_ONLY -----------------------------------------------------------------------------------

def test_plan_only_prints_the_plan_and_loads_nothing(here, capsys, monkeypatch, tmp_path):
    def loads(*_, **__):
        raise AssertionError("PLAN_ONLY loads a model")

    monkeypatch.setattr(models, "load_model", loads)
    monkeypatch.setattr(judge, "load_judge", loads)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "checkpoints")
    keep_constants(monkeypatch, rl)
    with pytest.raises(SystemExit) as end:
        rl.main(["PLAN_ONLY=true", "RUN=planned", "STEPS=3"])
    assert end.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("memory: ") and any(" activations " in x for x in lines)
    assert list(tmp_path.iterdir()) == []


def test_the_readme_has_the_arithmetic(seven):
    """Each row of README's table of recipes, for four sizes of Qwen2.5."""
    sizes = {"0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2),
             "3B": (2048, 11008, 36, 16, 2)}
    shapes = {"7B": seven[0]}
    for name, (hidden, inner, layers, heads, kv_heads) in sizes.items():
        shapes[name] = memory.shape(transformers.Qwen2Config(
            vocab_size=151936, hidden_size=hidden, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            tie_word_embeddings=True))
    text = (run.ROOT / "README.md").read_text(encoding="utf-8")
    for flag, block in run.RECIPES.items():
        c, want = dict(vars(rl), **getattr(rl, block)), []
        turns = dict(attack=(c["SAMPLE_BATCH"], 300, c["ATTACK_TOKENS"]),
                     reply=(c["SAMPLE_BATCH"], 200 + c["ATTACK_TOKENS"], c["REPLY_TOKENS"]))
        for name in ("7B", "3B", "1.5B", "0.5B"):
            rows = memory.plan(shapes[name], [(seven[1], 2, True)], 2, c["OPTIMIZER"], turns,
                               c["TRAIN_TOKENS"], 8192, False, c["LORA_RANK"],
                               c["BASE_QUANT"] == "nf4", c["LORA_RANK"] > 0)
            want.append(f"{memory.peak(rows)[0] / memory.GB:.0f}")
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{flag}` |")]
        rows = (c["SEEDS_PER_STEP"] // 2, c["SEEDS_PER_STEP"])
        name, card = cost.find_card(c["CARD"])
        each = sum(cost.seconds(
            card, seven[0], [(seven[1], 2, True)], 2, c["OPTIMIZER"],
            {key: (n, *turns[key]) for key, n in zip(turns, rows)}, c["UPDATES"], c["LORA_RANK"],
            c["BASE_QUANT"] == "nf4", c["LORA_RANK"] > 0,
            looks=2 * c["EVAL_SEEDS"] / c["EVAL_EVERY"]).values())
        disk = cost.disk_bytes(seven[0], 2, c["OPTIMIZER"], c["STEPS"], c["SAVE_EVERY"],
                               c["LORA_RANK"])
        want += [name, f"{each:.0f}", f"{each * c['STEPS'] / 3600:.0f}", f"{disk / memory.GB:.0f}"]
        assert [cell.strip() for cell in row.split("|")[3:11]] == want


def test_shares_of_all_weights_take_less_of_a_card():
    """FSDP: policy, reference, optimizer and gradients are spread, the judge is not; while it
    samples or scores, a model is there as a whole."""
    s = memory.Shape(8_000_000, 6_000_000, 1000, 4, 256, 1024, 4, 2, 64, 4000)
    judge_of = memory.Shape(1_000_000, 0, 0, 2, 64, 128, 4, 2, 16, 500)
    turns = dict(attack=(4, 20, 30), reply=(8, 40, 30))

    def rows(shares):
        return memory.plan(s, [(judge_of, 2, False)], 2, "kahan", turns, 500, 500, eager=False,
                           shares=shares)

    one, four = rows(1), rows(4)
    bytes_of = {(r.phase, r.name): r.bytes for r in four}
    for r in one:
        spread = r.name in ("policy", "reference", "gradients", "optimizer kahan")
        assert bytes_of[r.phase, r.name] == (r.bytes // 4 if spread else r.bytes)
    assert bytes_of["always", "policy"] == 4_000_000
    for phase in ("attack", "reply", "reference"):
        assert bytes_of[phase, "the model as a whole"] == 12_000_000
    # head and embedding (one matrix here), two of four layers, each with its gradient
    assert bytes_of["learn", "parts as a whole"] == 2 * 2 * (1_024_000 + 6_976_000 // 2)
