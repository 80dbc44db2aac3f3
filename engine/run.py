"""What every script does around its work: constants, files, meta.json, resume, one-line errors.

A stage keeps its constants at its top, one a line, between two rulers; each can be given on the
command line as NAME=value. Its type says what is allowed. Literal["a", "b"]: one of these; Share: 0
to 1; Count: an int >= 0; any other int: >= 1 (>= 0 if its default is 0); any other float: >= 0."""
import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import typing
from pathlib import Path

import psutil  # accelerate brings it

from engine import parallel, progress

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "prompts"
CHECKPOINTS = ROOT / "checkpoints"
RUNS = ROOT / "results" / "runs"            # what runs write; ignored by git
REFERENCE = ROOT / "results" / "reference"  # what is committed, see results/README
RULER = "# " + "=" * 98
TRUTH = {"true": True, "1": True, "false": False, "0": False}
Share = typing.Annotated[float, "from 0 to 1"]
Count = typing.Annotated[int, "0 or more"]
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
STEP = "step_" + "[0-9]" * 6  # glob pattern of the folder that 02 saves a step in
RECIPES = {"--paper": "PAPER", "--gpu80": "GPU80", "--gpu48": "GPU48", "--gpu24": "GPU24"}
_doing, _locks = "", {}


# ---- errors and interrupts -----------------------------------------------------------------------
def die(message):
    """Stop with one line on stderr and exit code 1: what is wrong and what to do about it."""
    line = CONTROL.sub("?", " ".join(message.split()))  # a foreign file may have put them in
    sys.exit("error: " + (line if len(line) <= 400 else f"{line[:300]} ... {line[-80:]}"))


def brief(value):
    """A value as an error message shows it: at most 60 characters, on one line, in ASCII."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:45]}... ({len(text)} characters)"


def guarded(main, argv):
    """Run a script's main(argv). What the machine or the user does ends with one line instead of a
    traceback: Ctrl-C and SIGTERM (exit code 130, 143; a second one ends at once), a full disk, no
    permission, no memory. Errors of the program itself keep their traceback."""
    def interrupt(number, frame):
        if not parallel.is_first():
            os._exit(128 + number)  # it has nothing to write, and the first one says it
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    try:
        parallel.begin()
        main(argv)
        parallel.end()
    except KeyboardInterrupt as problem:
        print(f"\nstopped{_doing}", file=sys.stderr, flush=True)
        sys.exit(problem.args[0] if problem.args else 130)
    except SystemExit:
        parallel.wait_to_complain()
        raise
    except Exception as problem:
        line = explain(problem)
        parallel.wait_to_complain()
        if line is None:
            raise
        die(line)


@contextlib.contextmanager
def from_hub(what):
    """Stop with one line where `what` cannot be had from the Hugging Face hub."""
    try:
        yield
    except Exception as problem:  # a dozen unrelated types; each means "not to be had"
        die(f"{what} did not come from the Hugging Face hub ({type(problem).__name__}): check name "
            "and network, or give a folder or file; if gated, accept its terms, `hf auth login`")


def doing(text):
    """Note for guarded() what is being done, e.g. " in step 41; the same command goes on"."""
    global _doing
    _doing = text


def explain(problem):
    """The line for an exception that is no error of the program; None for all others."""
    text = str(problem)
    if isinstance(problem, OSError) and problem.strerror:
        path = str(problem.filename and short(problem.filename) or "")
        path = path if len(path) <= 100 else brief(path)
        return f"{path}{': ' if path else ''}{problem.strerror}" + (
            "; what is complete is kept: make room, then the same command goes on"
            if problem.errno in (errno.ENOSPC, errno.EDQUOT) else "")
    if re.search(r"os error (28|122)\b|No space left", text):  # of safetensors, without a path
        return "the disk is full; what is complete is kept: make room, the same command goes on"
    if isinstance(problem, MemoryError) or re.search("allocate memory|out of memory", text):
        return ("out of memory: give a smaller SAMPLE_BATCH, TRAIN_TOKENS or SAMPLE_TOKENS, "
                "shorter turns or a smaller MODEL")
    return None


# ---- files ---------------------------------------------------------------------------------------
def _finite(word):
    """A number of a JSON text; NaN, Infinity and 1e999 are none."""
    return float(word) if math.isfinite(float(word)) else int(f"no {word}")


def parse_json(text, where, kind=None):
    """The value of a JSON text, of the type `kind` if given. Stops with `where` if the text is not
    JSON, is nested too deep, or has a number that is not finite or half a surrogate pair."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as problem:
        why = "too deep" if isinstance(problem, RecursionError) else str(problem).splitlines()[0]
        die(f"{where}: not JSON ({why[:60]}): correct or delete it")
    if kind and not isinstance(value, kind):
        die(f"{where}: not a JSON {kind.__name__}: correct or delete it")
    return value


