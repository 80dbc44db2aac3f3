"""evaluation/capability.py: our task files against the harness's, scores against a plain softmax,
resume to the byte, no network."""
import json
import socket
from pathlib import Path

import datasets
import lm_eval.evaluator
import pytest
import torch
from helpers import read_jsonl, stops
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from engine import progress
from evaluation import capability
from evaluation.scores import rate

NAMES = "mmlu,arc_challenge,truthfulqa_mc1"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def mmlu(folder, subject="two_words", tests=1, examples=5):
    """A subject of MMLU with numbered questions; the right answers go round."""
    def rows(what, n):
        return "".join(f'" {what} {k}, with a comma ", {k}a,{k}b,{k}c,{k}d,{"ABCD"[k % 4]}\n'
                       for k in range(1, n + 1))

    write(folder / f"mmlu/dev/{subject}_dev.csv", rows("Example", examples))
    write(folder / f"mmlu/test/{subject}_test.csv", rows("Question", tests))


ARC = [("M_1", "Why?", "C", [("A", "one"), ("B", "number two"), ("C", "three")]),
       ("M_2", "How?", "1", [(x, f"t{x}" * int(x)) for x in "12345"])]
TRUTH = [("Is it?", {"No.": 0, "Yes.": 1}), ("What is it?", {"A cat.": 1, "A dog.": 0, "It.": 0})]


def all_files(folder):
    """The files of the three tasks: 2 questions of MMLU, 2 of ARC, 2 of TruthfulQA."""
    mmlu(folder, tests=2, examples=6)  # the sixth example is not shown
    arc = [dict(id=i, answerKey=key, question=dict(stem=stem, choices=[
        dict(label=x, text=t) for x, t in choices])) for i, stem, key, choices in ARC]
    write(folder / "arc/ARC-Challenge-Test.jsonl", "".join(json.dumps(r) + "\n" for r in arc))
    truth = [dict(question=q, mc1_targets=targets, mc2_targets={}) for q, targets in TRUTH]
    write(folder / "truthfulqa/v1/mc_task.json", json.dumps(truth), "utf-8-sig")


def requests(task, doc):
    """What the harness asks about a question: [(context, continuation)]."""
    shots = task.config.num_fewshot or 0
    made = task.construct_requests(doc, task.fewshot_context(doc, shots), metadata=("", 0, 1))
    return [request.args for request in made]


def harness_task(file, **splits):
    """A task of the harness by its own task file, with rows in the columns of the hub."""
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    data = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    for key in ("tag", "training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in list(data):
            config.pop(key, None)
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})


# ---- questions

def test_prompts_answers_and_metrics_are_those_of_the_harness(tmp_path):
    all_files(tmp_path)
    found = capability.load_questions(NAMES, tmp_path, 0)
    rows = {}
    for split, what, n in (("dev", "Example", 6), ("test", "Question", 2)):
        rows[split] = [dict(question=f" {what} {k}, with a comma ", answer=k % 4,
                            choices=[f" {k}a", f"{k}b", f"{k}c", f"{k}d"])
                       for k in range(1, n + 1)]
    subject = harness_task("mmlu/default/mmlu_abstract_algebra.yaml", **rows)
    subject.set_config("num_fewshot", 5)
    subject.set_config("description", subject.config.description.replace("abstract algebra",
                                                                         "two words"))
    arc = harness_task("arc/arc_challenge.yaml", test=[
        dict(id=i, question=stem, answerKey=key, choices=dict(text=[t for _, t in choices],
                                                              label=[x for x, _ in choices]))
        for i, stem, key, choices in ARC])
    truth = harness_task("truthfulqa/truthfulqa_mc1.yaml", validation=[
        dict(question=q, mc1_targets=dict(choices=list(x), labels=list(x.values())))
        for q, x in TRUTH])
    for name, theirs in (("mmlu", subject), ("arc_challenge", arc), ("truthfulqa_mc1", truth)):
        ours = found[name][0]["task"]
        assert [requests(ours, q["doc"]) for q in found[name]] == [
            requests(theirs, doc) for doc in theirs.eval_docs]
        assert list(ours.aggregation()) == list(theirs.aggregation())
        if name != "truthfulqa_mc1":  # on the hub its first answer is always the right one
            assert [ours.doc_to_target(q["doc"]) for q in found[name]] == [
                theirs.doc_to_target(doc) for doc in theirs.eval_docs]
    assert [q["doc"]["gold"] for q in found["truthfulqa_mc1"]] == [1, 0]
    context, letter = requests(found["mmlu"][0]["task"], found["mmlu"][0]["doc"])[1]
    assert context.startswith("The following are multiple choice questions (with answers) about "
                              "two words.\n\nExample 1, with a comma\nA.  1a\nB. 1b\n")
    assert context.endswith("D. 5d\nAnswer: B\n\nQuestion 1, with a comma\nA.  1a\nB. 1b\nC. 1c\n"
                            "D. 1d\nAnswer:") and letter == " B"


