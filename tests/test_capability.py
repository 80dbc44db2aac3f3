"""capability.py: prompts letter by letter, scores against a plain softmax, resume to the byte."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import benchmarks
import capability
import policy


def stopped(call, *args):
    """The one line with which a call stops."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


# ---- files -> questions

def mmlu(folder, subject="two_words", tests=1, examples=5):
    """A subject of MMLU with numbered questions; the right answers go round."""
    def rows(what, n):
        return "".join(f'" {what} {k}, with a comma ", {k}a,{k}b,{k}c,{k}d,{"ABCD"[k % 4]}\n'
                       for k in range(1, n + 1))

    write(folder / f"mmlu/dev/{subject}_dev.csv", rows("Example", examples))
    write(folder / f"mmlu/test/{subject}_test.csv", rows("Question", tests))


PROMPT = """The following are multiple choice questions (with answers) about two words.

Example 1, with a comma
A.  1a
B. 1b
C. 1c
D. 1d
Answer: B

Example 2, with a comma
A.  2a
B. 2b
C. 2c
D. 2d
Answer: C

Example 3, with a comma
A.  3a
B. 3b
C. 3c
D. 3d
Answer: D

Example 4, with a comma
A.  4a
B. 4b
C. 4c
D. 4d
Answer: A

Example 5, with a comma
A.  5a
B. 5b
C. 5c
D. 5d
Answer: B

Question 1, with a comma
A.  1a
B. 1b
C. 1c
D. 1d
Answer:"""


def test_mmlu_prompt_is_that_of_lm_eval(tmp_path):
    """Five examples (a sixth is not shown), then the question; only the question is stripped."""
    mmlu(tmp_path, examples=6)
    [item] = capability.load(tmp_path)["mmlu"]
    assert item == dict(id="two_words/1", group="two_words", context=PROMPT,
                        choices=[" A", " B", " C", " D"], gold=1)


def test_arc_prompt_is_that_of_lm_eval(tmp_path):
    rows = [dict(id="M_1", answerKey="C", question=dict(stem="Why?", choices=[
                dict(text=t, label=x) for t, x in (("one", "A"), ("two", "B"), ("three", "C"))])),
            dict(id="M_2", answerKey="1", question=dict(stem="How?", choices=[
                dict(text=f"t{x}", label=x) for x in "12345"]))]
    write(tmp_path / "arc/ARC-Challenge-Test.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert capability.load(tmp_path)["arc_challenge"] == [
        dict(id="M_1", group="", context="Question: Why?\nAnswer:", gold=2,
             choices=[" one", " two", " three"]),
        dict(id="M_2", group="", context="Question: How?\nAnswer:", gold=0,
             choices=[" t1", " t2", " t3", " t4", " t5"])]


def test_truthfulqa_prompt_is_that_of_lm_eval(tmp_path):
    rows = [dict(question="Is it?", mc1_targets={"No.": 0, "Yes.": 1}, mc2_targets={})]
    write(tmp_path / "truthfulqa/v1/mc_task.json", json.dumps(rows), "utf-8-sig")
    [item] = capability.load(tmp_path)["truthfulqa_mc1"]
    assert item["context"].startswith(
        "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the "
        "United States is 78 years.\n\nQ: Who was president")
    assert item["context"].endswith("held in Barcelona, Spain.\n\nQ: Is it?\nA:")
    assert item["context"].count("Q: ") == 7
    assert (item["id"], item["choices"], item["gold"]) == ("1", [" No.", " Yes."], 1)


def test_a_limit_is_spread_over_the_subjects(tmp_path):
    for subject, n in (("c", 2), ("a", 4), ("b", 6)):
        mmlu(tmp_path, subject, n)
    # In order a1-4, b1-6, c1-2, of 12: places 0, 4, 8.
    assert [i["id"] for i in capability.load(tmp_path, 3)["mmlu"]] == ["a/1", "b/1", "b/5"]
    assert len(capability.load(tmp_path, 12)["mmlu"]) == len(capability.load(tmp_path)["mmlu"])


def test_missing_sets_are_named(tmp_path, capsys):
    assert capability.load(tmp_path) == {}
    assert capsys.readouterr().out.splitlines() == [
        "skipped mmlu: DATA_DIR has no mmlu/test/*_test.csv",
        "skipped arc_challenge: DATA_DIR has no arc/ARC-Challenge-Test.jsonl",
        "skipped truthfulqa_mc1: DATA_DIR has no truthfulqa/v1/mc_task.json"]


GOOD = "q,1,2,3,4,A\n" * 5


