"""What a checkpoint still knows, by lm-evaluation-harness (Gao et al.): MMLU, ARC, TruthfulQA, ...

A question is right if the likeliest continuation of its prompt is the right answer; no judge is
asked. CAPABILITY names tasks of the harness. Where DATA_DIR is a folder, mmlu, arc_challenge and
truthfulqa_mc1 read their authors' files in it, by the task files in lm_tasks/, without network. All
others, and all with DATA_DIR=hub, are the harness's own and fetch their data from the Hugging Face
hub. Prompts, examples and scores are the harness's, without chat template; mmlu has five examples.

LIMIT counts the questions of a task in all, evenly spaced, so the subjects of mmlu share them. (The
harness's own `limit` would be LIMIT questions for each of the 57 subjects.)

Output, a line a question: id, right; right_norm too where the task has acc_norm (log-probability
divided by the answer's length).
"""
import contextlib
import copy
import csv
import functools
import io
import json
import logging
from pathlib import Path

from engine.batching import chunks, evenly
from engine.run import die
from evaluation.scores import rate
from selfplay.data import append_missing, read_rows, read_table

FILES = {"mmlu": "mmlu/test/*_test.csv", "arc_challenge": "arc/ARC-Challenge-Test.jsonl",
         "truthfulqa_mc1": "truthfulqa/v1/mc_task.json"}  # below DATA_DIR
SHOTS = 5                 # examples of mmlu (its paper, arXiv 2009.03300)
CHUNK = 64                # questions between two writes to a file (ours)
ROWS = 4                  # prompts at a time on a GPU: all their logits are kept (hardware)


def load_questions(names, source, limit):
    """Tasks of the harness -> {name: questions}, `limit` of each at most (0: all), evenly spaced.
    names: words between commas. source: a folder or "hub". A question is dict(id, doc, task,
    index): the harness's Task and the question's place in it. A task without its file is skipped
    with a line."""
    from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own_files = TaskManager(include_path=Path(__file__).parent / "lm_tasks",
                            include_defaults=False, metadata=dict(folder=str(source)))
    harness = functools.cache(TaskManager)  # takes 6 seconds
    found = {}
    for name in filter(None, map(str.strip, names.split(","))):
        ours = source != "hub" and name in FILES
        if ours and not any(source.glob(FILES[name])):
            print(f"skipped {name}: DATA_DIR has no {FILES[name]}")
            continue
        manager = own_files if ours else harness()
        if name not in manager.all_tasks:
            die(f"CAPABILITY: lm-evaluation-harness has no task {name!r}")
        try:
            tasks = manager.load(name)["tasks"].values()
        except Exception as problem:  # of the hub: a dozen unrelated types, one meaning
            die(f"CAPABILITY: the data of {name} did not come ({type(problem).__name__}): check "
                "the network, or give DATA_DIR=<folder with the files>")
        questions = []
        for task in tasks:
            if not {"acc", "exact_match"} & set(task.aggregation()):
                die(f"CAPABILITY: {name} does not count right answers (acc or exact_match)")
            if task.config.num_fewshot is None:
                task.set_config("num_fewshot", SHOTS if name == "mmlu" and not ours else 0)
            docs = list(task.eval_docs)
            if ours:  # the harness walks over all of them in each call: fast in a list
                task.dataset = dict(test=docs)
            for index, doc in enumerate(docs):
                key = f"{task.task_name}/{doc.get('id', index)}"
                questions.append(dict(id=key, doc=doc, task=task, index=index))
        found[name] = evenly(questions, limit)
    return found


# ---- what the task files call --------------------------------------------------------------------

def read_questions(folder, name, **_):
    """The questions of FILES[name] -> {"test": data set}. A bad file stops with its name."""
    import datasets
    read = dict(mmlu=_mmlu, arc_challenge=_arc, truthfulqa_mc1=_truthfulqa)[name]
    rows = []
    for path in sorted(Path(folder).glob(FILES[name])):
        try:
            rows += read(path)
        except (LookupError, TypeError, AttributeError, ValueError, OSError, csv.Error) as problem:
            die(f"{path}: not a file as its authors publish it ({problem})")
    if len({row["id"] for row in rows}) < max(1, len(rows)):
        die(f"{path}: no question in it, or two with the same id")
    return dict(test=datasets.Dataset.from_list(rows))


