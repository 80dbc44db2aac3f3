"""What every stage does around its work: constants, meta.json, resume, one-line errors.

A stage keeps its constants at its top, one a line, between two rulers; each can be given on the
command line as NAME=value. The allowed values stand beside a constant as its type: `Literal["a",
"b"]` for a choice, `Share` for a number from 0 to 1. Every other number follows one rule: whole
numbers are 1 or more (0 or more where the default is 0), the others finite and not negative.
"""
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
Share = typing.Annotated[float, "from 0 to 1"]


def die(message):
    """Stop with one line on stderr and exit code 1: what is wrong and what to do about it."""
    sys.exit(f"error: {message}")


def constants(scope):
    """The constants of a script (`scope`: its globals()) as a plain dict."""
    kinds = (str, int, float, bool)
    return {k: v for k, v in scope.items() if k.isupper() and type(v) in kinds}


def configure(scope, argv):
    """Apply `--paper` and `NAME=value` words to the constants of a script (`scope`: its globals()).
    `scope["PAPER"]` is the second block. `--help` prints the docstring and the block.
    PROGRESS=false switches the progress bars off. Any mistake ends with one line and exit code
    1."""
    script, defaults = Path(scope["__file__"]), constants(scope)
    if "--help" in argv or "-h" in argv:
        block = script.read_text(encoding="utf-8").split(RULER)[1]
        print(f"{scope['__doc__'].strip()}\n\n{block.strip()}")
        sys.exit(0)
    if "--paper" in argv:
        if not scope.get("PAPER"):
            die(f"{script.name} has no --paper block")
        scope.update(scope["PAPER"])
        print("--paper:", ", ".join(f"{k}={v}" for k, v in scope["PAPER"].items()))
    for word in argv:
        if word == "--paper":
            continue
        name, equals, text = word.partition("=")
        if not equals or name not in defaults:
            near = difflib.get_close_matches(name.upper(), defaults, n=1, cutoff=0.0)[0]
            die(f"unknown constant {name!r} (nearest: {near}); {script.name} --help lists all")
        scope[name] = _typed(name, text, type(defaults[name]))
        print(f"override: {name} = {scope[name]!r} (was {defaults[name]!r})")
    if not re.fullmatch(r"\w[\w.-]*", scope.get("RUN", "x")):
        die(f"RUN={scope['RUN']!r}: letters, digits, dot, dash and underscore only "
            "(it names folders)")
    module = sys.modules.get(scope["__name__"])
    kinds = getattr(module, "__annotations__", None) or scope.get("__annotations__", {})
    for name, default in defaults.items():
        _check(name, scope[name], default, kinds.get(name))
    progress.enable(scope.get("PROGRESS", True))


def _typed(name, text, kind):
    """The text as int, float, bool or str, or one line that says which of them was wanted."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        die(f"{name}={text!r}: a value of type {kind.__name__} is needed")


def _check(name, value, default, kind):
    """Stop if a constant has a value that is not allowed."""
    wrong, low = "", 0 if default == 0 else 1
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
    """What meta.json holds: stage, command, constants, parent, versions, hash of prompts/, machine,
    time. scope: the stage's globals()."""
    import torch
    import transformers
    texts = hashlib.sha256()
    for path in sorted(PROMPTS.glob("*")):
        texts.update(path.name.encode() + path.read_bytes())
    versions = dict(torch=torch.__version__, transformers=transformers.__version__,
                    python=platform.python_version())
    stage = short(Path(scope["__file__"]).resolve())
    return dict(stage=stage, command=command(), constants=constants(scope),
                parent=publishable(str(parent)), versions=versions,
                prompts_sha256=texts.hexdigest(), machine=machine(),
                time=time.strftime("%Y-%m-%d %H:%M:%S"))


def command():
    """The command line of this process as a user would type it in the repository's folder; no path
    of the machine is in it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    what = ["-m", spec.name] if spec else [short(Path(sys.argv[0]).resolve())]
    words = []
    for word in sys.argv[1:]:
        name, equals, value = word.rpartition("=")
        words.append(name + equals + publishable(value))
    return shlex.join(["python", *what, *words])


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
    """A constant as it may be published: of a path outside the repository only its last part (of
    each, where commas join several). Other values come back as they are."""
    if not isinstance(text, str):
        return text
    words = []
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
    for path in (Path(name), ROOT / name):
        if name and path.exists():
            return path
    return None


def write_text(path, text):
    """Write a small file whole or not at all: a killed run leaves the old one."""
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def newest_checkpoint(folder):
    """The newest complete step folder of a run that holds its optimizer, or None."""
    complete = [p.parent for p in folder.glob("step_*/state.safetensors")]
    return max((p for p in complete if p.suffix != ".tmp"), default=None)


def free_to_change(source):
    """Constants of a script (its text) that may differ in a resumed run: STEPS, SAVE_EVERY and
    those tagged (hardware) or (display)."""
    tagged = re.findall(r"^([A-Z_0-9]+)(?::.*)? =.*\((?:hardware|display)\)", source, re.MULTILINE)
    return {"STEPS", "SAVE_EVERY", *tagged}


def check_resume(scope, folder):
    """A run goes on only with the constants it began with. scope: the stage's globals()."""
    free = free_to_change(Path(scope["__file__"]).read_text(encoding="utf-8"))
    then = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["constants"]
    changed = [f"{name} {then.get(name)!r} -> {value!r}" for name, value in
               constants(scope).items() if name not in free and then.get(name) != value]
    if changed:
        die(f"{short(folder)} was made with other constants ({'; '.join(changed)}): "
            "restore them, give another RUN=, or delete it")


def truncate_log(path, keep):
    """Keep the lines for which keep(line) is true: what a killed run wrote after its last
    checkpoint goes, a torn last line too."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(x for x in lines if x.endswith("\n") and keep(x)))
