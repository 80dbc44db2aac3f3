"""The results on one page, results/runs/RUN/report.html. Needs no torch and no network.

    python -m evaluation.report [RUN=03] [CURVES=02_rl,seed1] [LIMIT=100]

This file joins what the runs wrote; the script in evaluation/report.html draws it. Input, below
results/runs/: of the evaluation summary.json, times.json, <checkpoint>/*.jsonl; of each run in
CURVES metrics.csv, games.jsonl. The page says what is missing. Cost: seconds, a few MB.
Safety: texts of models are data, never markup. Where the seed, the request or the reply is harmful,
or nobody judged, a button hides them; they are in the file. Other prompts: by id and hash."""
import base64
import csv
import difflib
import hashlib
import html
import json
import re
import sys
from pathlib import Path

from engine import run
from evaluation import tables
from selfplay.data import read_rows, read_table, rows_by_id

# ==================================================================================================
RUN = "03"                # evaluation: results/runs/RUN/
LIMIT = 0                 # as in stage 3: LIMIT=100 reads results/runs/RUN_limit100/
CURVES = ""               # runs of stage 2, with commas; "" = every results/runs/*/metrics.csv
TITLE = "Self-play red teaming: results"
MAX_ROWS = 4000           # games at most, and answers: evenly spaced, and the page says so
WINDOW = 10               # steps a thick line is the mean of (as in curves.png)
# ==================================================================================================


def metrics_cells(path):
    """metrics.csv -> rows of texts, the header first; without a row that is still being written."""
    rows = list(csv.reader(run.read_log(path, heal=False).splitlines()))
    if len(rows) < 2 or "step" not in rows[0]:
        run.die(f"{run.short(path)}: no column or row of steps")
    for n, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            run.die(f"{run.short(path)} line {n}: not as wide as the header: correct or delete it")
    return rows


def find_runs(names, file):
    """names, each once, or all runs in results/runs/ that have `file`. A name without it stops."""
    have = sorted(path.parent.name for path in run.RUNS.glob(f"*/{file}"))
    for name in names:
        if name not in have:
            near = difflib.get_close_matches(name, have, 1, 0) or ["none"]
            run.die(f"results/runs/{name[:60]}/{file} not found (nearest: {near[0]})")
    return list(dict.fromkeys(names or have))


def shipped_seeds():
    """{id: text} of the repository's seeds."""
    return {row["id"]: row["prompt"] for _, row in read_table(run.PROMPTS / "seeds.jsonl")}


def read_games(name):
    """games.jsonl of a run -> its games, with `group` (the run) and `text` (the seed's, or None).
    The file has the seed's id only. Its text is known from a game that showed the seed unattacked,
    or from prompts/seeds.jsonl, unless the two differ for one id: then the run had other seeds."""
    games, shipped = read_rows(run.RUNS / name / "games.jsonl", "seed", "request", "kind",
                               heal=False), shipped_seeds()
    shown = {x["seed"]: x["request"] for x in games if x["kind"].startswith("vanilla")}
    agree = (shipped | shown) == (shown | shipped)  # no id has two texts
    seeds = shipped | shown if agree else shown
    for game in games:
        game.update(group=name, text=seeds.get(game["seed"]))
    return games


def read_answers(folder, label, benchmarks, texts, judge2):
    """Answers of a checkpoint with their labels and attacks -> rows; each file may be missing.
    folder, label: the checkpoint's. benchmarks: their order. texts: {seed id: text}.
    judge2: is there one? An attack without text was not sent and has no answer; it failed, in n."""
    rows, attacks = [], rows_by_id(folder / "attacks.jsonl", heal=False)
    second = [".labels2"] if judge2 else []  # an older run may have left such a file
    files = sorted({p.stem.split(".labels")[0] for p in folder.glob("*.jsonl")} - {"attacks"})
    for name in sorted(files, key=[*benchmarks, "attacks_own", "attacks_on_base", *files].index):
        replies, *judges = (rows_by_id(folder / f"{name}{kind}.jsonl", heal=False)
                            for kind in ("", ".labels", *second))
        if replies and "answer" not in next(iter(replies.values())):
            continue  # multiple choice, by log-likelihood: no text was written
        ids = {*replies, *judges[0]}
        if name == "attacks_own":
            ids |= attacks.keys()
        for i in sorted(ids, key=str):
            asked = replies.get(i, {})  # the row that knows the seed
            row = dict(group=label, kind=name, id=i, reply=asked,
                       labels=[labels[i] for labels in judges if i in labels])
            if name.startswith("attacks_"):
                asked = row["attack"] = attacks.get(i, {})
            known = texts.get(i) if name.startswith(("seeds_", "attacks_")) else None
            rows.append(dict(row, text=asked.get("prompt") or known))
    return rows


def thin(rows):
    """At most MAX_ROWS of the rows, evenly spaced, and how many there were."""
    keep = min(len(rows), MAX_ROWS)
    return dict(rows=[rows[k * len(rows) // keep] for k in range(keep)], total=len(rows))


def to_json(data):
    """JSON that can stand in a <script> block: nothing in it can end the block or open a tag."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 is escaped
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def page(data):
    """The text of the page with its data (see main)."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1]
    digest = hashlib.sha256(script.encode()).digest()  # the only script that may run
    parts = dict(TITLE=html.escape(TITLE), WINDOW=str(WINDOW), DATA=to_json(data),
                 SCRIPT=base64.b64encode(digest).decode())
    return re.sub(r"%%(\w+)%%", lambda match: parts[match[1]], template)


def main(argv):
    """Read what there is and write the page."""
    run.configure(globals(), argv)
    folder = run.RUNS / (f"{RUN}_limit{LIMIT}" if LIMIT else RUN)
    names = find_runs(CURVES.replace(",", " ").split(), "metrics.csv")
    summary, texts = run.read_json(folder / "summary.json", missing={}, benchmarks=dict,
                                   changes=dict, checkpoints=dict, constants=dict, machine=str), {}
    times = run.read_json(folder / "times.json", kind=list, missing=[])
    for entry in times:
        run.check_fields(entry, run.short(folder / "times.json"), dict(start=str, seconds=dict))
    if not (summary or names):
        run.die(f"{run.short(folder)}/summary.json not found: run python 03_evaluate.py first")
    if "prompts/seeds.jsonl" in summary.get("constants", {}).get("SEEDS", "").split(","):
        texts = shipped_seeds()
    metrics, games, answers = {}, [], []
    for name in names:
        metrics[name] = metrics_cells(run.RUNS / name / "metrics.csv")
        games += read_games(name)
    attackers = summary.get("crossplay", {}).get("attackers", [])
    for label in dict.fromkeys([*summary.get("checkpoints", {}), *attackers]):
        if not (folder / label).resolve().is_relative_to(folder.resolve()):
            run.die(f"{run.short(folder)}/summary.json: {run.brief(label)} is no label")
        answers += read_answers(folder / label, label, summary["benchmarks"], texts,
                                bool(summary.get("judge2")))
    data = dict(evaluation=folder.name, window=WINDOW, runs=metrics, summary=summary,
                times=times, sections=tables.sections(summary) if summary else [],
                games=thin(games), answers=thin(answers))
    path = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    run.write_text(path, page(data))
    print(f"made {run.short(path)}, {path.stat().st_size / 1e6:.1f} MB: holds what models wrote in "
          "reply to harmful requests\nnext: open it in a browser")


if __name__ == "__main__":
    run.guarded(main, sys.argv[1:])
