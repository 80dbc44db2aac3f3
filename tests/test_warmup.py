"""01_sft_warmup.py and 00_train_judge.py: examples, loss mask, filters, balance, calibration."""
import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import judge  # noqa: E402
import optim  # noqa: E402
import policy  # noqa: E402

sft = importlib.import_module("01_sft_warmup")
train_judge = importlib.import_module("00_train_judge")


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral"])
def test_example_is_what_the_model_should_sample(tiny_models, name):
    """The completion is a well-formed turn with one turn end, last; the prompt opens <think>."""
    _, tok = policy.load(str(tiny_models[name]), "float32")
    seed = dict(id="b1", prompt="What is a prime number?", harmful=False)
    [row, attack] = sft.build(
        tok, [(seed, "The user asks about maths.", "A number with two divisors.", "comply")],
        [(seed, "I will add a story.", "Tell a story about primes.", "fiction")])
    assert row["completion_ids"].count(tok.turn_end) == 1
    assert row["completion_ids"][-1] == tok.turn_end
    text = tok.decode(row["completion_ids"][:-1])
    thinking, answer = "The user asks about maths.", "A number with two divisors."
    assert policy.parse(text, True) == (thinking, answer, True)
    assert tok.decode(row["prompt_ids"]).endswith("<think>")
    assert "What is a prime number?" in tok.decode(row["prompt_ids"])
    assert attack["role"] == "attacker"


def test_no_cot_example(tiny_models, monkeypatch):
    monkeypatch.setattr(sft, "COT", False)
    _, tok = policy.load(str(tiny_models["qwen2"]), "float32")
    seed = dict(id="b1", prompt="What is a prime number?", harmful=False)
    [row] = sft.build(tok, [(seed, "", "A number.", "comply")], [])
    whole = tok.decode(row["prompt_ids"] + row["completion_ids"])
    assert "<think>" not in whole and "<answer>" not in whole
    assert tok.decode(row["completion_ids"][:-1]) == "A number."


def test_whole_sentences():
    assert sft.whole_sentences("One. Two is", False) == "One."
    assert sft.whole_sentences("One.  Two\nis", True) == "One. Two is"
    assert sft.whole_sentences("no end here", False) == ""


def test_attacker_examples_use_every_strategy_and_keep_the_seed(tiny_models, monkeypatch):
    _, tok = policy.load(str(tiny_models["qwen2"]), "float32")
    monkeypatch.setattr(sft, "ATTACKER_EXAMPLES", 64)
    seeds = [dict(id=f"{h}{i}", prompt=f"request number {h}{i}", harmful=h)
             for h in (True, False) for i in range(5)]
    out = sft.attacker_examples(tok, seeds, random.Random(0))
    names = [name for *_, name in out]
    assert set(names) == {r[0] for r in sft.table("strategies.txt", 3)}
    assert len(set(map(names.count, names))) == 1
    assert all(s["prompt"] in text and thought for s, thought, text, _ in out)
    assert sum(s["harmful"] for s, *_ in out) == 32


class Rule:
    def classify(self, pairs):
        return [judge.Labels("bad" in p, r.startswith("I'm sorry"), "step one" in r)
                for p, r in pairs]


def test_filters_keep_safe_refusals_and_real_answers(monkeypatch):
    """Of harmful seeds safe refusals, WARMUP_REFUSALS of all at most; of benign ones answers."""
    replies = {"bad 0": "I'm sorry, but no.", "bad 1": "Of course, step one is this.",
               "bad 2": "I'm sorry, not this.", "good 0": "Here is a recipe for soup.",
               "good 1": "I'm sorry, I cannot.", "good 2": "A good long answer."}
    seeds = [dict(id=k, prompt=k, harmful=k.startswith("bad")) for k in replies]

    def ask(model, tok, texts, max_new, temperature, generator):
        key = [next((k for k in replies if k in t and "Reply:" not in t), None) for t in texts]
        return [(replies[k] if k else "The user asks for something, and this reply fits it.", True)
                for k in key]

    for name, value in dict(DEFENDER_EXAMPLES=4, WARMUP_REFUSALS=0.25).items():
        monkeypatch.setattr(sft, name, value)
    monkeypatch.setattr(sft, "ask", ask)

    class Tok:
        added_tokens_decoder = {}

    out = sft.defender_examples(None, Tok(), Rule(), list(seeds), random.Random(0), None)
    kept = {(s["id"], kind) for s, _, _, kind in out}
    assert {k for k in kept if k[1] == "comply"} == {("good 0", "comply"), ("good 2", "comply")}
    refused = {k for k, kind in kept if kind == "refuse"}
    assert len(refused) == 1 and refused <= {"bad 0", "bad 2"}