def test_questions_have_ids_of_their_own(tmp_path):
    all_files(tmp_path)
    found = capability.load_questions(f"{NAMES} , ", tmp_path, 0)
    assert {name: [q["id"] for q in qs] for name, qs in found.items()} == {
        "mmlu": ["mmlu/two_words/1", "mmlu/two_words/2"],
        "arc_challenge": ["arc_challenge/M_1", "arc_challenge/M_2"],
        "truthfulqa_mc1": ["truthfulqa_mc1/1", "truthfulqa_mc1/2"]}
    assert capability.load_questions("", tmp_path, 0) == {}


def test_a_limit_is_for_the_task_and_spread_over_the_subjects(tmp_path):
    for subject, n in (("c", 2), ("a", 4), ("b", 6)):
        mmlu(tmp_path, subject, n)
    # In order a1-4, b1-6, c1-2, of 12: places 0, 4, 8.
    ids = [q["id"] for q in capability.load_questions("mmlu", tmp_path, 3)["mmlu"]]
    assert ids == ["mmlu/a/1", "mmlu/b/1", "mmlu/b/5"]
    assert len(capability.load_questions("mmlu", tmp_path, 12)["mmlu"]) == 12


def test_missing_files_are_named(tmp_path, capsys):
    assert capability.load_questions(NAMES, tmp_path, 0) == {}
    assert capsys.readouterr().out.splitlines() == [
        "skipped mmlu: DATA_DIR has no mmlu/test/*_test.csv",
        "skipped arc_challenge: DATA_DIR has no arc/ARC-Challenge-Test.jsonl",
        "skipped truthfulqa_mc1: DATA_DIR has no truthfulqa/v1/mc_task.json"]


GOOD = "q,1,2,3,4,A\n" * 5
ROW = '{"id": "1", "answerKey": "A", "question": {"stem": "s", "choices": [%s]}}\n'