def _mmlu(path):
    """One subject. Columns without header: question, A to D, letter; examples from its dev file."""
    subject, parts = path.name.removesuffix("_test.csv"), []
    for file in (path.parent.parent / "dev" / f"{subject}_dev.csv", path):
        parts.append([])
        with open(file, encoding="utf-8-sig", newline="") as f:
            for question, a, b, c, d, letter in filter(None, csv.reader(f, strict=True)):
                text = f"{question.strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
                parts[-1].append((text, "ABCD".index(letter.strip())))
    dev, test = parts
    examples = ""
    for k in range(SHOTS):
        examples += f"{dev[k][0]} {'ABCD'[dev[k][1]]}\n\n"
    for n, (text, gold) in enumerate(test, 1):
        yield dict(id=f"{subject}/{n}", subject=subject.replace("_", " "), prompt=examples + text,
                   gold=gold)


def _arc(path):
    """AI2's JSON lines; a question has three to five answers."""
    for _, row in read_table(path):
        choices, labels = [], []
        for choice in row["question"]["choices"]:
            choices.append(choice["text"])
            labels.append(choice["label"])
        yield dict(id=str(row["id"]), question=row["question"]["stem"],
                   choices=choices, gold=labels.index(row["answerKey"]))


def _truthfulqa(path):
    """A list of questions; of mc1_targets one answer is marked 1."""
    for n, row in enumerate(json.loads(path.read_text(encoding="utf-8-sig")), 1):
        choices, marks = zip(*row["mc1_targets"].items())
        if sum(marks) != 1:
            raise ValueError(f"question {n}: one answer must be marked 1")
        yield dict(id=str(n), question=row["question"], choices=choices, gold=marks.index(1))


# ---- answers -------------------------------------------------------------------------------------

def ask(model, tok, path, questions):
    """Append to the JSONL file `path` what it lacks of the model's answers to `questions`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    cut, logger = [], logging.getLogger("lm_eval.models.huggingface")

    def silence(record):  # its warnings are counted, not shown
        cut.append("Truncating" in record.getMessage())

    def answer(number, batch):
        tasks, places, ids, rows = {}, {}, {}, {}
        for question in batch:
            name, index = question["task"].task_name, question["index"]
            tasks[name] = question["task"]
            tasks[name].set_fewshot_seed(0)
            places.setdefault(name, []).append(index)
            ids[name, index] = question["id"]
        with contextlib.redirect_stderr(io.StringIO()):  # its own bars
            # simple_evaluate does the same, and spends 5 seconds on describing the machine
            out = lm_eval.evaluate(lm, dict(tasks=tasks), samples=places, bootstrap_iters=0)
        for name, samples in out["samples"].items():
            for sample in samples:
                right = sample["acc"] if "acc" in sample else sample["exact_match"]
                row = dict(id=ids[name, sample["doc_id"]], right=bool(right))
                if "acc_norm" in sample:
                    row["right_norm"] = bool(sample["acc_norm"])
                rows.setdefault(row["id"], row)
        return rows.values()

    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # a CPU takes long prompts twice as fast as by "eager"
    logger.setLevel(logging.WARNING)
    logger.addFilter(silence)
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tok), softmax_dtype="float32",
              batch_size=ROWS if model.device.type == "cuda" else 1)  # copy: it may add a pad token
    append_missing(path, chunks(questions, CHUNK), answer)
    logger.removeFilter(silence)
    model.set_attn_implementation(attention)
    if any(cut):
        print(f"{path.parent.name}/{path.name}: {sum(cut)} prompts are longer than the model's "
              "positions and lost their beginning")


def score_questions(folder, tasks):
    """The files of ask() in `folder` -> {task: dict(n, acc, acc_norm where there is one)}."""
    out = {}
    for name, questions in tasks.items():
        rows = {row["id"]: row for row in read_rows(folder / f"{name}.jsonl")}
        rows = [rows[question["id"]] for question in questions]
        out[name] = dict(n=len(rows), acc=rate(row["right"] for row in rows))
        if "right_norm" in rows[0]:
            out[name]["acc_norm"] = rate(row["right_norm"] for row in rows)
    return out