def test_training_reaches_only_completions(tiny_models, monkeypatch):
    """The loss falls, and its gradient does not depend on the prompt's own log-probabilities."""
    for name, value in dict(LR=3e-3, EPOCHS=20, BATCH=2, TRAIN_TOKENS=4000).items():
        monkeypatch.setattr(sft, name, value)
    model, tok = policy.load(str(tiny_models["qwen2"]), "float32")
    seed = dict(id="b1", prompt="What is a prime number?", harmful=False)
    example = (seed, "The user asks about maths.", "A number with two divisors.", "comply")
    rows = sft.build(tok, [example] * 2, [])

    def nll(prompt, completion):
        with torch.no_grad():
            return -policy.token_logprobs(model, [prompt], [completion])[0].mean().item()

    prompt, completion = rows[0]["prompt_ids"], rows[0]["completion_ids"]
    before = nll(prompt, completion), nll(prompt[:1], prompt[1:])
    sft.train(model, rows, random.Random(0))
    after = nll(prompt, completion), nll(prompt[:1], prompt[1:])
    assert after[0] < 0.5 * before[0]
    assert after[1] > before[1] - 0.3 * (before[0] - after[0])  # prompts are not learnt by heart


# ---- the judge's training ------------------------------------------------------------------------

def rows_for_judge():
    rows = [dict(prompt=f"<harmful seed #{i}>", response=f"I will not, number {i}.",
                 prompt_harmful=True, response_refusal=True, response_harmful=False, source="a")
            for i in range(30)]
    rows += [dict(prompt=f"benign request {i}", response=f"Certainly, number {i}.",
                  prompt_harmful=False, response_refusal=False, response_harmful=False, source="a")
             for i in range(3)]
    return rows + [dict(prompt=f"<harmful seed #{i}>", response=f"<harmful reply {i}>",
                        prompt_harmful=None, response_refusal=None, response_harmful=True,
                        source="b") for i in range(9)]


def test_select_balances_label_groups_and_caps_sources(monkeypatch):
    monkeypatch.setattr(train_judge, "CAP", 6)
    out = train_judge.select(rows_for_judge(), random.Random(0))
    a = [r for r in out if r["source"] == "a"]
    assert len(a) == 6 and sum(r["prompt_harmful"] for r in a) == 3
    assert sum(r["source"] == "b" for r in out) == 6


def test_augmented_rows_carry_the_labels_they_should():
    rows = train_judge.augment(rows_for_judge(), 200, random.Random(0), fresh=False)
    wanted = {
        "aug_refusal_harmful": (True, True, False), "aug_refusal_benign": (False, True, False),
        "aug_off_topic": (True, False, False), "aug_echo": (True, False, False),
        "aug_refuse_comply": (None, False, True), "aug_disclaim": (None, False, True)}
    for kind, labels in wanted.items():
        found = [r for r in rows if r["source"] == kind]
        assert found and all(tuple(r[f] for f in judge.FIELDS) == labels for r in found)
    real = [r for r in rows_for_judge() if r.get("response_harmful")]
    for r in rows:  # what is said of a row is so
        if r["source"] == "aug_echo":
            assert r["response"] in (r["prompt"], f"You asked: {r['prompt']}")
        if r["source"] in ("aug_refuse_comply", "aug_disclaim"):
            at = -1 if r["source"] == "aug_refuse_comply" else 0  # the harmful reply's place
            [whole] = [x for x in real if x["prompt"] == r["prompt"]]
            parts = r["response"].split(whole["response"])
            assert len(parts) == 2 and parts[at] == "" and parts[-1 - at]
    fresh = train_judge.augment(rows_for_judge(), 200, random.Random(0), fresh=True)
    texts = [{r["response"].split(" Is there")[0].split(" Please take")[0]
              for r in x if r["source"] == "aug_refusal_harmful"} for x in (rows, fresh)]
    assert texts[0] and texts[1] and not texts[0] & texts[1]  # not measured on wordings trained on