@pytest.mark.parametrize("name, file, text, words", [
    ("mmlu", "mmlu/test/x_test.csv", "q,1,2,3,4,A\nq,1,2,3,A\n", ["x_test.csv"]),
    ("mmlu", "mmlu/test/x_test.csv", "q,1,2,3,4,A\nq,1,2,3,4,E\n", ["x_test.csv"]),
    ("mmlu", "mmlu/test/x_test.csv", 'q,"1,2,3,4,A\n', ["x_test.csv"]),  # a quote without end
    ("mmlu", "mmlu/test/y_test.csv", "q,1,2,3,4,A\n", ["y_test.csv", "y_dev.csv"]),
    ("mmlu", "mmlu/dev/x_dev.csv", "q,1,2,3,4,A\n", ["x_test.csv"]),     # one example
    ("arc_challenge", "arc/ARC-Challenge-Test.jsonl", '{"id": "1"}\n', ["ARC-Challenge", "quest"]),
    ("arc_challenge", "arc/ARC-Challenge-Test.jsonl", ROW % '{"text": "t", "label": "B"}', ["'A'"]),
    ("arc_challenge", "arc/ARC-Challenge-Test.jsonl", "{}\n{\n", ["line 2", "not JSON"]),
    ("arc_challenge", "arc/ARC-Challenge-Test.jsonl", (ROW % '{"text": "t", "label": "A"}') * 2,
     ["same id"]),
    ("truthfulqa_mc1", "truthfulqa/v1/mc_task.json", "[{}", ["mc_task.json"]),
    ("truthfulqa_mc1", "truthfulqa/v1/mc_task.json",
     '[{"question": "q", "mc1_targets": {"a": 1, "b": 1}}]', ["one answer must be marked 1"]),
    ("truthfulqa_mc1", "truthfulqa/v1/mc_task.json", '[{"question": "q"}]', ["mc1_targets"]),
    ("truthfulqa_mc1", "truthfulqa/v1/mc_task.json", "[]", ["mc_task.json", "no question"])])
def test_a_bad_file_stops_in_one_line(tmp_path, name, file, text, words):
    write(tmp_path / "mmlu/dev/x_dev.csv", GOOD)
    write(tmp_path / "mmlu/test/x_test.csv", GOOD)
    write(tmp_path / file, text)
    line = stops(capability.load_questions, name, tmp_path, 0)
    assert all(w in line for w in words), line


# ---- tasks of the harness itself

class Manager:
    """lm_eval.tasks.TaskManager played: `pair` has two tasks, as mmlu has its subjects."""
    all_tasks = ["pair", "mmlu", "offline", "wordless"]

    def __init__(self, **_):
        pass

    def load(self, name):
        if name == "offline":
            raise ConnectionError("no network")
        metric = "perplexity" if name == "wordless" else "acc"
        return dict(tasks={f"{name}_{part}": self.task(f"{name}_{part}", metric) for part in "xy"})

    def task(self, name, metric):
        rows = [dict(q=f"{name} {k}?", gold=k % 2) for k in range(5)]
        return ConfigurableTask(config=dict(
            task=name, custom_dataset=lambda **_: dict(test=datasets.Dataset.from_list(rows)),
            test_split="test", output_type="multiple_choice", doc_to_text="q", doc_to_target="gold",
            doc_to_choice=["yes", "no"], metric_list=[dict(metric=metric, aggregation="mean",
                                                           higher_is_better=True)]))


@pytest.mark.parametrize("source", ["hub", Path("/folder")])
def test_other_tasks_are_the_harness_s_own(source, monkeypatch, loaded, tmp_path):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    questions = capability.load_questions("pair", source, 4)["pair"]
    # of 10: places 0, 2, 5, 7
    assert [q["id"] for q in questions] == ["pair_x/0", "pair_x/2", "pair_y/0", "pair_y/2"]
    capability.ask(*loaded["qwen2"], tmp_path / "pair.jsonl", questions)
    assert [r["id"] for r in read_jsonl(tmp_path / "pair.jsonl")] == [q["id"] for q in questions]
    for name, words in (("none", "has no task 'none'"), ("offline", "hub (ConnectionErr"),
                        ("wordless", "does not count right answers")):
        assert words in stops(capability.load_questions, name, source, 0)


