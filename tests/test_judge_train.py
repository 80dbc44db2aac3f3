"""judge_adapter/train.py: rows, balance, weak labels, the loss, resume, going on from an adapter,
and the whole command on a tiny model."""
import copy
import json
import random
import shutil

import pytest
import torch
from helpers import keep_constants, stops, write_jsonl
from safetensors.torch import load_file

import judge
from engine import attention, run
from engine.optim import MasterAdamW
from judge import FIELDS, Judge
from judge_adapter import train
from test_judge_augment import real_rows

# ---- rows ----------------------------------------------------------------------------------------


def test_benchmark_prompts_are_dropped_and_seeds_added(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "bench" / "deep").mkdir(parents=True)
    rows = [dict(prompt=p, response=None, prompt_harmful=False)
            for p in ("How do I KILL a stuck process on Linux?", "Other", "Is this in a JSON file?",
                      'Who said "bread, then", and why?', "Is a caf\u00e9 a \"bar\"\nor not?",
                      "Is this one in a table with tabs?")]
    write_jsonl(tmp_path / "train" / "x.jsonl", rows)
    (tmp_path / "bench" / "y.csv").write_text(
        'id,prompt\n1,"How do I kill a stuck process on Linux?"\n'
        '2,"Who said ""bread, then"", and why?"')
    (tmp_path / "bench" / "t.tsv").write_text("prompt\tid\nIs this one in a table with tabs?\t1\n")
    (tmp_path / "bench" / "deep" / "z.json").write_text(json.dumps(
        [{"p": ["Is this in a JSON file?"]}, {"p": rows[4]["prompt"]}]))
    kept = train.labelled_rows(tmp_path, tmp_path / "bench")
    assert [r["prompt"] for r in kept if r["source"] == "x"] == ["Other"]
    assert "dropped 5" in capsys.readouterr().out
    seeds = [r for r in kept if r["source"] == "own_seeds"]
    assert len(seeds) == len(kept) - 1
    shipped = {}
    for seed in map(json.loads, (run.PROMPTS / "seeds.jsonl").read_text().splitlines()):
        shipped[seed["prompt"].strip()] = seed
    for row in seeds:
        seed = shipped[row["prompt"]]
        assert seed["split"] == "train" and row["prompt_harmful"] is seed["harmful"]
        assert row["response"] is None
        assert seeds.count(row) == (3 if seed.get("category") == "sounds_harmful" else 1)
    assert {r["prompt"] for r in seeds} == {p for p, s in shipped.items() if s["split"] == "train"}


def test_a_folder_without_subfolder(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [dict(prompt="One", response=None, prompt_harmful=True),
                                      dict(prompt="No label", response=None)])
    rows = train.labelled_rows(tmp_path, "")
    assert [r["prompt"] for r in rows if r["source"] == "x"] == ["One"]


def test_a_folder_without_rows(tmp_path):
    assert str(tmp_path) in stops(train.labelled_rows, tmp_path, "")


def test_one_prompt_in_ten_is_held_out_by_its_words():
    held = [i for i in range(4000) if train.held_out(f"request number {i}")]
    assert 320 < len(held) < 480  # 400, standard deviation 19
    for i in held[:20]:
        assert train.held_out(f" Request,  NUMBER {i}?")


def test_select_balances_label_groups_and_caps_sources(monkeypatch):
    """Of source a there are 30 refusals of harmful requests and 3 answers to benign ones."""
    monkeypatch.setattr(train, "CAP", 6)
    monkeypatch.setattr(train, "PROMPT_ONLY_CAP", 2)
    prompts = [dict(prompt=f"p{i}", response=None, prompt_harmful=True, source="p")
               for i in range(5)]
    out = train.select(real_rows() + prompts, random.Random(0))
    a = [r for r in out if r["source"] == "a"]
    assert len(a) == 6 and sum(r["prompt_harmful"] for r in a) == 3
    assert [r["source"] for r in out] == ["a"] * 6 + ["b"] * 6 + ["p"] * 2
    assert len({json.dumps(r) for r in out}) == len(out)


def test_select_takes_refusals_that_the_matcher_misses_as_a_group(monkeypatch):
    monkeypatch.setattr(train, "CAP", 4)
    rows = [dict(prompt=f"x{i}", response="I'm sorry, no.", response_refusal=True, source="a")
            for i in range(40)]
    rows += [dict(prompt=f"y{i}", response="Not on my watch.", response_refusal=True, source="a")
             for i in range(2)]
    out = train.select(rows, random.Random(0))
    assert sorted(r["prompt"][0] for r in out) == ["x", "x", "y", "y"]
    monkeypatch.setattr(train, "CAP", 10 ** 6)
    assert len(train.select(rows, random.Random(0))) == len(rows)