def check_fields(value, where, fields):
    """Stop with `where` if a value is no object that has `fields` {name: type}."""
    for name, kind in fields.items():
        if not isinstance(value, dict) or name not in value or not isinstance(value[name], kind):
            die(f"{where}: no {name!r} in it, or one of another type: correct or delete it")


def read_text(path):
    """A text file in UTF-8, with or without a byte order mark; any other stops with its name."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        die(f"{short(path)}: not UTF-8 ({problem.reason} in line {line}): correct or delete it")


def read_json(path, *keys, kind=dict, missing=None, **fields):
    """A JSON file -> its value, of the type `kind` and with all `keys` and fields (name=type); any
    other stops. missing: what to give where there is no file."""
    if missing is not None and not Path(path).is_file():
        return missing
    value = parse_json(read_text(path), short(path), kind)
    check_fields(value, short(path), dict.fromkeys(keys, object) | fields)
    return value


def read_log(path, heal=True):
    """The text of a log, "" where there is none, without a torn last line (of a killed run, or
    still being written). heal: that line is cut off in the file too, which is said."""
    text, end, torn = read_text(path).rpartition("\n") if path.is_file() else ("", "", "")
    if torn and heal:
        print(f"{short(path)}: a torn last line was cut off")
        write_text(path, text + end)
    return text + end


def write_text(path, text):
    """The first process writes a small file whole or not at all: killed, it leaves the old one."""
    if not parallel.is_first():
        return
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def replace_folder(tmp, folder):
    """Put the folder `tmp` in the place of `folder`. If killed, recover_folder() undoes it."""
    os.sync()  # else a power cut could leave the new files empty and the old ones gone
    old = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    tmp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder):
    """Undo a replace_folder() that was killed."""
    old = folder.with_name(folder.name + ".replaced")
    if old.exists() and not folder.exists():
        old.rename(folder)


def lock(folder):
    """Hold `folder` for this process, until it ends in whatever way: the operating system's lock on
    the file `lock` in it. Another process that holds it stops this one."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder in _locks:
        return
    file = open(folder / "lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        die(f"{short(folder)} is in use by process {brief(file.read())}: wait for it, stop it, or "
            "give another RUN=")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _locks[folder] = file  # closed, it would be free


def show_help(argv, text):
    """For a script without constants: --help prints its docstring."""
    if "--help" in argv or "-h" in argv:
        print(text.strip())
        sys.exit(0)


# ---- constants -----------------------------------------------------------------------------------
def constants(scope):
    """The constants of a script (`scope`: its globals()) as a plain dict."""
    return {k: v for k, v in scope.items() if k.isupper() and type(v) in (str, int, float, bool)}