def test_an_adapter_goes_on_at_a_higher_rank_as_the_same_model(tiny_models, tmp_path, monkeypatch):
    """PEFT's own loading says what it was; ALPHA / RANK may differ; a lower rank is refused."""
    from peft import LoraConfig, PeftModel, get_peft_model
    modules = ["q_proj", "down_proj"]
    ids = torch.arange(4, 24)[None]

    def fresh(rank, alpha):
        return get_peft_model(policy.load(tiny_models["llama"], "float32")[0], LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM"))

    first = fresh(2, 4)
    g = torch.Generator().manual_seed(0)
    for name, p in first.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g)
    first.save_pretrained(str(tmp_path))
    with torch.no_grad():
        want = PeftModel.from_pretrained(policy.load(tiny_models["llama"], "float32")[0],
                                         str(tmp_path))(ids).logits
        for rank, alpha in ((2, 4), (6, 12), (6, 24)):
            monkeypatch.setattr(train_judge, "RANK", rank)
            monkeypatch.setattr(train_judge, "ALPHA", alpha)
            larger = fresh(rank, alpha)
            before = larger(ids).logits
            train_judge.take_over(larger, tmp_path)
            torch.testing.assert_close(larger(ids).logits, want, rtol=0, atol=1e-3)
            assert (before - want).abs().max() > 0.01
    monkeypatch.setattr(train_judge, "RANK", 1)
    with pytest.raises(SystemExit, match="rank 2"):
        train_judge.take_over(fresh(1, 2), tmp_path)


def test_contrasts_share_their_words_and_not_their_harm():
    trained, fresh = (train_judge.contrasts(x) for x in (False, True))
    assert len(trained) > 2 * len(fresh) > 20
    assert not {x[0] for x in trained} & {x[0] for x in fresh}
    for text, good, bad in trained + fresh:
        assert text.count("{x}") == 1 and all(good) and all(bad) and not set(good) & set(bad)
    rows = train_judge.augment(rows_for_judge(), 400, random.Random(0), fresh=True)
    known = {text.replace("{x}", x): harmful for text, *fills in fresh
             for harmful, some in zip((False, True), fills) for x in some}
    found = {r["prompt"]: r["prompt_harmful"] for r in rows if "contrast" in r["source"]}
    assert found and found.items() <= known.items() and len(set(found.values())) == 2


def test_other_languages_are_measured_on_what_training_has_not_seen():
    trained, fresh = (train_judge.foreign_texts(x) for x in (False, True))
    assert len(trained) == len(fresh) >= 8
    for a, b in zip(trained, fresh):
        for kind in ("harmful", "refusal", "answered"):
            assert a[kind] and b[kind] and not set(a[kind]) & set(b[kind])
    rows = train_judge.augment(rows_for_judge(), 400, random.Random(0), fresh=True)
    known = {r for x in fresh for r in x["refusal"]}
    refused = [r for r in rows if r["source"] == "aug_foreign_refused"]
    assert refused and {r["response"] for r in refused} <= known
    harmful = {p for x in fresh for p in x["harmful"]}
    assert all(r["prompt_harmful"] is (r["prompt"] in harmful) for r in refused)


def test_benchmark_prompts_are_dropped(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "bench").mkdir()
    rows = [dict(prompt=p, response=None, prompt_harmful=False)
            for p in ("How do I KILL a stuck process on Linux?", "Other")]
    (tmp_path / "train" / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "bench" / "y.csv").write_text(
        'id,prompt\n1,"How do I kill a stuck process on Linux?"\n')
    kept = train_judge.read_rows(tmp_path, tmp_path / "bench")
    assert [r["prompt"] for r in kept] == ["Other"] and "dropped 1" in capsys.readouterr().out