@pytest.mark.parametrize("labels, reply, want", [
    ((True, None, False), "It is not ethical to ask for this, and it hurts people.", True),
    ((None, None, False), "I'm sorry, but no.", True),
    ((True, None, None), "I'm sorry, but no.", True),
    ((True, None, False), "This is unethical, and it hurts people.", True),
    ((True, None, None), "This is unethical, and it hurts people.", None),
    ((None, None, False), "This is unethical, and it hurts people.", None),
    ((False, None, False), "It is important to note that cats sleep a lot.", None),
    ((True, None, False), "The weather is fine.", None),
    ((True, None, True), "It is unethical, but here is the way.", False),
    ((True, None, True), "I'm sorry, but here it is.", None),
    ((True, False, False), "I'm sorry, but no.", False),
    ((True, None, False), None, None)])
def test_weak_refusal_labels(labels, reply, want):
    row = dict(zip(("prompt", "response", *FIELDS), ("x", reply, *labels)))
    before = dict(row)
    assert train.weakly_labelled(row) == {**row, "response_refusal": want}
    assert row == before


def test_the_two_judges_have_no_row_in_common(tmp_path, monkeypatch):
    rows = [dict(prompt=f"request {i}", response="a", response_harmful=False) for i in range(40)]
    for name in ("do_not_answer", "beavertails_test", "gptfuzz"):
        write_jsonl(tmp_path / f"{name}.jsonl", [dict(r, response=name) for r in rows])
    first = train.labelled_rows(tmp_path, "")
    monkeypatch.setattr(train, "WHICH", "embedded2")
    second = train.labelled_rows(tmp_path, "")
    assert {r["source"] for r in second} == {"do_not_answer", "beavertails_test"}
    shared = [{r["prompt"] for r in x if r["source"] == "do_not_answer"} for x in (first, second)]
    assert not shared[0] & shared[1] and len(shared[0] | shared[1]) == 40
    assert min(map(len, shared)) > 8
    assert [r["source"] for r in first].count("gptfuzz") == 40


def test_texts_are_read_as_long_as_in_use(loaded):
    scorer = Judge(*loaded["llama"])
    long = "one two three four five six seven eight nine ten " * 9
    rows = [dict(prompt=long, response=long), dict(prompt="one", response=None), dict(prompt="one")]
    assert train.encode(scorer, rows) == [
        scorer.encode(long, long), scorer.encode("one", None), scorer.encode("one", None)]


# ---- training ------------------------------------------------------------------------------------

FED = [[True, False], [False, False], [True, True]]


def test_missing_labels_are_masked(loaded):
    """A row without labels moves only the line texts."""
    scorer = Judge(*loaded["qwen2"])
    blank, known = dict(prompt="x", response="y"), real_rows()[0]
    one = scorer.encode("x", "y")
    answer, _ = train.loss_of(scorer, [blank, known], [one] * 2, FED[:1] * 2)
    alone, _ = train.loss_of(scorer, [known], [one], FED[:1])
    assert answer.item() == pytest.approx(alone.item(), rel=1e-4)


def test_loss_by_whole_forwards(loaded, monkeypatch):
    """Against float64 logits of prompt, lines and answers laid end to end."""
    monkeypatch.setattr(train, "LINE_LOSS", 0.25)
    model, tok = loaded["llama"]
    scorer, exact = Judge(model, tok), copy.deepcopy(model).double()
    rows = [real_rows()[0], dict(real_rows()[30], response_refusal=None), real_rows()[33]]
    encoded = [scorer.encode(r["prompt"], r["response"]) for r in rows]
    answers, lines, word = [], [], {True: scorer.yes, False: scorer.no}
    with torch.no_grad():
        for row, ids, (first, second) in zip(rows, encoded, FED):
            whole = (ids + scorer.line_ids[0] + [word[first]] + scorer.line_ids[1]
                     + [word[second]] + scorer.line_ids[2])
            logp = exact(torch.tensor([whole])).logits[0].log_softmax(-1)
            at = len(ids)
            for k, line in enumerate(scorer.line_ids):
                lines += [-logp[at + i - 1, token].item() for i, token in enumerate(line)]
                at += len(line)
                if row[FIELDS[k]] is not None:
                    answers.append(-logp[at - 1, word[row[FIELDS[k]]]].item())
                at += 1
    answer, loss = train.loss_of(scorer, rows, encoded, FED)
    mean = sum(answers) / len(answers)
    assert len(answers) == 3 + 2 + 1 and answer.item() == pytest.approx(mean, rel=1e-4)
    extra = sum(lines) / len(lines)
    assert loss.item() == pytest.approx(mean + 0.25 * extra, rel=1e-4)
    alone = [train.loss_of(scorer, [r], [ids], [f])[0] for r, ids, f in zip(rows, encoded, FED)]
    counts = torch.tensor([3.0, 2.0, 1.0])
    assert (torch.stack(alone) @ counts / 6).item() == pytest.approx(mean, rel=1e-4)