def configure(scope, argv, title=None):
    """Apply a recipe, such as `--paper` or `--gpu24` (the block scope["PAPER"], scope["GPU24"]),
    and then `NAME=value` words to the constants of a script (`scope`: its globals()). `--help`
    prints the docstring and the block. Any mistake ends with one line and exit code 1. title: a
    function that gives the first line of the run."""
    script, defaults = Path(scope["__file__"]), constants(scope)
    if "--help" in argv or "-h" in argv:
        block = script.read_text(encoding="utf-8").split(RULER)[1]
        print(f"{scope['__doc__'].strip()}\n\n{block.strip()}")
        sys.exit(0)
    said = []
    for word in sorted(argv, key=lambda word: word not in RECIPES):  # recipes come first
        if word in RECIPES:
            block = scope.get(RECIPES[word])
            if not block:
                die(f"{script.name} has no {word} block")
            scope.update(block)
            said.append(f"{word}: " + ", ".join(f"{k}={v}" for k, v in block.items()))
            continue
        name, equals, text = word.partition("=")
        if not equals or name not in defaults:
            near = difflib.get_close_matches(name.upper(), defaults, n=1, cutoff=0.0)[0]
            die(f"unknown constant {brief(name)} (nearest: {near}); see {script.name} --help")
        kind = type(defaults[name])
        try:
            scope[name] = TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            die(f"{name}={brief(text)}: a value of type {kind.__name__} is needed")
        said.append(f"override: {name} = {scope[name]!r} (was {defaults[name]!r})")
    name = scope.get("RUN", "x")
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > 100:
        die(f"RUN={brief(name)}: letters, digits, dot, dash and underscore only, at most 100 bytes "
            "(it names folders)")
    module = sys.modules.get(scope["__name__"])
    kinds = getattr(module, "__annotations__", None) or scope.get("__annotations__", {})
    for name, default in defaults.items():
        _check(name, scope[name], default, kinds.get(name))
    progress.enable(scope.get("PROGRESS", True) and parallel.is_first())
    print(*([title()] if title else []), *said, sep="\n", end="\n" if title or said else "")
    if set(argv) & set(RECIPES) and not scope.get("PLAN_ONLY"):
        import torch
        if not torch.cuda.is_available():
            print("WARNING: a recipe for a GPU, but torch finds none: check driver and torch build")


def _check(name, value, default, kind):
    """Stop if a constant has a value that is not allowed."""
    wrong, low = "", 0 if default == 0 or kind is Count else 1
    if name in ("MODEL", "JUDGE", "SEEDS") and not value:
        wrong = "a name"
    elif typing.get_origin(kind) is typing.Literal and value not in typing.get_args(kind):
        wrong = f"one of {', '.join(map(str, typing.get_args(kind)))}"
    elif kind is Share and not 0 <= value <= 1:
        wrong = "from 0.0 to 1.0"
    elif type(default) is int and not low <= value < 2 ** 31:
        wrong = f"from {low} to {2 ** 31 - 1}"
    elif type(default) is float and not (math.isfinite(value) and value >= 0):
        wrong = "a finite number, 0 or more"
    if wrong:
        die(f"{name}={brief(value)}: must be {wrong}")


def make_meta(scope, parent):
    """What meta.json holds, as a dict. scope: the stage's globals(); parent: where it began."""
    import torch
    import transformers
    versions = dict(torch=torch.__version__, transformers=transformers.__version__,
                    python=platform.python_version())
    return dict(stage=short(Path(scope["__file__"]).resolve()), command=command(),
                constants=constants(scope), parent=publishable(str(parent)), versions=versions,
                prompts_sha256=file_digest(*PROMPTS.glob("*")), machine=machine(),
                time=time.strftime("%Y-%m-%d %H:%M:%S"))


def command():
    """The command line of this process as typed in the repository, without paths of the machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    words = ["python", "-m", spec.name] if spec else ["python", short(Path(sys.argv[0]).resolve())]
    for word in sys.argv[1:]:
        name, equals, value = word.rpartition("=")
        words.append(name + equals + publishable(value))
    return shlex.join(words)


def claim(scope, checkpoints):
    """Lock results/runs/RUN/, and with it checkpoints/RUN/, for a stage (`scope`: its globals()) ->
    the first. Stops if another process has the lock, or another stage made one (by meta.json)."""
    folder, stage = RUNS / scope["RUN"], short(Path(scope["__file__"]).resolve())
    made = checkpoints / scope["RUN"]
    for file in (folder / "meta.json", made / "meta.json", *made.glob(f"{STEP}/meta.json")):
        if file.is_file() and (owner := read_json(file, "stage")["stage"]) != stage:
            die(f"{short(file.parent)} belongs to {brief(owner)}: give another RUN=, or move it")
    lock(folder)
    recover_folder(made)
    return folder


def write_meta(folder, meta):
    """A run's meta.json in its results: without paths of this machine."""
    public = {name: publishable(value) for name, value in meta["constants"].items()}
    write_text(folder / "meta.json", json.dumps(dict(meta, constants=public), indent=1))


