"""Seeds, tables and logs: everything that is read from data files, and the logs that grow."""
import csv
import hashlib
import io
import json
from pathlib import Path

from engine import progress
from engine.run import die, locate, short

TRUTH = {"true": True, "1": True, "false": False, "0": False}


def read_table(path):
    """A table in a file -> [(line number where the row ends, row as dict)]. By its ending: .csv,
    .tsv (both with a header), .parquet, or JSON lines for any other. A byte order mark at the top
    is ignored. What is no UTF-8, no JSON, or a row of another width than the header stops with the
    file and the line."""
    path = Path(path)
    if path.suffix == ".parquet":
        import pandas
        try:
            return list(enumerate(pandas.read_parquet(path).to_dict("records"), 1))
        except ValueError as problem:  # pyarrow's errors are of this type
            die(f"{path}: not a Parquet file ({str(problem).splitlines()[0]})")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        die(f"{path}: not UTF-8 ({problem.reason} at byte {problem.start})")
    if path.suffix in (".csv", ".tsv"):
        return _delimited(path, text, "," if path.suffix == ".csv" else "\t")
    rows = []
    for n, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other line ends
        if line.strip():
            try:
                rows.append((n, json.loads(line)))
            except json.JSONDecodeError as problem:
                die(f"{path} line {n}: not JSON ({problem.msg})")
    return rows


def _delimited(path, text, delimiter):
    """Rows of a table with a header."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        header = next(reader, [])
        for row in filter(None, reader):  # not the empty lines
            if len(row) != len(header):
                die(f"{path} line {reader.line_num}: {len(row)} columns, the header has "
                    f"{len(header)}")
            rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as problem:
        die(f"{path} line {reader.line_num}: not a table in {path.suffix} form ({problem})")
    return rows


def read_exchanges(path):
    """JSONL with prompt and response -> list of dicts; a bad line stops with its number."""
    if not Path(path).is_file():
        die(f"{path} not found")
    rows = read_table(path)
    for n, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            die(f"{path} line {n}: field `prompt` (text) is missing")
        if not isinstance(row.get("response"), (str, type(None))):
            die(f"{path} line {n}: field `response` must be text or null")
    return [row for _, row in rows]


def read_rows(path, heal=True):
    """Rows of a JSONL file, [] where there is none. A torn last line (of a killed run, or still
    being written) is left out; heal: it is cut off in the file too."""
    data, end, torn = (path.read_bytes() if path.is_file() else b"").rpartition(b"\n")
    if torn and heal:
        path.write_bytes(data + end)
    rows = []
    for n, line in enumerate(data.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            die(f"{short(path)} line {n}: not JSON: delete that line or make the file anew")
    return rows


def rows_by_id(path, heal=True):
    """{id: row} of a JSONL file."""
    return {row["id"]: row for row in read_rows(path, heal)}


def append_missing(path, batches, work):
    """Append to the JSONL file `path` the rows (dicts with `id`) that it lacks. batches: lists of
    items with `id`; work(number, batch) gives a batch's rows. The rows of a batch depend on each
    other, so one missing id means its whole batch again, and batches are formed before finished ids
    are left out. So a killed run that goes on ends with the same bytes."""
    done, name = set(rows_by_id(path)), f"{path.parent.name}/{path.name}"
    with (open(path, "a", encoding="utf-8") as f,
          progress.bar(sum(map(len, batches)), name, "row") as bar):
        for number, batch in enumerate(batches):
            if not done.issuperset(item["id"] for item in batch):
                for row in work(number, batch):
                    if row["id"] not in done:
                        f.write(json.dumps(row) + "\n")
                        done.add(row["id"])
                f.flush()
            bar.update(len(batch))


def load_seeds(source, split=None):
    """Seeds -> list of {"id", "prompt", "harmful", "split", ...}; `split` ("train" or "held_back")
    keeps only that one. source: "prompts/seeds.jsonl" (ships with the repo), any JSONL or CSV with
    `prompt` and `harmful` (true/false), several files joined by commas, or a Hugging Face dataset
    id with WildJailbreak's columns `vanilla` and `data_type`. A line that names no split is held
    back if the hash of its prompt says so (one in ten, ours). A bad line stops with its number."""
    seeds = []
    for part in source.split(","):
        part = part.strip()
        path = locate(part)
        rows = read_table(path) if path and path.is_file() else _hub_seeds(part)
        for n, row in rows:
            seed = _seed(row, f"{part} line {n}", f"{Path(part).stem}-{n}")
            if split in (None, seed["split"]):
                seeds.append(seed)
    for harmful in (True, False):
        if not any(seed["harmful"] is harmful for seed in seeds):
            die(f"SEEDS={source}: no {'harmful' if harmful else 'benign'} seed in it"
                + (f" (split {split})" if split else ""))
    return seeds


def halves(seeds):
    """Seeds -> (the harmful ones, the benign ones), each in their order."""
    return [s for s in seeds if s["harmful"]], [s for s in seeds if not s["harmful"]]


def _hub_seeds(name):
    """Rows of a hub dataset with WildJailbreak's schema (train split)."""
    if name.endswith((".jsonl", ".json", ".csv")) or name.count("/") != 1:
        die(f"SEEDS: file {name!r} not found")
    import datasets
    try:
        table = datasets.load_dataset(name, "train", split="train", delimiter="\t",
                                      keep_default_na=False)
    except Exception as problem:  # a dozen unrelated types; each means "not to be had"
        die(f"SEEDS: {name!r} is no file and the Hugging Face hub did not give it "
            f"({type(problem).__name__}); for gated data accept its terms and run `hf auth login`")
    return [(n, dict(prompt=row["vanilla"], harmful="harmful" in row["data_type"]))
            for n, row in enumerate(table, 1) if row["data_type"].startswith("vanilla")]


def _seed(row, where, default_id):
    """One checked seed; the mistake's place is in the message."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        die(f"{where}: a seed needs a non-empty text field `prompt`")
    harmful = TRUTH.get(str(row.get("harmful")).strip().lower())
    if harmful is None:
        die(f"{where}: `harmful` must be true or false, not {row.get('harmful')!r}")
    prompt = prompt.strip()
    digest = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    split = row.get("split") or ("held_back" if digest % 10 == 0 else "train")
    if split not in ("train", "held_back"):
        die(f"{where}: `split` must be train or held_back, not {split!r}")
    return dict(row, prompt=prompt, harmful=harmful, split=split, id=str(row.get("id", default_id)))