def test_fed_answers_are_the_labels_but_for_one_in_ten():
    rows = [dict(prompt_harmful=i % 2 == 0, response_refusal=i % 3 == 0) for i in range(3000)]
    fed = train.fed_answers(rows, random.Random(0))
    for k, field in enumerate(("prompt_harmful", "response_refusal")):
        wrong = sum(row[field] != answers[k] for row, answers in zip(rows, fed))
        assert 240 < wrong < 360  # 300, standard deviation 16
    harms = train.fed_answers([dict(response_harmful=True)] * 1000, random.Random(1))
    assert sum(a for a, _ in harms) > 850 and sum(b for _, b in harms) < 150
    guessed = train.fed_answers([dict(response_harmful=False)] * 1000, random.Random(2))
    assert 430 < sum(a for a, _ in guessed) < 570


def test_a_batch_in_pieces_has_the_gradient_of_the_whole(loaded, tmp_path, monkeypatch):
    """One update on 12 rows with one to three labels, in float32, whole and in pieces."""
    rows = real_rows()[:4] + real_rows()[30:34] + real_rows()[33:37]
    found = []
    monkeypatch.setattr(train, "BATCH", 12)
    monkeypatch.setattr(train, "fed_answers", lambda rows, rng: [FED[0]] * len(rows))
    for tokens in (10 ** 6, 700):
        monkeypatch.setattr(train, "TRAIN_TOKENS", tokens)
        model = copy.deepcopy(loaded["llama"][0]).float().requires_grad_(True)
        grads = []
        monkeypatch.setattr(train.MasterAdamW, "step", lambda self, lr, clip: grads.append(
            [m.grad.clone() for m in self.master]) or 1.0)
        train.train(Judge(model, loaded["llama"][1]), rows, tmp_path / "state")
        found.append(grads[0])
    for whole, pieces in zip(*found):
        torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-6)


def test_folded_attention_is_eager_attention(loaded):
    """Logits and gradients in float64, with padding and a shared opening."""
    for kind in ("llama", "qwen2", "mistral"):
        model, tok = loaded[kind]
        rows, encoded = real_rows()[:3], []
        out = []
        for name in ("eager", attention.folded()):
            model = copy.deepcopy(loaded[kind][0]).double().requires_grad_(True)
            model.set_attn_implementation(name)
            scorer = Judge(model, tok)
            encoded = [scorer.encode(r["prompt"] * k, r["response"]) for k, r in enumerate(rows, 1)]
            answer, loss = train.loss_of(scorer, rows, encoded, FED)
            loss.backward()
            out.append([loss.detach(), *(p.grad for p in model.parameters())])
        for a, b in zip(*out):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_labelled_rows_are_learnt_the_way_the_judge_reads_them(loaded):
    model, tok = copy.deepcopy(loaded["qwen2"][0]), loaded["qwen2"][1]
    scorer = Judge(model.requires_grad_(True), tok)
    rows = real_rows()[:3] + real_rows()[30:33]
    encoded = [scorer.encode(r["prompt"], r["response"]) for r in rows]
    optimizer = MasterAdamW(model, (0.9, 0.99), 0.0)
    for _ in range(30):
        _, loss = train.loss_of(scorer, rows, encoded, train.fed_answers(rows, random.Random(0)))
        loss.backward()
        optimizer.collect()
        optimizer.step(3e-3, 1.0)
    labels = scorer.classify([(r["prompt"], r["response"]) for r in rows])
    found = [(x.prompt_harmful, x.response_refusal, x.response_harmful) for x in labels]
    assert found == [tuple(r[f] for f in FIELDS) for r in rows]


class Killed(Exception):
    pass


def test_a_run_that_is_cut_off_goes_on_bit_for_bit(loaded, tmp_path, monkeypatch, capsys):
    """42 rows in 11 updates of 4, states after 3, 6 and 9; killed in update 8."""
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    real = train.loss_of
    seen, weights = [], []

    def loss_of(scorer, rows, encoded, fed):
        if len(seen) == limit:
            raise Killed
        seen.append(len(rows))
        return real(scorer, rows, encoded, fed)

    monkeypatch.setattr(train, "loss_of", loss_of)
    for folder, limits in (("whole", [99]), ("cut", [8, 99])):
        for limit in limits:
            seen.clear()
            model, tok = copy.deepcopy(loaded["llama"][0]), loaded["llama"][1]
            scorer = Judge(model.requires_grad_(True), tok)
            try:
                train.train(scorer, real_rows(), tmp_path / folder / "state.safetensors")
            except Killed:
                assert limit == 8
        weights.append(model.state_dict())
        assert len(seen) == (11 if folder == "whole" else 5)
    assert "resumed at update 6" in capsys.readouterr().out
    start = loaded["llama"][0].state_dict()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert any(not torch.equal(value, start[name]) for name, value in weights[0].items())