@pytest.mark.parametrize("file, text, words", [
    ("mmlu/test/x_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", ["mmlu/test x line 2", "four answers"]),
    ("mmlu/test/x_test.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", ["mmlu/test x line 2", "letter A to D"]),
    ("mmlu/test/x_test.csv", 'q,"1,2,3,4,A\n', ["x_test.csv", "not a CSV file"]),
    ("mmlu/test/y_test.csv", "q,1,2,3,4,A\n", ["mmlu/dev y", "0 examples, 5 are needed"]),
    ("mmlu/dev/x_dev.csv", "q,1,2,3,4,A\n", ["mmlu/dev x", "1 examples"]),
    ("arc/ARC-Challenge-Test.jsonl", '{"id": "1"}\n', ["ARC-Challenge-Test.jsonl line 1"]),
    ("arc/ARC-Challenge-Test.jsonl", '{"id": "1", "answerKey": "F", "question": {"stem": "s", '
     '"choices": [{"text": "t", "label": "A"}]}}\n', ["line 1", "answerKey"]),
    ("arc/ARC-Challenge-Test.jsonl", "[]\n{\n", ["line 2", "not JSON"]),
    ("truthfulqa/v1/mc_task.json", "[{}", ["mc_task.json", "not a JSON list"]),
    ("truthfulqa/v1/mc_task.json", '[{"question": "q", "mc1_targets": {"a": 1, "b": 1}}]',
     ["mc_task.json question 1", "one answer must be marked 1"]),
    ("truthfulqa/v1/mc_task.json", '[{"question": "q"}]', ["question 1", "mc1_targets"]),
    ("truthfulqa/v1/mc_task.json", "[]", ["mc_task.json", "no question"])])
def test_a_bad_file_stops_in_one_line(tmp_path, file, text, words):
    write(tmp_path / "mmlu/dev/x_dev.csv", GOOD)
    write(tmp_path / "mmlu/test/x_test.csv", GOOD)
    write(tmp_path / file, text)
    line = stopped(capability.load, tmp_path)
    assert all(w in line for w in words), line


def test_two_questions_with_one_id_stop(tmp_path):
    row = json.dumps(dict(id="same", answerKey="A", question=dict(stem="s", choices=[
        dict(text="t", label="A")])))
    write(tmp_path / "arc/ARC-Challenge-Test.jsonl", f"{row}\n{row}\n")
    assert "same id" in stopped(capability.load, tmp_path)


def test_the_hub_gives_the_same_questions(tmp_path, monkeypatch):
    """The three data sets of the hub in their own columns against the files."""
    mmlu(tmp_path, tests=2)
    arc = dict(id="M_1", answerKey="B", question=dict(stem="Why?", choices=[
        dict(text="one", label="A"), dict(text="two", label="B")]))
    write(tmp_path / "arc/ARC-Challenge-Test.jsonl", json.dumps(arc))
    truth = dict(question="Is it?", mc1_targets={"Yes.": 1, "No.": 0})
    write(tmp_path / "truthfulqa/v1/mc_task.json", json.dumps([truth]))

    def fetch(spec):
        name, config, split = spec.split()
        if name == "cais/mmlu":
            what, n = ("Question", 2) if split == "test" else ("Example", 5)
            rows = [dict(question=f" {what} {k}, with a comma ", subject="two_words",
                         choices=[f" {k}a", f"{k}b", f"{k}c", f"{k}d"], answer=k % 4)
                    for k in range(1, n + 1)]
        elif name == "allenai/ai2_arc":
            rows = [dict(id="M_1", question="Why?", answerKey="B",
                         choices=dict(text=["one", "two"], label=["A", "B"]))]
        else:
            rows = [dict(question="Is it?", mc1_targets=dict(choices=["Yes.", "No."],
                                                             labels=[1, 0]))]
        return list(enumerate(rows, 1))

    monkeypatch.setattr(benchmarks, "fetch", fetch)
    assert capability.load("hub") == capability.load(tmp_path)
    monkeypatch.setattr(benchmarks, "fetch", lambda spec: "no such data set")
    assert capability.load("hub") == {}


# ---- scores

def plain(model, context, continuation):
    """log p(continuation | context) by the whole model on the whole text, in float64."""
    ids = torch.tensor([context + continuation])
    logp = torch.log_softmax(model(ids).logits[0].double(), -1)
    return sum(float(logp[len(context) - 1 + k, t]) for k, t in enumerate(continuation))


QUESTIONS = [  # context, continuations: letters, texts of different lengths, one that is another's
    ([11, 12, 13, 14, 15, 16], [[20], [21], [22], [23]]),                # opening
    ([11, 12, 13, 14], [[15, 16, 17], [15, 16], [30], [15]]),
    ([11, 12, 40], [[41, 42, 43, 44, 45], [46]]),
    ([11, 12, 13, 14, 15], [[16], [16, 20]])]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral"])