def test_mmlu_of_the_hub_has_five_examples(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    found = capability.load_questions("mmlu,pair", "hub", 0)
    assert {name: {q["task"].config.num_fewshot for q in qs} for name, qs in found.items()} == {
        "mmlu": {5}, "pair": {0}}


# ---- answers

def plain(model, tok, context, continuation):
    """log p(continuation | context) by the whole model on the whole text, in float64."""
    ids, start = tok(context + continuation).input_ids, len(tok(context).input_ids)
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logp[k - 1, ids[k]]) for k in range(start, len(ids)))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral"])
def test_right_is_what_a_plain_softmax_prefers(loaded, kind, tmp_path):
    model, tok = loaded[kind]
    before = (tok.pad_token, len(tok), model.config._attn_implementation)
    all_files(tmp_path)
    tasks = capability.load_questions(NAMES, tmp_path, 0)
    for name, questions in tasks.items():
        want = []
        for q in questions:
            asked, gold = requests(q["task"], q["doc"]), q["doc"]["gold"]
            scores = torch.tensor([plain(model, tok, *pair) for pair in asked])
            want.append(dict(id=q["id"], right=int(scores.argmax()) == gold))
            if name == "arc_challenge":  # by characters, the space before not counted
                scores /= torch.tensor([len(continuation) - 1 for _, continuation in asked])
                want[-1]["right_norm"] = int(scores.argmax()) == gold
        capability.ask(model, tok, tmp_path / f"{name}.jsonl", questions)
        assert read_jsonl(tmp_path / f"{name}.jsonl") == want
    out = capability.score_questions(tmp_path, tasks)
    rows = read_jsonl(tmp_path / "arc_challenge.jsonl")
    assert out["arc_challenge"] == dict(n=2, acc=rate(r["right"] for r in rows),
                                        acc_norm=rate(r["right_norm"] for r in rows))
    assert list(out["mmlu"]) == ["n", "acc"]
    assert (tok.pad_token, len(tok), model.config._attn_implementation) == before


def test_it_is_what_simple_evaluate_says(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # 5 seconds
    model, tok = loaded["qwen2"]
    mmlu(tmp_path, "a", 9)
    mmlu(tmp_path, "b", 8)
    questions = capability.load_questions("mmlu", tmp_path, 0)["mmlu"]
    capability.ask(model, tok, tmp_path / "mmlu.jsonl", questions)
    right = [row["right"] for row in read_jsonl(tmp_path / "mmlu.jsonl")]
    out = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tok), bootstrap_iters=0,
                                  tasks=[questions[0]["task"]],
                                  task_manager=TaskManager(include_defaults=False))
    assert out["results"]["mmlu"]["acc,none"] == pytest.approx(sum(right) / 17)
    assert 0 < sum(right) < 17


@pytest.mark.parametrize("cut", [1, 60, 250])
def test_killed_and_started_again_gives_the_same_bytes(loaded, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(capability, "CHUNK", 5)  # 5, 5 and 4 questions
    for subject in ("a", "b"):
        mmlu(tmp_path, subject, 7)
    questions, path = capability.load_questions("mmlu", tmp_path, 0)["mmlu"], tmp_path / "m.jsonl"
    asked, evaluate = [], lm_eval.evaluate
    monkeypatch.setattr(lm_eval, "evaluate", lambda lm, tasks, samples, **kw: asked.append(
        samples["mmlu"]) or evaluate(lm, tasks, samples=samples, **kw))
    capability.ask(*loaded["qwen2"], path, questions)
    whole = path.read_bytes()
    assert asked == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13]]
    assert [r["id"] for r in read_jsonl(path)] == [q["id"] for q in questions]
    path.write_bytes(whole[:-cut])
    asked.clear()
    capability.ask(*loaded["qwen2"], path, questions)
    assert path.read_bytes() == whole and 1 <= len(asked) <= 2
    asked.clear()
    capability.ask(*loaded["qwen2"], path, questions)
    assert asked == [] and path.read_bytes() == whole  # nothing is asked twice


def test_the_harness_is_quiet_also_about_long_prompts(loaded, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "_enabled", False)
    model, tok = loaded["qwen2"]
    all_files(tmp_path)
    questions = capability.load_questions("arc_challenge", tmp_path, 0)["arc_challenge"]
    monkeypatch.setattr(model.config, "max_position_embeddings", 12)
    capability.ask(model, tok, tmp_path / "b.jsonl", questions)
    assert capfd.readouterr() == ("", "")
    assert len(read_jsonl(tmp_path / "b.jsonl")) == 2