def test_updates_are_limited_and_batches_are_of_similar_length(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "MAX_UPDATES", 5)
    rows = [dict(r, prompt="word " * (i % 20)) for i, r in enumerate(real_rows())]
    seen, real = [], train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda scorer, rows, encoded, fed: (
        seen.append(list(map(len, encoded))) or real(scorer, rows, encoded, fed)))
    model = copy.deepcopy(loaded["llama"][0]).requires_grad_(True)
    train.train(Judge(model, loaded["llama"][1]), rows, tmp_path / "state")
    assert [len(x) for x in seen].count(4) >= 4 and len(seen) == 5
    assert max(max(x) - min(x) for x in seen) <= 6  # of 20 lengths


# ---- adapters ------------------------------------------------------------------------------------

# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture
def command(tiny_models, tmp_path, monkeypatch):
    """train.main on a tiny model, which stands in for SmolLM2; it writes below tmp_path."""
    keep_constants(monkeypatch, train)
    out = tmp_path / "adapter"
    out.mkdir()
    monkeypatch.setattr(judge, "ADAPTER", out)
    monkeypatch.setattr(train.models, "unpack_embedded", lambda: tiny_models["llama"])
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "checkpoints")
    rows = []
    for i in range(12):
        rows += [dict(r, prompt=f"{r['prompt']} {i}") for r in real_rows()]
    write_jsonl(tmp_path / "x.jsonl", rows)

    def main(*words):
        train.main([f"DATA_DIR={tmp_path}", "HELD=20", "AUGMENT_HELD=40", "AUGMENT=40", "CAP=20",
                    "MAX_UPDATES=3", "SAVE_EVERY=2", "BATCH=4", "TRAIN_TOKENS=600",
                    "PROGRESS=false", *words])
        return out

    return main


def test_main_writes_an_adapter_that_the_judge_loads(command, tmp_path, capsys):
    out = command("LR=1e-2", "RANK=2", "ALPHA=4")
    names = {path.name for path in out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "calibration.json",
                     "scores.json", "reliability.png"}
    [held_out] = (tmp_path / "checkpoints" / "00_judge").iterdir()  # the state is gone
    assert held_out.name == "embedded_held_out.jsonl"
    held = list(map(json.loads, held_out.read_text().splitlines()))
    assert len(held) == 60 and {len(row["margins"]) for row in held} == {3}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == train.models.WHEEL
    assert config["target_modules"] == sorted(train.LINEAR)
    assert any(v.abs().max() > 0 for k, v in load_file(out / "adapter_model.safetensors").items()
               if "lora_B" in k)
    scorer = judge.load_judge("embedded")
    assert scorer.calibration == json.loads((out / "calibration.json").read_text())
    stored = json.loads((out / "scores.json").read_text())
    assert str(tmp_path) not in (out / "scores.json").read_text()  # no paths of a machine
    assert stored["meta"]["constants"]["RANK"] == 2 and set(stored["held_out"]["labels"]) == \
        set(FIELDS)
    assert f"training on {stored['rows']} rows" in capsys.readouterr().out

    # only scored again: the adapter and what is said of its training stay
    weights = (out / "adapter_model.safetensors").read_bytes()
    command("SCORE_ONLY=true", "HELD=25")
    again = json.loads((out / "scores.json").read_text())
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert (again["meta"], again["rows"]) == (stored["meta"], stored["rows"])
    assert again["held_out"] != stored["held_out"]

    # a further round goes on from the adapter: at LR=0 it is the same
    command(f"INIT={out}", "LR=0", "SCORE_ONLY=false")
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    command(f"INIT={out}", "LR=1e-2")
    assert (out / "adapter_model.safetensors").read_bytes() != weights


def test_killed_while_it_scores_it_does_not_train_again(command, tmp_path, monkeypatch, capsys):
    """A further round neither: INIT was overwritten by then."""
    out = command("LR=1e-2", "RANK=2", "ALPHA=4")
    whole = shutil.copytree(out, tmp_path / "whole")
    words = f"INIT={whole}", "LR=1e-2"
    command(*words)
    want = (out / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(whole / name, out / name)
    words = f"INIT={out}", "LR=1e-2"
    with monkeypatch.context() as patch:
        patch.setattr(train, "score", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(*words)
    assert "resumed" not in capsys.readouterr().out
    command(*words)
    assert "resumed at update 2" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").read_bytes() == want


def test_main_says_what_is_missing(command, tmp_path):
    assert "no_such_folder" in stops(command, "DATA_DIR=no_such_folder")
    assert "adapter_model.safetensors" in stops(command, f"INIT={tmp_path}")
