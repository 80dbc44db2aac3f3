"""What every stage does around its work: constants, meta.json, resume, one-line errors.

A stage keeps its constants at its top, one a line, between two rulers; each can be given on the
command line as NAME=value. Its type says what is allowed: `Literal["a", "b"]` a choice, `Share` a
number from 0 to 1, `Count` an int of 0 or more, int 1 or more (0 or more where the default is 0),
float finite and 0 or more."""
import difflib
import hashlib
import json
import math
import os
import platform
import re
import resource
import shlex
import sys
import time
import typing
from pathlib import Path

import psutil  # accelerate brings it

from engine import progress

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "prompts"
CHECKPOINTS = ROOT / "checkpoints"
RUNS = ROOT / "results" / "runs"            # what runs write; ignored by git
REFERENCE = ROOT / "results" / "reference"  # what is committed; only evaluation.publish writes it
RULER = "# " + "=" * 98
TRUTH = {"true": True, "1": True, "false": False, "0": False}
Share = typing.Annotated[float, "from 0 to 1"]
Count = typing.Annotated[int, "0 or more"]


def die(message):
    """Stop with one line on stderr and exit code 1: what is wrong and what to do about it."""
    sys.exit(f"error: {message}")


def constants(scope):
    """The constants of a script (`scope`: its globals()) as a plain dict."""
    return {k: v for k, v in scope.items() if k.isupper() and type(v) in (str, int, float, bool)}


def configure(scope, argv, title=None):
    """Apply `--paper` (the block scope["PAPER"]) and `NAME=value` words to the constants of a
    script (`scope`: its globals()). `--help` prints the docstring and the block. PROGRESS=false
    switches the progress bars off. Any mistake ends with one line and exit code 1. title: a
    function whose text is the first line of the run, before what was overridden."""
    script, defaults = Path(scope["__file__"]), constants(scope)
    if "--help" in argv or "-h" in argv:
        block = script.read_text(encoding="utf-8").split(RULER)[1]
        print(f"{scope['__doc__'].strip()}\n\n{block.strip()}")
        sys.exit(0)
    said = []
    if "--paper" in argv:
        if not scope.get("PAPER"):
            die(f"{script.name} has no --paper block")
        scope.update(scope["PAPER"])
        said.append("--paper: " + ", ".join(f"{k}={v}" for k, v in scope["PAPER"].items()))
    for word in argv:
        if word == "--paper":
            continue
        name, equals, text = word.partition("=")
        if not equals or name not in defaults:
            near = difflib.get_close_matches(name.upper(), defaults, n=1, cutoff=0.0)[0]
            die(f"unknown constant {name!r} (nearest: {near}); {script.name} --help lists all")
        kind = type(defaults[name])
        try:
            scope[name] = TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            die(f"{name}={text!r}: a value of type {kind.__name__} is needed")
        said.append(f"override: {name} = {scope[name]!r} (was {defaults[name]!r})")
    if not re.fullmatch(r"\w[\w.-]*", scope.get("RUN", "x")):
        die(f"RUN={scope['RUN']!r}: letters, digits, dot, dash and underscore only "
            "(it names folders)")
    module = sys.modules.get(scope["__name__"])
    kinds = getattr(module, "__annotations__", None) or scope.get("__annotations__", {})
    for name, default in defaults.items():
        _check(name, scope[name], default, kinds.get(name))
    progress.enable(scope.get("PROGRESS", True))
    print(*([title()] if title else []), *said, sep="\n", end="\n" if title or said else "")


def _check(name, value, default, kind):
    """Stop if a constant has a value that is not allowed."""
    wrong, low = "", 0 if default == 0 or kind is Count else 1
    if typing.get_origin(kind) is typing.Literal and value not in typing.get_args(kind):
        wrong = f"one of {', '.join(map(str, typing.get_args(kind)))}"
    elif kind is Share and not 0 <= value <= 1:
        wrong = "from 0.0 to 1.0"
    elif type(default) is int and not low <= value < 2 ** 31:
        wrong = f"from {low} to {2 ** 31 - 1}"
    elif type(default) is float and not (math.isfinite(value) and value >= 0):
        wrong = "a finite number, 0 or more"
    if wrong:
        die(f"{name}={value!r}: must be {wrong}")


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


def open_results(scope, meta):
    """Make results/runs/RUN/ with its meta.json -> the folder. One of another stage stops."""
    folder = RUNS / scope["RUN"]
    file = folder / "meta.json"
    if file.is_file():
        owner = json.loads(file.read_text(encoding="utf-8")).get("stage")
        if owner != meta["stage"]:
            die(f"{short(folder)} belongs to {owner}: give another RUN=, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    public = {name: publishable(value) for name, value in meta["constants"].items()}
    write_text(file, json.dumps(dict(meta, constants=public), indent=1))
    return folder


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
    """One line that names the machine: processor or GPU, cores, memory in GB."""
    import torch
    memory = psutil.virtual_memory().total / 2 ** 30
    line = f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GB"
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


def write_text(path, text):
    """Write a small file whole or not at all: a killed run leaves the old one."""
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def file_digest(*paths):
    """SHA-256 over names and contents of files, in the order of their names; "" if none is there
    (a hub id is no file). It changes when one of them does."""
    found, digest = [], hashlib.sha256()
    for path in paths:
        path = locate(str(path or "").strip())
        if path and path.is_file():
            found.append(path)
    for path in sorted(found, key=lambda p: p.name):
        with open(path, "rb") as f:
            content = hashlib.file_digest(f, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest() if found else ""


def newest_checkpoint(folder):
    """The newest complete step folder of a run that holds its optimizer, or None."""
    return max((p.parent for p in folder.glob("step_*[0-9]/state.safetensors")), default=None)


def free_to_change(source):
    """STEPS, SAVE_EVERY and the constants that a script's text tags (hardware) or (display)."""
    tagged = re.findall(r"^([A-Z_0-9]+)(?::.*)? =.*\((?:hardware|display)\)", source, re.MULTILINE)
    return {"STEPS", "SAVE_EVERY", *tagged}


def check_resume(scope, folder, inputs):
    """A run goes on only with the constants and the inputs it began with. scope: the stage's
    globals(); inputs: {what it rests on: digest of its content}, as in its meta.json."""
    free = free_to_change(Path(scope["__file__"]).read_text(encoding="utf-8"))
    made = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
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


def truncate_log(path, keep):
    """Drop what a killed run left: a torn last line, and lines for which keep(line) is false."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(x for x in lines if x.endswith("\n") and keep(x)))