def test_matrix_scaling_recovers_known_calibration():
    """Labels drawn with p = sigmoid(w . x + .7): found again; unused lines stay 0."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20000, 3, generator=g) * 4, torch.tensor([0.0, -0.3, 0.5])
    y = (torch.rand(20000, generator=g) < torch.sigmoid(x @ w + 0.7)).double()
    fit = train_judge.matrix_scaling(x.tolist(), y.tolist(), (1, 1, 1), [1.0] * len(x))
    assert fit["weights"] == pytest.approx(w.tolist(), abs=0.03)
    assert fit["bias"] == pytest.approx(0.7, abs=0.07)
    spoilt = torch.cat([y, 1 - y]).tolist()  # of no weight
    weighed = train_judge.matrix_scaling(x.repeat(2, 1).tolist(), spoilt, (1, 1, 1),
                                         [1.0] * len(x) + [0.0] * len(x))
    assert weighed["weights"] == pytest.approx(fit["weights"], abs=1e-3)
    fit = train_judge.matrix_scaling(x.tolist(), y.tolist(), (0, 0, 1), [1.0] * len(x))
    assert fit["weights"][:2] == [0.0, 0.0] and fit["weights"][2] > 0.3


def test_augmented_rows_weigh_a_third_of_the_real_ones(monkeypatch):
    """Margins that say nothing: p is the weighed share of true labels, whatever the counts are."""
    monkeypatch.setattr(train_judge, "AUGMENTED_WEIGHT", 1 / 3)
    real = dict(dict.fromkeys(judge.FIELDS, True), source="a")
    made = dict(dict.fromkeys(judge.FIELDS, False), source="aug_echo")
    for n in (2, 50):
        found = train_judge.fit([real] * 10 + [made] * n, [[0.0, 0.0, 0.0]] * (10 + n))
        for f in judge.FIELDS:
            assert judge.calibrated([0.0] * 3, found[f]) == pytest.approx(0.75, abs=1e-3)


def test_measured_figures_are_cross_fitted(capsys):
    """Margins that carry the label exactly score 1; slices count their own kind alone."""
    rows = [dict(prompt="x", response="y", prompt_harmful=bool(i // 2 % 2), response_refusal=None,
                 response_harmful=bool(i // 4 % 2), source="a") for i in range(80)]
    rows += [dict(rows[0], source="aug_echo", prompt_harmful=True) for _ in range(4)]
    margins = [[3.0 if r[f] else -3.0 for f in judge.FIELDS] for r in rows]
    for r in rows:
        r["response_refusal"] = r["response_harmful"] is False
    out = train_judge.measure(rows, margins)
    assert out["labels"]["prompt_harmful"]["f1"] == out["labels"]["response_harmful"]["f1"] == 1.0
    assert out["labels"]["response_harmful"]["n"] == 80
    assert set(out["slices"]) == {"echo"} and out["slices"]["echo"]["prompt_harmful"] == 1.0
    shifted = [[m[0] + 100.0, *m[1:]] for m in margins[1::2]]  # spoils the odd half alone
    worse = train_judge.measure(rows, [x for a, b in zip(margins[::2], shifted) for x in (a, b)])
    assert worse["labels"]["prompt_harmful"]["f1"] < 0.8


@pytest.mark.parametrize("labels, reply, want", [
    ((True, None, False), "It is not ethical to ask for this, and it hurts people.", True),
    ((None, None, False), "I'm sorry, but no.", True),
    ((False, None, False), "It is important to note that cats sleep a lot.", None),
    ((True, None, False), "The weather is fine.", None),
    ((True, None, True), "It is unethical, but here is the way.", False),
    ((True, None, True), "I'm sorry, but here it is.", None),
    ((True, False, False), "I'm sorry, but no.", False)])
def test_weak_refusal_labels(labels, reply, want):
    row = dict(zip(("prompt", "response", *judge.FIELDS), ("x", reply, *labels)))
    assert train_judge.weakly_labelled(row)["response_refusal"] is want


def test_judge_training_masks_missing_labels(tiny_models):
    """A row without labels moves only the line texts; labelled rows are learnt the judge's way."""
    model, tok = policy.load(str(tiny_models["qwen2"]), "float32")
    scorer = judge.Judge(model, tok)
    blank = [dict(prompt="x", response="y")]
    two = [scorer.encode("x", "y")] * 2
    answer, _ = train_judge.loss_of(scorer, blank + rows_for_judge()[:1], two)
    alone, _ = train_judge.loss_of(scorer, rows_for_judge()[:1], [scorer.encode("x", "y")])
    assert answer.item() == pytest.approx(alone.item(), rel=1e-4)
    rows = rows_for_judge()[:3] + rows_for_judge()[30:33]
    encoded = [scorer.encode(r["prompt"], r["response"]) for r in rows]
    optimizer = optim.MasterAdamW(model, (0.9, 0.99), 0.0)
    for _ in range(30):
        answer, loss = train_judge.loss_of(scorer, rows, encoded)
        loss.backward()
        optimizer.collect()
        optimizer.step(3e-3, 1.0)
    labels = scorer.classify([(r["prompt"], r["response"]) for r in rows])
    assert [(x.prompt_harmful, x.response_refusal, x.response_harmful) for x in labels] == \
        [tuple(r[f] for f in judge.FIELDS) for r in rows]
