"""Seeds, tables and logs: everything that is read from data files, and the logs that grow."""
import csv
import hashlib
import io
import json
from pathlib import Path

from engine import progress
from engine.run import TRUTH, die, locate, short

SPLITS = ("train", "dev", "test")


def read_table(path):
    """A table in a file -> [(line number where the row ends, row as dict)]. By its ending: .csv,
    .tsv (both with a header), .parquet, or JSON lines for any other. A byte order mark is ignored.
    What is no UTF-8, no JSON or not as wide as the header stops with the file and the line."""
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
    if path.suffix not in (".csv", ".tsv"):
        return _json_lines(path, text.split("\n"))  # not splitlines: JSON may hold other line ends
    rows, delimiter = [], "," if path.suffix == ".csv" else "\t"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        for row in filter(None, reader):  # not the empty lines
            if len(row) != len(header):
                die(f"{path} line {reader.line_num}: {len(row)} columns, header has {len(header)}")
            rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as problem:
        die(f"{path} line {reader.line_num}: not a table in {path.suffix} form ({problem})")
    return rows


def _json_lines(path, lines):
    """[(line number, value)] of the lines that are not empty."""
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            rows += [(n, json.loads(line))] if line.strip() else []
        except ValueError:
            die(f"{short(path)} line {n}: not JSON: correct or delete that line")
    return rows


def read_exchanges(path):
    """JSONL with prompt and response -> list of dicts; a bad line stops with its number."""
    if not Path(path).is_file():
        die(f"{path} not found")
    rows = read_table(path)
    for n, row in rows:
        if (not isinstance(row, dict) or not isinstance(row.get("prompt"), str)
                or not isinstance(row.get("response"), (str, type(None)))):
            die(f"{path} line {n}: `prompt` must be text, `response` text or null")
    return [row for _, row in rows]


def read_rows(path, heal=True):
    """Rows of a JSONL file, [] where there is none. A torn last line (of a killed run, or still
    being written) is left out; heal: it is cut off in the file too."""
    data, end, torn = (path.read_bytes() if path.is_file() else b"").rpartition(b"\n")
    if torn and heal:
        path.write_bytes(data + end)
    return [row for _, row in _json_lines(path, data.splitlines())]


def rows_by_id(path, heal=True):
    """{id: row} of a JSONL file."""
    return {row["id"]: row for row in read_rows(path, heal)}


def append_missing(path, batches, work):
    """Append to the JSONL file `path` the rows (dicts with `id`) that it lacks. batches: lists of
    items with `id`; work(number, batch) gives a batch's rows. They depend on each other, so one
    missing id means the whole batch again: a killed run that goes on ends with the same bytes."""
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
    """Seeds -> list of {"id", "prompt", "harmful", "split", ...}; `split` keeps only that one.
    "train" is for learning; every choice looks at "dev"; "test" is looked at once, at the end.
    source: files joined by commas (JSONL or CSV with `prompt` and `harmful`, true or false) or a
    Hugging Face dataset id with WildJailbreak's columns `vanilla`, `data_type`. For a line that
    names no split the hash of its prompt decides: a tenth is dev, a tenth test (ours)."""
    if split is not None:
        _check_split(split, f"SEEDS={source}")
    seeds = []
    for part in map(str.strip, source.split(",")):
        path = locate(part)
        rows = read_table(path) if path and path.is_file() else _hub_seeds(part)
        for n, row in rows:
            seed = _seed(row, f"{part} line {n}", f"{Path(part).stem}-{n}")
            if split in (None, seed["split"]):
                seeds.append(seed)
    for kind, half in zip(("harmful", "benign"), halves(seeds)):
        if not half:
            die(f"SEEDS={source}: no {kind} seed in it (split: {split or 'any'})")
    return seeds


def halves(seeds):
    """Seeds -> (the harmful ones, the benign ones), each in their order."""
    return [s for s in seeds if s["harmful"]], [s for s in seeds if not s["harmful"]]


def _check_split(split, where):
    if split not in SPLITS:
        die(f"{where}: `split` must be train, dev or test, not {split!r}")


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
    """One checked seed. where: its file and line, for the error messages."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        die(f"{where}: a seed needs a non-empty text field `prompt`")
    harmful = TRUTH.get(str(row.get("harmful")).strip().lower())
    if harmful is None:
        die(f"{where}: `harmful` must be true or false, not {row.get('harmful')!r}")
    prompt = prompt.strip()
    tenth = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
    split = row.get("split") or {0: "dev", 1: "test"}.get(tenth, "train")
    _check_split(split, where)
    return dict(row, prompt=prompt, harmful=harmful, split=split, id=str(row.get("id", default_id)))
