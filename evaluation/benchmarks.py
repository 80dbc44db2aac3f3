"""The benchmarks of 03_evaluate.py: where each one lies, which rows count, one loader for all.

They come from a folder with the files as their authors publish them, or from the Hugging Face hub.
A bad file (no UTF-8, a missing column, a row without text) stops the run with its name and line."""
from pathlib import Path
from typing import NamedTuple

from engine.run import die, from_hub
from selfplay.data import load_hub_dataset, read_table


class Benchmark(NamedTuple):
    """Two lines of BENCHMARKS with one name are two layouts: the first one that is there counts."""
    name: str
    harmful: bool
    files: str            # patterns below DATA_DIR, spaces between: the first that matches counts
    hub: str              # data set, configuration, split; "": it is not on the hub
    prompt: str           # column of the prompt: the first of these that the row has
    id: str = ""          # column of the id; "" or missing: the row's number
    context: str = ""     # column of a text to set above the prompt
    keep: list = [{}]     # what a row's columns must be; the first of these dicts that it has


XSTEST = ("xstest/xstest_prompts.csv", "walledai/XSTest default test", "prompt", "id", "")
WILDGUARD = ("wildguardtest/*.jsonl wildguardtest/*.parquet wildguardtest/*.csv",
             "allenai/wildguardmix wildguardtest test", "prompt", "", "")
WILDJAILBREAK = ("wildjailbreak/eval.jsonl wildjailbreak/*.tsv wildjailbreak/eval/*.tsv "
                 "wildjailbreak/eval/*.jsonl",
                 "allenai/wildjailbreak eval train", "adversarial", "", "")
BENCHMARKS = [Benchmark(*line) for line in (
    ("harmbench", True, "harmbench/harmbench_behaviors_text_test.csv",
     "csv https://raw.githubusercontent.com/centerforaisafety/HarmBench/main/data/"
     "behavior_datasets/harmbench_behaviors_text_test.csv train",  # the hub has no test split
     "behavior", "behaviorid", "contextstring"),
    ("strongreject", True, "strongreject/strongreject_dataset.csv",
     "walledai/StrongREJECT default train", "forbidden_prompt prompt"),
    ("xstest_unsafe", True, *XSTEST, [{"label": "unsafe"}]),
    ("xstest_safe", False, *XSTEST, [{"label": "safe"}]),
    ("jbb_harmful", True, "jailbreakbench/harmful-behaviors.csv",
     "JailbreakBench/JBB-Behaviors behaviors harmful", "goal", "index"),
    ("jbb_benign", False, "jailbreakbench/benign-behaviors.csv",
     "JailbreakBench/JBB-Behaviors behaviors benign", "goal", "index"),
    ("or_bench_toxic", True, "or_bench/or_bench-toxic.csv or_bench/or-bench-toxic.csv",
     "bench-llm/or-bench or-bench-toxic train", "prompt"),
    ("or_bench_hard", False, "or_bench/or_bench-hard-1k.csv or_bench/or-bench-hard-1k.csv",
     "bench-llm/or-bench or-bench-hard-1k train", "prompt"),
    ("wildguard_vanilla", True, *WILDGUARD,
     [{"prompt_harm_label": "harmful", "adversarial": "false"}]),
    ("wildguard_adversarial", True, *WILDGUARD,
     [{"prompt_harm_label": "harmful", "adversarial": "true"}]),
    ("wildjailbreak_harmful", True, *WILDJAILBREAK,
     [{"data_type": "adversarial_harmful"}, {"label": "1"}]),
    ("wildjailbreak_harmful", True, "wildjailbreak/harmful.jsonl", "", "adversarial"),
    ("wildjailbreak_benign", False, *WILDJAILBREAK,
     [{"data_type": "adversarial_benign"}, {"label": "0"}]),
    ("wildjailbreak_benign", False, "wildjailbreak/benign.jsonl", "", "adversarial"),
    ("dan", True, "dan/*.jsonl", "", "adversarial"))]


def find_files(folder, patterns):
    """The files of the first pattern (of several, spaces between) that `folder` has, by name."""
    for pattern in patterns.split():
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def load_benchmarks(source):
    """A folder or "hub" -> {name: items}; prints a line for each benchmark that is not there. An
    item is dict(id, prompt, benchmark, harmful, text_ships=False)."""
    found, lacking = {}, {}
    for b in BENCHMARKS:
        if b.name in found:
            continue
        if source == "hub":
            tables, why = _hub_tables(b)
        else:
            tables = [(str(file), read_table(file)) for file in find_files(source, b.files)]
            why = f"DATA_DIR has no {b.files.split()[0]}"
        items = []
        for place, rows in tables:
            items += items_of(b, place, rows, several=len(tables) > 1)
        if items:
            found[b.name] = items
        elif tables:
            die(f"{tables[0][0]}: no row with {b.keep[0] or 'a prompt'}")
        else:
            lacking.setdefault(b.name, why)
    for name, why in lacking.items():
        if name not in found:
            print(f"skipped {name}: {why}")
    return found


def items_of(b, place, rows, several=False):
    """Rows [(line number, dict)] of the file `place` -> items of load_benchmarks(), for rows that
    `b` keeps. several: ids begin with the file's name. A missing column or empty prompt stops."""
    items = []
    for number, (line, row) in enumerate(rows, 1):
        row = {name.strip().lower(): value for name, value in row.items()}
        column = next((c for c in b.prompt.split() if c in row), b.prompt)
        wanted = next((values for values in b.keep if values.keys() <= row.keys()), b.keep[0])
        for needed in (column, b.context, *wanted):
            if needed and needed not in row:
                die(f"{place} line {line}: column {needed!r} is missing (it has {', '.join(row)})")
        if any(str(row[c]).strip().lower() != value for c, value in wanted.items()):
            continue
        if not isinstance(row[column], str) or not row[column].strip():
            die(f"{place} line {line}: empty {column!r}")
        prompt, context = row[column].strip(), (row[b.context] if b.context else "") or ""
        if context.strip():  # contextual behaviors: HarmBench's own layout
            prompt = context.strip() + "\n\n---\n\n" + prompt
        own = str(number if row.get(b.id) in (None, "") else row[b.id])
        items.append(dict(id=f"{Path(place).stem}-{own}" if several else own, prompt=prompt,
                          benchmark=b.name, harmful=b.harmful, text_ships=False))
    print(f"{b.name}: {len(items)} of {len(rows)} rows of {Path(place).name}")
    return items


def _hub_tables(b):
    """A benchmark's data set -> ([(its name, [(row number, row)])], why there is none)."""
    import datasets
    if not b.hub:
        return [], "no data set of it on the hub is known here, DATA_DIR=<folder> reads its file"
    datasets.disable_progress_bars()
    name, config, split = b.hub.split()
    how = dict(name=config)
    if name == "csv":
        how = dict(data_files=config, keep_default_na=False)  # an empty cell is an empty text
    elif name == "allenai/wildjailbreak":  # as its card says
        how |= dict(delimiter="\t", keep_default_na=False)
    with from_hub(f"DATA_DIR=hub: {name}"):
        try:
            rows = load_hub_dataset(name, split=split, **how)
        except datasets.exceptions.DatasetNotFoundError as problem:
            return [], f"{str(problem).splitlines()[0]} (accept its terms, then `hf auth login`)"
    return [(name, list(enumerate(rows, 1)))], ""