def test_scores_are_those_of_a_plain_softmax(tiny_models, kind, monkeypatch):
    model, _ = policy.load(tiny_models[kind], "float32")
    with torch.no_grad():
        want = [[plain(model, c, x) for x in choices] for c, choices in QUESTIONS]
    monkeypatch.setattr(policy, "LOGPROB_CHUNK", 3)  # several chunks
    got = capability.loglikelihoods(model, QUESTIONS)
    alone = [capability.loglikelihoods(model, [q])[0] for q in QUESTIONS]
    for a, b, c in zip(got, alone, want):
        assert a == pytest.approx(c, abs=1e-4) and b == pytest.approx(c, abs=1e-4)


def test_letters_cost_one_row(tiny_models, monkeypatch):
    """Four one-token answers are read off one row; what all open with is computed once."""
    model, _ = policy.load(tiny_models["qwen2"], "float32")
    fed, forward = [], model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward",
                        lambda *a, **k: fed.append(tuple(k["input_ids"].shape)) or forward(*a, **k))
    questions = [([5, 6, 7, 8, n], [[20], [21], [22], [23]]) for n in (1, 2, 3)]
    capability.loglikelihoods(model, questions)
    assert fed == [(1, 4), (3, 1)]


def test_continuations_are_what_the_whole_text_adds(tiny_models):
    _, tok = policy.load(tiny_models["llama"], "float32")
    items = [dict(id="1", context="Question: why?\nAnswer:", choices=[" because", " the judge"]),
             dict(id="2", context="x" * 50, choices=[" yes"])]
    encoded, shortened = capability.encode(tok, items, 10 ** 6)
    assert shortened == 0
    for i in items:
        context, choices = encoded[i["id"]]
        assert tok.decode(context) == i["context"] and tok.bos_token_id not in context
        assert [tok.decode(c) for c in choices] == i["choices"]
    n = len(encoded["1"][0]) + max(map(len, encoded["1"][1])) - 1  # tokens that are fed
    cut, shortened = capability.encode(tok, items, n - 2)
    assert cut["1"][0] == encoded["1"][0][2:] and cut["1"][1] == encoded["1"][1]
    assert shortened == 1 + (len(encoded["2"][0]) > n - 2)


def test_right_and_length_normalised_right_by_hand():
    item = dict(id="q", gold=1, choices=[" ab", " abcdefgh"])
    # -4 beats -8; for a character -4 / 2 = -2 loses against -8 / 8 = -1.
    assert capability.answer("arc_challenge", item, [-4.0, -8.0]) == dict(
        id="q", scores=[-4.0, -8.0], gold=1, right=False, right_norm=True)
    assert capability.answer("mmlu", item, [-2.00004, -2.0]) == dict(
        id="q", scores=[-2.0, -2.0], gold=1, right=True)


def test_batches_hold_what_fits(monkeypatch):
    monkeypatch.setattr(capability, "TOKENS", 24)
    encoded = {"a": ([0] * 8, [[1], [2]]), "b": ([0] * 8, [[1], [2]]),       # one row of 8 each
               "c": ([0] * 8, [[1], [2]]), "d": ([0] * 8, [[1]]),
               "e": ([0] * 8, [[1, 2, 3], [4, 2, 3]])}                       # two rows of 10
    items = [dict(id=i) for i in "eabcd"]
    assert [[i["id"] for i in b] for b in capability.cut(items, encoded)] == [
        ["a", "b", "c"], ["d"], ["e"]]


@pytest.mark.parametrize("cut", [1, 60, 250])
def test_killed_and_started_again_gives_the_same_bytes(tiny_models, tmp_path, monkeypatch, cut,
                                                       capsys):
    monkeypatch.setattr(capability, "TOKENS", 2000)  # several batches a subject
    for subject in ("a", "b"):
        mmlu(tmp_path, subject, 7)
    sets, loads = capability.load(tmp_path), []
    (tmp_path / "out").mkdir()

    def loaded():
        loads.append(1)
        return policy.load(tiny_models["qwen2"], "float32")

    capability.run(loaded, tmp_path / "out", sets)
    path = tmp_path / "out/mmlu.jsonl"
    whole = path.read_bytes()
    assert len(loads) == 2 and whole.count(b"\n") == 14
    told = [x for x in capsys.readouterr().out.splitlines() if "mmlu.jsonl: " in x]
    assert told[-1] == "out/mmlu.jsonl: 14 of 14" and all(x.endswith(" of 14") for x in told)
    path.write_bytes(whole[:-cut])
    capability.run(loaded, tmp_path / "out", sets)
    assert path.read_bytes() == whole
    loads.clear()
    capability.run(loaded, tmp_path / "out", sets)
    assert loads == [] and path.read_bytes() == whole  # no model where nothing is missing
    rows = [json.loads(x) for x in whole.splitlines()]
    out = capability.score(tmp_path / "out", sets, lambda values: list(values))
    assert sorted(out["mmlu"]["acc"]) == sorted(r["right"] for r in rows)
    assert out["mmlu"]["n"] == 14 and "acc_norm" not in out["mmlu"]
    assert all(r["right"] == (max(r["scores"]) == r["scores"][r["gold"]]) for r in rows)
