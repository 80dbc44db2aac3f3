"""The benchmarks of 03_evaluate.py: where each one lies, which rows count, one loader for all.

    load_benchmarks(Path("bench"))   from a folder with the files as their authors publish them
    load_benchmarks("hub")           the same from the Hugging Face hub (package `datasets`)

A folder needs no network. A benchmark that is missing is skipped with a line. A bad file (no UTF-8,
a missing column, a row without text) stops the run with its name and line.
"""
from pathlib import Path
from typing import NamedTuple

from engine.run import die
from selfplay.data import read_table

HUB_SECONDS = 5           # how long to wait for a hub that does not answer (ours)


class Benchmark(NamedTuple):
    """Two lines of BENCHMARKS with one name are two layouts: the first one that is there counts."""
    name: str
    harmful: bool
    files: str            # patterns below DATA_DIR, spaces between: the first that matches counts
    hub: str              # data set, configuration, split; "": it is not on the hub
    prompt: str           # column of the prompt: the first of these that the row has
    id: str = ""          # column of the id; "" or missing: the row's number
    context: str = ""     # column of a text to set above the prompt
    keep: str = ""        # column=value words a row has to meet; after " | ": other columns for it


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
    ("xstest_unsafe", True, *XSTEST, "label=unsafe"),
    ("xstest_safe", False, *XSTEST, "label=safe"),
    ("jbb_harmful", True, "jailbreakbench/harmful-behaviors.csv",
     "JailbreakBench/JBB-Behaviors behaviors harmful", "goal", "index"),
    ("jbb_benign", False, "jailbreakbench/benign-behaviors.csv",
     "JailbreakBench/JBB-Behaviors behaviors benign", "goal", "index"),
    ("or_bench_toxic", True, "or_bench/or_bench-toxic.csv or_bench/or-bench-toxic.csv",
     "bench-llm/or-bench or-bench-toxic train", "prompt"),
    ("or_bench_hard", False, "or_bench/or_bench-hard-1k.csv or_bench/or-bench-hard-1k.csv",
     "bench-llm/or-bench or-bench-hard-1k train", "prompt"),
    ("wildguard_vanilla", True, *WILDGUARD, "prompt_harm_label=harmful adversarial=false"),
    ("wildguard_adversarial", True, *WILDGUARD, "prompt_harm_label=harmful adversarial=true"),
    ("wildjailbreak_harmful", True, *WILDJAILBREAK, "data_type=adversarial_harmful | label=1"),
    ("wildjailbreak_harmful", True, "wildjailbreak/harmful.jsonl", "", "adversarial"),
    ("wildjailbreak_benign", False, *WILDJAILBREAK, "data_type=adversarial_benign | label=0"),
    ("wildjailbreak_benign", False, "wildjailbreak/benign.jsonl", "", "adversarial"),
    ("dan", True, "dan/*.jsonl", "", "adversarial"))]


def find_files(folder, patterns):
    """The files of the first pattern (of several, spaces between) that `folder` has, by name."""
    for pattern in patterns.split():
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def load_benchmarks(source):
    """A folder or "hub" -> {name: items}; prints a line for each benchmark that is not there. An
    item is dict(id, prompt, benchmark, harmful, text_ships=False)."""
    if source == "hub":
        _check_hub()
    found, lacking = {}, {}
    for b in BENCHMARKS:
        if b.name in found:
            continue
        if source == "hub":
            tables, why = _hub_tables(b)
        else:
            tables = [(str(file), read_table(file)) for file in find_files(source, b.files)]
            why = f"DATA_DIR has no {b.files.split()[0]}"
        if not tables:
            lacking.setdefault(b.name, why)
            continue
        items = []
        for place, rows in tables:
            items += items_of(b, place, rows, several=len(tables) > 1)
        if not items:
            die(f"{tables[0][0]}: no row" + (f" with {b.keep}" if b.keep else ""))
        found[b.name] = items
    for name, why in lacking.items():
        if name not in found:
            print(f"skipped {name}: {why}")
    return found


def items_of(b, place, rows, several=False):
    """Rows [(line number, dict)] of a file or hub data set -> the items that count. Column names
    match in any case. several: ids begin with the file's name."""
    items = []
    for number, (line, row) in enumerate(rows, 1):
        if not isinstance(row, dict):
            die(f"{place} line {line}: a row must be an object with named fields")
        row = {name.strip().lower(): value for name, value in row.items()}
        column = next((c for c in b.prompt.split() if c in row), None)
        wanted = _wanted(b.keep, row)
        for needed in (column or b.prompt, b.context, *wanted):
            if needed and needed not in row:
                die(f"{place} line {line}: column {needed!r} is missing (it has {', '.join(row)})")
        if any(str(row[c]).strip().lower() != value for c, value in wanted.items()):
            continue
        prompt, context = row[column], (row[b.context] if b.context else "") or ""
        if not isinstance(prompt, str) or not prompt.strip():
            die(f"{place} line {line}: empty {column!r}")
        prompt = prompt.strip()
        if context.strip():  # contextual behaviors: HarmBench's own layout
            prompt = context.strip() + "\n\n---\n\n" + prompt
        own = str(number if row.get(b.id) in (None, "") else row[b.id])
        items.append(dict(id=f"{Path(place).stem}-{own}" if several else own, prompt=prompt,
                          benchmark=b.name, harmful=b.harmful, text_ships=False))
    print(f"{b.name}: {len(items)} of {len(rows)} rows of {Path(place).name}")
    return items


def _wanted(keep, row):
    """The words of Benchmark.keep that are meant for a row's columns -> {column: value}."""
    choices = []
    for words in keep.split(" | "):
        choices.append(dict(word.split("=") for word in words.split()))
    for choice in choices:
        if choice.keys() <= row.keys():
            return choice
    return choices[0]


# ---- the hub -------------------------------------------------------------------------------------

def _check_hub():
    """Stop at once, with one line, where the Hugging Face hub cannot be reached."""
    from huggingface_hub import HfApi, constants
    try:
        if not constants.HF_HUB_OFFLINE:  # offline, what was fetched before can still be read
            HfApi().dataset_info("JailbreakBench/JBB-Behaviors", timeout=HUB_SECONDS)
    except Exception as problem:  # a dozen unrelated types, one meaning (as in models.check_hub)
        die(f"DATA_DIR=hub: the Hugging Face hub cannot be reached ({type(problem).__name__}): "
            "check the network, or give a folder with the files")


def _hub_tables(b):
    """A benchmark's data set -> ([(its name, [(row number, row)])], why there is none). A data set
    that wants its terms accepted first is skipped; no connection stops the run."""
    import datasets
    if not b.hub:
        return [], "no data set of it on the hub is known here, DATA_DIR=<folder> reads its file"
    datasets.disable_progress_bars()
    name, config, split = b.hub.split()
    how = dict(data_files=config) if name == "csv" else dict(name=config)
    if name == "allenai/wildjailbreak":  # as its card says
        how["delimiter"] = "\t"
    if name in ("csv", "allenai/wildjailbreak"):
        how["keep_default_na"] = False  # pandas: an empty cell is an empty text
    try:
        rows = datasets.load_dataset(name, split=split, **how)
        return [(name, list(enumerate(rows, 1)))], ""
    except datasets.exceptions.DatasetNotFoundError as problem:
        return [], (f"{str(problem).splitlines()[0]} (gated data: accept its terms on its page and "
                    "run `hf auth login`)")
    except Exception as problem:  # as in _check_hub
        die(f"DATA_DIR=hub: {name} did not come ({type(problem).__name__}): check the network, or "
            "give a folder with the files")
