"""Seeds, tables and logs: everything that is read from data files, and the logs that grow."""
import csv
import hashlib
import io
import json
import random
from pathlib import Path

from engine import parallel, progress
from engine.run import (TRUTH, brief, check_fields, die, from_hub, locate, parse_json, read_log,
                        read_text, short)

SPLITS = ("train", "dev", "test")
LONGEST = 4000            # bytes of a seed: no tokenizer makes more tokens of it (ours)
# What a field of a row is, where the row has it: of an exchange, and of a log.
LABELS = dict.fromkeys("prompt_harmful response_refusal response_harmful".split(), bool | None)
TYPES = dict(LABELS, id=str, key=str, step=int, kind=str, seed=str, request=str, answer=str,
             thinking=str, labels=dict, attacker=dict, defender=dict, parsed=bool | None,
             matcher=bool | None, empty=bool, well_formed=bool, cut=bool, right=bool)


def read_table(path):
    """A table in a file -> [(line number where the row ends, row as dict)]. By its ending: .csv,
    .tsv (both with a header), .parquet, or JSON lines for any other. A byte order mark is ignored.
    What is no UTF-8, no JSON or not as wide as the header stops with the file and the line."""
    path = Path(path)
    if path.suffix == ".parquet":
        import pandas
        try:
            frame = pandas.read_parquet(path).astype(object)  # then None can stand in a gap
            return list(enumerate(frame.where(frame.notna(), None).to_dict("records"), 1))
        except (OSError, ValueError) as problem:  # of either type is what pyarrow finds
            die(f"{short(path)}: not a Parquet file ({str(problem).splitlines()[0][:80]})")
    text = read_text(path)
    if path.suffix not in (".csv", ".tsv"):
        return _json_lines(path, text)
    rows, delimiter = [], "," if path.suffix == ".csv" else "\t"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        for row in filter(None, reader):  # not the empty lines
            if len(row) != len(header):
                die(f"{short(path)} line {reader.line_num}: {len(row)} columns, the header has "
                    f"{len(header)}: correct or delete it")
            rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as problem:
        die(f"{short(path)} line {reader.line_num}: not a table in {path.suffix} form ({problem})")
    return rows


def _json_lines(path, text):
    """[(line number, JSON object as dict)] of the lines that are not empty."""
    lines = enumerate(text.split("\n"), 1)  # not splitlines: JSON may hold other line ends
    return [(n, parse_json(line, f"{short(path)} line {n}", dict)) for n, line in lines
            if line.strip()]


def _checked(path, rows, keys, types):
    """Rows [(line number, dict)] -> the dicts, with all `keys` and each field as in `types`."""
    for n, row in rows:
        fields = {key: types.get(key, object) for key in (*keys, *types.keys() & row.keys())}
        check_fields(row, f"{short(path)} line {n}", fields)
    return [row for _, row in rows]


def read_exchanges(path, *keys):
    """JSONL with prompt, response and `keys` -> list of dicts. A bad line stops with its number."""
    if not Path(path).is_file():
        die(f"{path} not found")
    types = dict(LABELS, prompt=str, response=str | None)
    return _checked(path, read_table(path), ["prompt", *keys], types)


def read_rows(path, *keys, heal=True):
    """Rows of a JSON log, [] where there is none; each has all `keys`. heal: as read_log(); None: a
    user's file, no log: its last line counts without an end, too."""
    text = read_text(path) if heal is None else read_log(path, heal)
    return _checked(path, _json_lines(path, text), keys, TYPES)


def rows_by_id(path, *keys, heal=True):
    """{id: row} of a log."""
    return {row["id"]: row for row in read_rows(path, "id", *keys, heal=heal)}


def append_missing(path, batches, work):
    """Append to the JSONL file `path` the rows (dicts with `id`) that it lacks. batches: lists of
    items with `id`; work(number, batch) gives a batch's rows. They depend on each other, so one
    missing id means the whole batch again: a killed run that goes on ends with the same bytes.
    Several processes each take one batch at a time, whole, so that it gives the same rows."""
    done, name, missing = set(rows_by_id(path)), f"{path.parent.name}/{path.name}", []
    for number, batch in enumerate(batches):
        if not done.issuperset(item["id"] for item in batch):
            missing.append((number, batch))

    def append(found):
        with open(path, "a", encoding="utf-8") as f:
            for number in sorted(found):
                for row in found[number]:
                    if row["id"] not in done:
                        f.write(json.dumps(row) + "\n")
                        done.add(row["id"])

    parallel.once(append, {})  # so that there is a file
    with progress.bar(sum(len(batch) for _, batch in missing), name, "row") as bar:
        n = parallel.number_of()
        for first in range(0, len(missing), n):
            some = missing[first:first + n]
            found = {}
            for k in parallel.mine([1] * len(some)):
                number, batch = some[k]
                with parallel.alone():
                    found[number] = work(number, batch)
            parallel.once(append, parallel.gather(found))
            for _, batch in some:
                bar.update(len(batch))


