"""What every stage does around its work: constants, meta.json, seeds, checkpoints, resume.

No model and no equation is in this file. torch is imported where it is asked, not above: a stage
that only reads results (04) starts at once and runs without it.
"""
import csv
import difflib
import hashlib
import io
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PROMPTS = ROOT / "prompts"


def die(message):
    """Stop with one line on stderr and exit code 1: what is wrong and what to do about it."""
    sys.exit(f"error: {message}")


# ---- constants as the interface ------------------------------------------------------------------

def configure(scope, argv):
    """Apply `--paper` and `NAME=value` words to the constants of a script (`scope`: its globals()).

    A constant is an upper-case str, int, float or bool of the script; its value gives the type.
    `scope["PAPER"]` is the second block, `scope["RANGES"]` gives (low, high) or a list of choices.
    Derived values are computed after this call. `--help` prints the docstring and the block. Any
    mistake ends with one line and exit code 1.
    """
    if "--help" in argv or "-h" in argv:
        source = Path(scope["__file__"]).read_text()
        print(scope["__doc__"].strip() + "\n\n" + source.split("# " + "=" * 98)[1].strip())
        sys.exit(0)
    known = {k: v for k, v in scope.items() if k.isupper() and type(v) in (str, int, float, bool)}
    words = [w for w in argv if w != "--paper"]
    if "--paper" in argv:
        if not scope.get("PAPER"):
            die(f"{Path(scope['__file__']).name} has no --paper block")
        scope.update(scope["PAPER"])
        print("--paper:", ", ".join(f"{k}={v}" for k, v in scope["PAPER"].items()))
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
            die(f"unknown constant {name!r} (nearest: {near}); "
                f"python {Path(scope['__file__']).name} --help lists all")
        scope[name] = _typed(name, text, type(known[name]))
        print(f"override: {name} = {scope[name]!r} (was {known[name]!r})")
    if not re.fullmatch(r"\w[\w.-]*", scope.get("RUN", "x")):
        die(f"RUN={scope['RUN']!r}: letters, digits, dot, dash and underscore only "
            "(it names folders)")
    for name, allowed in scope.get("RANGES", {}).items():
        value = scope[name]
        if isinstance(allowed, list) and value not in allowed:
            die(f"{name}={value!r}: must be one of {', '.join(map(str, allowed))}")
        if isinstance(allowed, tuple) and not allowed[0] <= value <= allowed[1]:
            die(f"{name}={value!r}: must be from {allowed[0]} to {allowed[1]}")


def _typed(name, text, kind):
    """The text as int, float, bool or str, or one line that says which of them was wanted."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        die(f"{name}={text!r}: a value of type {kind.__name__} is needed")


def constants(scope):
    """The constants of a script as a plain dict, for meta.json."""
    return {k: v for k, v in scope.items() if k.isupper() and type(v) in (str, int, float, bool)}


# ---- what meta.json holds ------------------------------------------------------------------------

def make_meta(scope, parent):
    """What meta.json holds: constants, parent, versions, hash of prompts/, machine, time."""
    import torch
    import transformers
    texts = b"".join(p.name.encode() + p.read_bytes() for p in sorted(PROMPTS.glob("*")))
    return dict(stage=Path(scope["__file__"]).name, constants=constants(scope),
                parent=short(parent),
                versions=dict(torch=torch.__version__, transformers=transformers.__version__,
                              python=platform.python_version()),
                prompts_sha256=hashlib.sha256(texts).hexdigest(), machine=machine(),
                time=time.strftime("%Y-%m-%d %H:%M:%S"))


def short(path):
    """A path as text, from the repository's folder on where it lies in it: no paths of a machine
    in files that may be published."""
    path = Path(path)
    inside = path.is_absolute() and path.resolve().is_relative_to(ROOT)
    return str(path.resolve().relative_to(ROOT) if inside else path)


def published(text):
    """A constant as it may be published: of a path outside the repository only its last part (of
    each, where commas join several)."""
    def one(word):
        path = Path(short(word))
        return word if not word.startswith("/") else path.name if path.is_absolute() else str(path)

    return ",".join(one(w.strip()) for w in text.split(",")) if isinstance(text, str) else text


def machine():
    """One line that names the machine: processor or GPU, cores, memory in GB."""
    import torch
    memory = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
              if hasattr(os, "sysconf") else 0)
    line = f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GB"
    if torch.cuda.is_available():
        line += (f", {torch.cuda.get_device_name()} "
                 f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GB")
    return line


def peak_gb():
    """Peak memory of this process so far, GB: of the GPU where there is one."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2 ** (20 if sys.platform == "linux" else 30)


