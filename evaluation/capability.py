"""What a checkpoint still knows, by lm-evaluation-harness (Gao et al.): MMLU, ARC, TruthfulQA, ...

A question is right if the likeliest continuation of its prompt is the right answer; no judge is
asked. CAPABILITY names tasks of the harness. Where DATA_DIR is a folder, mmlu, arc_challenge and
truthfulqa_mc1 read their authors' files in it, by the task files in lm_tasks/, without network. All
others, and all with DATA_DIR=hub, fetch their data from the Hugging Face hub. Prompts, examples and
scores are the harness's, without chat template. A prompt that is too long loses its beginning.
Output, a line a question: id, right; right_norm too where the task has acc_norm."""
import contextlib
import copy
import csv
import functools
import io
import logging
from pathlib import Path

from engine.batching import chunks, evenly
from engine.run import die, from_hub, read_json
from evaluation.scores import rate
from selfplay.data import append_missing, read_table, rows_by_id

FILES = {"mmlu": "mmlu/test/*_test.csv", "arc_challenge": "arc/ARC-Challenge-Test.jsonl",
         "truthfulqa_mc1": "truthfulqa/v1/mc_task.json"}  # below DATA_DIR
SHOTS = 5                 # examples of mmlu (its paper, arXiv 2009.03300)
CHUNK = 64                # questions between two writes to a file (ours)
ROWS = 4                  # prompts at a time on a GPU: all their logits are kept (hardware)


def load_questions(names, source, limit):
    """Tasks of the harness (`names`, commas between) -> {name: questions}; one without its file is
    skipped with a line. limit: questions of a task, evenly spaced, so that mmlu's subjects share
    them; 0: all. A question is dict(id, doc, task, index): index is its place in the task."""
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
        with from_hub(f"CAPABILITY: the data of {name}"):
            tasks = manager.load(name)["tasks"].values()
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
                questions.append(dict(id=f"{task.task_name}/{doc.get('id', index)}", doc=doc,
                                      task=task, index=index))
        found[name] = evenly(questions, limit)
    return found


def read_questions(folder, name, **_):
    """For the task files: FILES[name] -> {"test": data set}. A bad file stops with its name."""
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
    subject, parts = path.name.removesuffix("_test.csv"), dict(dev=[], test=[])
    for part, rows in parts.items():
        file = path.parents[1] / part / f"{subject}_{part}.csv"
        with open(file, encoding="utf-8-sig", newline="") as f:
            for question, a, b, c, d, letter in filter(None, csv.reader(f, strict=True)):
                text = f"{question.strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
                rows.append((text, "ABCD".index(letter.strip())))
    examples = ""
    for k in range(SHOTS):
        text, gold = parts["dev"][k]
        examples += f"{text} {'ABCD'[gold]}\n\n"
    for n, (text, gold) in enumerate(parts["test"], 1):
        yield dict(id=f"{subject}/{n}", subject=subject.replace("_", " "), prompt=examples + text,
                   gold=gold)


def _arc(path):
    """AI2's JSON lines; a question has three to five answers."""
    for _, row in read_table(path):
        question = row["question"]
        labels = [choice["label"] for choice in question["choices"]]
        yield dict(id=str(row["id"]), question=question["stem"],
                   choices=[choice["text"] for choice in question["choices"]],
                   gold=labels.index(row["answerKey"]))


def _truthfulqa(path):
    """A list of questions; of mc1_targets one answer is marked 1."""
    for n, row in enumerate(read_json(path, kind=list), 1):
        choices, marks = zip(*row["mc1_targets"].items())
        if sum(marks) != 1:
            raise ValueError(f"question {n}: one answer must be marked 1")
        yield dict(id=str(n), question=row["question"], choices=choices, gold=marks.index(1))


def ask(model, tok, path, questions):
    """Append to the file `path` what it lacks of the model's answers to `questions`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    def answer(number, batch):
        tasks, places, ids, rows = {}, {}, {}, []
        for question in batch:
            task, index = question["task"], question["index"]
            task.set_fewshot_seed(0)
            tasks[task.task_name] = task
            places.setdefault(task.task_name, []).append(index)
            ids[task.task_name, index] = question["id"]
        with contextlib.redirect_stderr(io.StringIO()):  # its own bars
            # simple_evaluate does the same, and spends 5 seconds on describing the machine
            out = lm_eval.evaluate(lm, dict(tasks=tasks), samples=places, bootstrap_iters=0)
        for name, samples in out["samples"].items():
            for x in samples:
                right = x["acc"] if "acc" in x else x["exact_match"]
                rows.append(dict(id=ids[name, x["doc_id"]], right=bool(right)))
                if "acc_norm" in x:
                    rows[-1]["right_norm"] = bool(x["acc_norm"])
        return rows

    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # twice as fast on a CPU for long prompts as "eager"
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tok), softmax_dtype="float32",
              batch_size=ROWS if model.device.type == "cuda" else 1)  # copy: it may add a pad token
    append_missing(path, chunks(questions, CHUNK), answer)
    model.set_attn_implementation(attention)


def score_questions(folder, tasks):
    """The files of ask() in `folder` -> {task: dict(n, acc, acc_norm where there is one)}."""
    out = {}
    for name, questions in tasks.items():
        known = rows_by_id(folder / f"{name}.jsonl")
        rows = [known[question["id"]] for question in questions]
        out[name] = dict(n=len(rows), acc=rate(row["right"] for row in rows))
        if "right_norm" in rows[0]:
            out[name]["acc_norm"] = rate(row["right_norm"] for row in rows)
    return out
