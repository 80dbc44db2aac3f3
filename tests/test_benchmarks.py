"""evaluation/benchmarks.py: every public layout, and what happens to a bad file."""
import csv
import io
import json

import pytest
from helpers import stops

from evaluation import benchmarks


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def table(header, *rows, delimiter=","):
    """Rows as the text of a CSV file."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([header, *rows])
    return out.getvalue()


def lines(*rows):
    """Rows as JSON lines."""
    return "".join(json.dumps(r) + "\n" for r in rows)


def named(name):
    """The first line of the table with this name."""
    return next(b for b in benchmarks.BENCHMARKS if b.name == name)


# ---- rows -> items

def test_columns_match_in_any_case(tmp_path):
    rows = [(2, {"Goal": " <request #1> ", "INDEX": "7", "other": "x"})]
    [item] = benchmarks.items_of(named("jbb_harmful"), "a.csv", rows)
    assert item == dict(id="7", prompt="<request #1>", benchmark="jbb_harmful", harmful=True,
                        text_ships=False)
    assert list(item) == ["id", "prompt", "benchmark", "harmful", "text_ships"]  # it is hashed


def test_rows_of_the_other_label_are_left_out(capsys):
    rows = list(enumerate((dict(id=str(n), prompt=f"<{n}>", label=label) for n, label in
                           enumerate(["safe", "unsafe", " Safe "], 1)), 2))
    assert [i["id"] for i in benchmarks.items_of(named("xstest_safe"), "x.csv", rows)] == ["1", "3"]
    assert "xstest_safe: 2 of 3 rows of x.csv" in capsys.readouterr().out


def test_context_stands_above_the_behavior():
    rows = [(2, dict(Behavior="<b #1>", BehaviorID="a", ContextString="")),
            (3, dict(Behavior="<b #2>", BehaviorID="b", ContextString="<context, a comma>")),
            (4, dict(Behavior="<b #3>", BehaviorID="c", ContextString=None))]
    items = benchmarks.items_of(named("harmbench"), "h.csv", rows)
    assert [(i["id"], i["prompt"]) for i in items] == [
        ("a", "<b #1>"), ("b", "<context, a comma>\n\n---\n\n<b #2>"), ("c", "<b #3>")]


@pytest.mark.parametrize("name, row, words", [
    ("jbb_harmful", dict(text="x"), ["a.csv line 5", "'goal' is missing", "it has text"]),
    ("strongreject", dict(text="x"), ["'forbidden_prompt prompt' is missing"]),
    ("xstest_safe", dict(id="1", prompt="x"), ["line 5", "'label' is missing"]),
    ("harmbench", dict(behavior="x", behaviorid="1"), ["'contextstring' is missing"]),
    ("xstest_safe", dict(id="1", prompt="  ", label="safe"), ["line 5", "empty 'prompt'"]),
    ("xstest_safe", dict(id="1", prompt=None, label="safe"), ["line 5", "empty 'prompt'"]),
    ("wildjailbreak_benign", dict(adversarial="<b>"), ["line 5", "'data_type' is missing"]),
    ("dan", dict(adversarial=3), ["line 5", "empty 'adversarial'"])])
def test_a_bad_row_stops_with_its_line(name, row, words):
    line = stops(benchmarks.items_of, named(name), "a.csv", [(5, row)])
    assert all(w in line for w in words), line


# ---- every benchmark from its public layout

WILDGUARD = [dict(prompt="<v>", adversarial=False, prompt_harm_label="harmful", response="x"),
             dict(prompt="<a>", adversarial=True, prompt_harm_label="harmful", response=None),
             dict(prompt="<b>", adversarial=True, prompt_harm_label="unharmful", response="x"),
             dict(prompt="<n>", adversarial=True, prompt_harm_label=None, response="x")]
WILDJAILBREAK = [dict(adversarial="<h>", label=1, data_type="adversarial_harmful"),
                 dict(adversarial="<b>", label=0, data_type="adversarial_benign")]
LAYOUTS = [  # file, its text, what is found: {benchmark: (harmful, [(id, prompt)])}
    ("harmbench/harmbench_behaviors_text_test.csv",
     table(["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString",
            "BehaviorID"], ["<b>", "standard", "x", "", "", "some_id"]),
     {"harmbench": (True, [("some_id", "<b>")])}),
    ("strongreject/strongreject_dataset.csv",
     table(["category", "source", "forbidden_prompt"], ["c", "s", "<1>"], ["c", "s", "<2>"]),
     {"strongreject": (True, [("1", "<1>"), ("2", "<2>")])}),
    ("xstest/xstest_prompts.csv",
     table(["id", "prompt", "type", "label", "focus", "note"], ["4", "<s>", "t", "safe", "", ""],
           ["9", "<u>", "t", "unsafe", "", ""]),
     {"xstest_unsafe": (True, [("9", "<u>")]), "xstest_safe": (False, [("4", "<s>")])}),
    ("jailbreakbench/harmful-behaviors.csv",
     table(["Index", "Goal", "Target", "Behavior", "Category", "Source"],
           ["0", "<g>", "t", "b", "c", "s"]), {"jbb_harmful": (True, [("0", "<g>")])}),
    ("jailbreakbench/benign-behaviors.csv",
     table(["index", "goal", "target", "behavior", "category", "source"],
           ["0", "<g>", "t", "b", "c", "s"]), {"jbb_benign": (False, [("0", "<g>")])}),
    ("or_bench/or_bench-toxic.csv", table(["prompt", "category"], ["<t>", "c"]),
     {"or_bench_toxic": (True, [("1", "<t>")])}),
    ("or_bench/or-bench-hard-1k.csv", table(["prompt", "category"], ["<h>", "c"]),
     {"or_bench_hard": (False, [("1", "<h>")])}),
    ("wildguardtest/wildguard_test.jsonl", lines(*WILDGUARD),
     {"wildguard_vanilla": (True, [("1", "<v>")]),
      "wildguard_adversarial": (True, [("2", "<a>")])}),
    ("wildguardtest/test.csv",
     table(WILDGUARD[0], *([str(x) for x in r.values()] for r in WILDGUARD)),
     {"wildguard_vanilla": (True, [("1", "<v>")]),
      "wildguard_adversarial": (True, [("2", "<a>")])}),
    ("wildjailbreak/eval/eval.tsv",
     table(WILDJAILBREAK[0], *(r.values() for r in WILDJAILBREAK), delimiter="\t"),
     {"wildjailbreak_harmful": (True, [("1", "<h>")]),
      "wildjailbreak_benign": (False, [("2", "<b>")])}),
    ("wildjailbreak/eval.jsonl",
     lines(dict(vanilla="<v>", adversarial="", label=1, data_type="vanilla_harmful"),
           *(dict(r, vanilla="") for r in WILDJAILBREAK)),
     {"wildjailbreak_harmful": (True, [("2", "<h>")]),
      "wildjailbreak_benign": (False, [("3", "<b>")])}),
    ("wildjailbreak/eval.jsonl",
     lines(*(dict(adversarial=r["adversarial"], label=r["label"]) for r in WILDJAILBREAK)),
     {"wildjailbreak_harmful": (True, [("1", "<h>")]),
      "wildjailbreak_benign": (False, [("2", "<b>")])}),
    ("wildjailbreak/harmful.jsonl", lines(dict(vanilla="<v>", adversarial="<h>")),
     {"wildjailbreak_harmful": (True, [("1", "<h>")])}),
    ("wildjailbreak/benign.jsonl", lines(dict(vanilla="<v>", adversarial="<b>")),
     {"wildjailbreak_benign": (False, [("1", "<b>")])}),
    ("dan/jailbreak.jsonl", lines(dict(adversarial="<d>", prompt="<p>", vanilla="<v>")),
     {"dan": (True, [("1", "<d>")])})]


@pytest.mark.parametrize("file, text, want", LAYOUTS, ids=[x[0] for x in LAYOUTS])
def test_every_benchmark_loads_from_its_public_layout(tmp_path, capsys, file, text, want):
    write(tmp_path / file, text, "utf-8-sig")
    found = benchmarks.load_benchmarks(tmp_path)
    assert {name: (items[0]["harmful"], [(i["id"], i["prompt"]) for i in items])
            for name, items in found.items()} == want
    assert all(i["benchmark"] == name for name, items in found.items() for i in items)
    skipped = [x for x in capsys.readouterr().out.splitlines() if x.startswith("skipped ")]
    assert len(skipped) == len({b.name for b in benchmarks.BENCHMARKS}) - len(want)
    assert all(": DATA_DIR has no " in x for x in skipped)


def test_the_layouts_above_are_all_of_them():
    assert {name for *_, want in LAYOUTS for name in want} == {
        b.name for b in benchmarks.BENCHMARKS}


def test_several_files_of_one_benchmark_have_ids_of_their_own(tmp_path):
    for name in "ab":
        write(tmp_path / f"dan/{name}.jsonl", lines(dict(adversarial=f"<{name}>")))
    assert [(i["id"], i["prompt"]) for i in benchmarks.load_benchmarks(tmp_path)["dan"]] == [
        ("a-1", "<a>"), ("b-1", "<b>")]


@pytest.mark.parametrize("file, text, words", [
    ("xstest/xstest_prompts.csv", table(["id", "prompt", "label"], ["1", "<u>", "unsafe"]),
     ["xstest_prompts.csv", "no row with {'label': 'safe'}"]),
    ("or_bench/or_bench-toxic.csv", "prompt,category\n", ["or_bench-toxic.csv", "no row"]),
    ("dan/x.jsonl", '{"adversarial": "<a>"}\n["<b>"]\n', ["x.jsonl line 2", "not a JSON dict"])])
def test_a_file_without_any_row_of_its_kind_stops(tmp_path, file, text, words):
    write(tmp_path / file, text)
    assert all(w in stops(benchmarks.load_benchmarks, tmp_path) for w in words)


# ---- the hub

@pytest.fixture
def hub(monkeypatch):
    """The hub played by what each data set has: {(name, configuration, split): rows or error}."""
    import datasets
    known, asked = {}, []

    def load_dataset(path, name=None, split=None, data_files=None, **how):
        asked.append((path, name or data_files, split))
        rows = known.get(asked[-1], datasets.exceptions.DatasetNotFoundError(
            f"Dataset '{path}' is a gated dataset on the Hub.\nAsk for access."))
        if isinstance(rows, Exception):
            raise rows
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return known, asked


def test_the_hub_has_the_same_columns_and_gated_sets_are_skipped(hub, capsys):
    known, asked = hub
    known["JailbreakBench/JBB-Behaviors", "behaviors", "benign"] = [dict(Index=3, Goal="<g>")]
    known["walledai/StrongREJECT", "default", "train"] = [dict(prompt="<s>", category="c")]
    known["allenai/wildjailbreak", "eval", "train"] = WILDJAILBREAK
    found = benchmarks.load_benchmarks("hub")
    assert {k: [(i["id"], i["prompt"]) for i in v] for k, v in found.items()} == {
        "jbb_benign": [("3", "<g>")], "strongreject": [("1", "<s>")],
        "wildjailbreak_harmful": [("1", "<h>")], "wildjailbreak_benign": [("2", "<b>")]}
    out = capsys.readouterr().out
    assert "skipped wildguard_vanilla: Dataset 'allenai/wildguardmix' is a gated dataset" in out
    assert "skipped dan: no data set" in out and "accept its terms" in out
    assert ("bench-llm/or-bench", "or-bench-hard-1k", "train") in asked


def test_a_hub_out_of_reach_stops_with_one_line(hub):
    known, asked = hub
    known["walledai/StrongREJECT", "default", "train"] = ConnectionError("reset")
    known[next(tuple(b.hub.split()) for b in benchmarks.BENCHMARKS if b.name == "harmbench")] = [
        dict(Behavior="<b>", BehaviorID="1", ContextString="")]
    line = stops(benchmarks.load_benchmarks, "hub")
    assert "walledai/StrongREJECT did not come from the Hugging Face hub (ConnectionError)" in line
    assert asked[-1][0] == "walledai/StrongREJECT"  # nothing is asked after it