# ---- checkpoints and resume ----------------------------------------------------------------------

def save_folder(folder, model, tok, meta, tensors=None, files=()):
    """Write a checkpoint folder atomically (tmp + rename): save_pretrained files, meta.json,
    `tensors` as state.safetensors, and `files` {name: text}."""
    from safetensors.torch import save_file
    folder = Path(folder)
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # temperature or top_p without do_sample (some hub models) cannot be saved
        model.generation_config.do_sample = True
    model.save_pretrained(tmp)
    tok.save_pretrained(tmp)
    for name, text in {**dict(files), "meta.json": json.dumps(meta, indent=1)}.items():
        (tmp / name).write_text(text, encoding="utf-8")
    if tensors:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                  str(tmp / "state.safetensors"))
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)


def newest(folder):
    """The newest complete step folder of a run that holds its optimizer, or None."""
    return max((p for p in folder.glob("step_*")
                if p.suffix != ".tmp" and (p / "state.safetensors").exists()), default=None)


def free_to_change(source):
    """Constants of a script (its text) that may differ in a resumed run: STEPS, SAVE_EVERY and
    those tagged (hardware)."""
    return {"STEPS", "SAVE_EVERY", *re.findall(r"^([A-Z_]+) =.*\(hardware\)", source, re.MULTILINE)}


def check_resume(scope, folder):
    """A run goes on only with the constants it began with. scope: the script's globals()."""
    free = free_to_change(Path(scope["__file__"]).read_text())
    then = json.loads((folder / "meta.json").read_text())["constants"]
    changed = [f"{k} {then.get(k)!r} -> {v!r}" for k, v in constants(scope).items()
               if k not in free and then.get(k) != v]
    if changed:
        die(f"{folder.relative_to(ROOT)} was made with other constants ({'; '.join(changed)}): "
            "restore them, give another RUN=, or delete it")


def cut(path, keep):
    """Keep lines with keep(line): what a killed run wrote after its last checkpoint goes."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(x for x in lines if x.endswith("\n") and keep(x)), encoding="utf-8")


# ---- files ---------------------------------------------------------------------------------------

def write_text(path, text):
    """Write a small file whole or not at all: a killed run leaves the old one."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def read_rows(path):
    """Rows of a JSONL file, [] where there is none. A torn last line (killed run) is cut off."""
    data, end, torn = (path.read_bytes() if path.is_file() else b"").rpartition(b"\n")
    if torn:
        path.write_bytes(data + end)
    return [json.loads(line) for line in data.splitlines()]


def chunks(items, size):
    """A list in pieces of `size`, the last one shorter."""
    return [items[k:k + size] for k in range(0, len(items), size)]


def fill_file(path, batches, work, every=None):
    """Append to the JSONL file `path` the rows (dicts with `id`) that it lacks.

    every: ids the file has in the end, for the line that tells progress, if more than in batches.
    batches: lists of items with `id`; work(number, batch) gives a batch's rows. They are formed
    before finished ids are left out, and one missing id means its whole batch again, because the
    rows of a batch depend on each other: a killed run that goes on ends with the same bytes.
    """
    done = {r["id"] for r in read_rows(path)}
    every = set(every or (i["id"] for b in batches for i in b))
    with open(path, "a") as f:
        for number, batch in enumerate(batches):
            if all(i["id"] in done for i in batch):
                continue
            new = [r for r in work(number, batch) if r["id"] not in done]
            f.write("".join(json.dumps(r) + "\n" for r in new))
            f.flush()
            done |= {r["id"] for r in new}
            print(f"{path.parent.name}/{path.name}: {len(done & every)} of {len(every)}",
                  flush=True)