def load_seeds(source, split=None, longest=LONGEST):
    """Seeds -> list of {"id", "prompt", "harmful", "split", ...}; `split` keeps only that one.
    "train" is for learning; every choice looks at "dev"; "test" is looked at once, at the end.
    source: files joined by commas (JSONL or CSV with `prompt` and `harmful`, true or false) or a
    Hugging Face dataset id with WildJailbreak's columns `vanilla`, `data_type`. For a line that
    names no split the hash of its prompt decides: a tenth is dev, a tenth test (ours).
    Prompts of more than `longest` bytes are left out and counted."""
    name = source if len(source) <= 60 else brief(source)
    if split not in (None, *SPLITS):
        die(f"SEEDS={name}: `split` must be train, dev or test, not {brief(split)}")
    seeds, dropped, known = [], 0, {}
    for part, rows in _parts(source):
        for n, row in rows:
            where = f"{part} line {n}"
            seed = _seed(row, where, f"{Path(part).stem}-{n}")
            first = known.setdefault(seed["id"], where)
            if first != where:
                die(f"{where}: its id {brief(seed['id'])} is that of {first}: give it another")
            long = len(seed["prompt"].encode()) > longest
            if split in (None, seed["split"]):
                dropped += long
                seeds += [] if long else [seed]
    if dropped:
        print(f"SEEDS={name}: left out {dropped} of more than {longest} bytes")
    for kind, half in zip(("harmful", "benign"), halves(seeds)):
        if not half:
            die(f"SEEDS={name}: no {kind} seed in it (split: {split or 'any'})")
    return seeds


def seeds_digest(source):
    """SHA-256 of what a source of seeds (load_seeds) holds: texts, labels and splits."""
    rows = [rows for _, rows in _parts(source)]
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def _parts(source):
    """[(name, rows as of read_table)] of each file or hub dataset of a source of seeds."""
    out = []
    for part in map(str.strip, source.split(",")):
        path = locate(part)
        out.append((part, read_table(path) if path and path.is_file() else _hub_seeds(part)))
    return out


def halves(seeds):
    """Seeds -> (the harmful ones, the benign ones), each in their order."""
    return [s for s in seeds if s["harmful"]], [s for s in seeds if not s["harmful"]]


def load_hub_dataset(path, *how, **more):
    """datasets.load_dataset(), which waits half a minute for a hub that cannot be reached: here one
    short question comes first. HF_HUB_OFFLINE=1 in the environment: from the cache alone."""
    import datasets
    import huggingface_hub
    if path != "csv" and not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(path, timeout=5)
    return datasets.load_dataset(path, *how, **more)


def _hub_seeds(name):
    """Rows of a hub dataset with WildJailbreak's schema (train split)."""
    endings = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
    if locate(name) or name.endswith(endings) or name.count("/") != 1 or "prompts/" in name:
        die(f"SEEDS: {brief(name)} {'is a folder' if locate(name) else 'not found'}: give a file")
    with from_hub(f"SEEDS: {brief(name)} is no file and"):
        table = load_hub_dataset(name, "train", split="train", delimiter="\t",
                                 keep_default_na=False)
    return [(n, dict(prompt=row["vanilla"], harmful="harmful" in row["data_type"]))
            for n, row in enumerate(table, 1) if row["data_type"].startswith("vanilla")]


def _seed(row, where, default_id):
    """One checked seed; other columns are left out. where: its file and line, for the messages."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        die(f"{where}: a seed needs a non-empty text field `prompt`")
    harmful = TRUTH.get(str(row.get("harmful")).strip().lower())
    if harmful is None:
        die(f"{where}: `harmful` must be true or false, not {brief(row.get('harmful'))}")
    prompt = prompt.strip()
    tenth = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
    split = row.get("split") or {0: "dev", 1: "test"}.get(tenth, "train")
    if split not in SPLITS:
        die(f"{where}: `split` must be train, dev or test, not {brief(split)}")
    name = default_id if row.get("id") in (None, "") else str(row["id"])
    seed = dict(id=name, prompt=prompt, harmful=harmful, split=split)
    return seed | ({"category": row["category"]} if isinstance(row.get("category"), str) else {})


def walk(items, n, step, name):
    """The n items of a 0-based step: all are walked in an order that is drawn anew each epoch. A
    step may reach into the next one. name: what the draw depends on, beside the epoch."""
    out, orders = [], {}
    for i in range(step * n, (step + 1) * n):
        epoch, k = divmod(i, len(items))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{name} {epoch}").sample(items, len(items))
        out.append(orders[epoch][k])
    return out