def short(path):
    """A path as text; from the repository's folder on where it lies in it."""
    path = Path(path)
    inside = path.is_absolute() and path.resolve().is_relative_to(ROOT)
    return str(path.resolve().relative_to(ROOT) if inside else path)


def publishable(text):
    """A constant as it may be published: of paths outside the repository only the last part."""
    if not isinstance(text, str):
        return text
    words = []  # commas may join several paths
    for word in map(str.strip, text.split(",")):
        if word.startswith(("/", "..")):
            inside = short(Path(word).resolve())
            word = Path(word).name if inside.startswith("/") else inside
        words.append(word)
    return ",".join(words)


def machine():
    """One line that names the machine: cores, their instruction set, memory in GB, GPU."""
    import torch
    memory, kind = psutil.virtual_memory().total / 2 ** 30, platform.machine()
    line = (f"{os.cpu_count()} CPU cores ({kind} {torch.backends.cpu.get_cpu_capability()}), "
            f"{memory:.0f} GB")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        line += f", {gpu.name} {gpu.total_memory / 2 ** 30:.0f} GB"
    return line


def peak_gb():
    """Peak memory of this process so far, GB: of the GPU where there is one."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2 ** (20 if sys.platform == "linux" else 30)


def locate(name):
    """The path that a name means, as given or seen from the repository; None if it is not there."""
    return next((p for p in (Path(name), ROOT / name) if name and p.exists()), None)


def file_digest(*paths):
    """SHA-256 over names and contents of files, by name; "" if none is there (a hub id is none)."""
    digest, found = hashlib.sha256(), [locate(str(path or "").strip()) for path in paths]
    found = [path for path in found if path and path.is_file()]
    for path in sorted(found, key=lambda p: p.name):
        with open(path, "rb") as f:
            content = hashlib.file_digest(f, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest() if found else ""


def newest_checkpoint(folder):
    """The newest complete step folder of a run that holds its optimizer, or None."""
    return max((p.parent for p in folder.glob(f"{STEP}/state.safetensors")), default=None)


def drop_old_states(newest):
    """Delete the optimizer's state of all steps of a run but the newest one: it is several times as
    large as the weights, and only the newest step is gone on from."""
    for old in newest.parent.glob(f"{STEP}/state.safetensors"):
        if old.parent != newest:
            old.unlink()


def free_to_change(source):
    """STEPS, SAVE_EVERY and the constants that a script's text tags (hardware) or (display)."""
    tagged = re.findall(r"^([A-Z_0-9]+)(?::.*)? =.*\((?:hardware|display)\)", source, re.MULTILINE)
    return {"STEPS", "SAVE_EVERY", *tagged}


def check_resume(scope, folder, inputs):
    """A run goes on only with the constants and the inputs it began with. scope: the stage's
    globals(); inputs: {what it rests on: digest of its content}, as in its meta.json."""
    free = free_to_change(Path(scope["__file__"]).read_text(encoding="utf-8"))
    made = read_json(folder / "meta.json", constants=dict)
    then, began_with, changed = made["constants"], made.get("inputs", {}), []
    for name, value in constants(scope).items():
        if name not in free and then.get(name) != value:
            changed.append(f"{name} {then.get(name)!r} -> {value!r}")
    for name, digest in inputs.items():
        if began_with.get(name) != digest:
            changed.append(f"other content of {name}")
    if changed:
        die(f"{short(folder)} was made with other constants or inputs ({'; '.join(changed)}): "
            "restore them, give another RUN=, or delete it")


def truncate_log(path, last, step_of):
    """Drop what a killed run left in a log: lines of steps after `last`, and a torn last line.
    step_of: line -> its step. A line for which it fails stops with its number."""
    kept, lines = [], read_log(path).splitlines(keepends=True)
    for n, line in enumerate(lines, 1):
        try:
            kept += [line] if step_of(line) <= last else []
        except (ValueError, LookupError, TypeError, RecursionError):
            die(f"{short(path)} line {n}: not a line of this log: correct or delete it")
    if len(kept) < len(lines):
        write_text(path, "".join(kept))