def read_table(path):
    """A table in a file -> [(line number where the row ends, row as dict)].

    By its ending: .csv, .tsv (both with a header), .parquet, or JSON lines for any other. A byte
    order mark at the top is ignored. What is no UTF-8, no JSON, or a row of another width than the
    header stops with the file and the line.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        except pyarrow.ArrowInvalid as problem:
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
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                die(f"{path} line {reader.line_num}: {len(row)} columns, the header has "
                    f"{len(header)}")
            if row:  # not an empty line
                rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as problem:
        die(f"{path} line {reader.line_num}: not a table in {path.suffix} form ({problem})")
    return rows


# ---- seeds ---------------------------------------------------------------------------------------

def load_seeds(source, split=None):
    """Seeds -> list of {"id", "prompt", "harmful", "split", ...}; `split` ("train" or "held_back")
    keeps only that one.

    A line that names no split is held back if the hash of its prompt says so (one in ten, ours).

    source: "prompts/seeds.jsonl" (ships with the repo), any JSONL or CSV with `prompt` and
    `harmful` (true/false), several files joined by commas, or a Hugging Face dataset id with
    WildJailbreak's columns `vanilla` and `data_type`. A bad line stops with its number.
    """
    seeds = []
    for part in map(str.strip, source.split(",")):
        path = next((p for p in (Path(part), ROOT / part) if p.is_file()), None)
        rows = read_table(path) if path else _hub_seeds(part)
        seeds += [_seed(row, f"{part} line {n}", f"{Path(part).stem}-{n}") for n, row in rows]
    seeds = [s for s in seeds if split in (None, s["split"])]
    for harmful in (True, False):
        if not any(s["harmful"] is harmful for s in seeds):
            die(f"SEEDS={source}: no {'harmful' if harmful else 'benign'} seed in it"
                + (f" (split {split})" if split else ""))
    return seeds


def _hub_seeds(name):
    """Rows of a hub dataset with WildJailbreak's schema (train split)."""
    if name.endswith((".jsonl", ".json", ".csv")) or name.count("/") != 1:
        die(f"SEEDS: file {name!r} not found")
    import datasets
    try:
        rows = datasets.load_dataset(name, "train", split="train", delimiter="\t",
                                     keep_default_na=False)
    except Exception as problem:  # as in check_hub: many unrelated types, one meaning
        die(f"SEEDS: {name!r} is no file and the Hugging Face hub did not give it "
            f"({type(problem).__name__}); for gated data accept its terms and run `hf auth login`")
    return [(n, dict(prompt=r["vanilla"], harmful="harmful" in r["data_type"]))
            for n, r in enumerate(rows, 1) if r["data_type"].startswith("vanilla")]


def _seed(row, where, default_id):
    """One checked seed; the mistake's place is in the message."""
    if (not isinstance(row, dict) or not isinstance(row.get("prompt"), str)
            or not row["prompt"].strip()):
        die(f"{where}: a seed needs a non-empty text field `prompt`")
    harmful = row.get("harmful")
    harmful = {"true": True, "1": True, "false": False, "0": False}.get(
        str(harmful).strip().lower())
    if harmful is None:
        die(f"{where}: `harmful` must be true or false, not {row.get('harmful')!r}")
    prompt = row["prompt"].strip()
    split = row.get("split") or ("train", "held_back")[
        int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10 == 0]
    if split not in ("train", "held_back"):
        die(f"{where}: `split` must be train or held_back, not {split!r}")
    return dict(row, prompt=prompt, harmful=harmful, split=split, id=str(row.get("id", default_id)))
