"""engine/run.py, errors, interrupts, files: who holds a folder, what a kill leaves, what ends with
one line."""
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from helpers import ROOT, stops

from engine import run

DEEP = "[" * 100_000 + "]" * 100_000


def script(body):
    """A process that runs `body` as main(argv) below run.guarded -> Popen with pipes."""
    code = ("import errno, os, sys, time\nfrom engine import run\n\ndef main(argv):\n"
            + textwrap.indent(textwrap.dedent(body), "    ") + "\n\nrun.guarded(main, [])\n")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---- errors and interrupts -----------------------------------------------------------------------

WAITS = 'run.doing(" in step 41; the same command goes on from step 40")\nprint("up", flush=True)\n'


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_with_one_line(number, code):
    process = script(WAITS + "time.sleep(60)")
    process.stdout.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == code
    assert said.strip() == "stopped in step 41; the same command goes on from step 40"


def test_a_second_interrupt_ends_at_once():
    """The first one waits for something that does not end."""
    process = script("try:\n    print('up', flush=True)\n    time.sleep(60)\nfinally:\n"
                             '    print("first", flush=True)\n    time.sleep(60)')
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("body, says", [
    ('raise OSError(errno.ENOSPC, "No space left on device", "results/x/games.jsonl")',
     "error: results/x/games.jsonl: No space left on device; what is complete is kept: make room, "
     "then the same command goes on"),
    ('open("/", "w")', "error: /: Is a directory"),
    ('os.mkdir("/tmp/" + "x" * 300)', "File name too long"),
    ('open("/root/" * 0 + "/nowhere/file")', "error: /nowhere/file: No such file or directory"),
    ("raise MemoryError", "out of memory"),
    ('raise RuntimeError("[enforce fail at alloc_cpu.cpp] can\'t allocate memory: 9 bytes")',
     "out of memory"),
    ('raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")', "out of memory"),
    ('from safetensors import SafetensorError\n'
     'raise SafetensorError("I/O error: No space left on device (os error 28)")', "disk is full"),
    ('from safetensors import SafetensorError\n'
     'raise SafetensorError("I/O error: Disk quota exceeded (os error 122)")', "disk is full"),
    ('raise OSError(errno.EDQUOT, "Disk quota exceeded", "a")',
     "a: Disk quota exceeded; what is complete is kept")])
def test_what_the_machine_does_is_one_line(body, says):
    process = script(body)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert said.startswith("error: ") and said.count("\n") == 1 and says in said, said


def test_errors_of_the_program_keep_their_traceback():
    process = script("{}[1]")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" in said and "KeyError: 1" in said


def test_a_really_full_disk(tmp_path):
    """/dev/full takes no byte."""
    assert os.path.exists("/dev/full")
    process = script('with open("/dev/full", "w") as f:\n    f.write("x" * 100)')
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "No space left on device" in said
    assert "Traceback" not in said


def test_brief():
    assert run.brief("short") == "'short'" and run.brief(3) == "3"
    long = run.brief("x" * 5000)
    assert len(long) <= 75 and "5002 characters" in long
    assert "\n" not in run.brief("a\nb") and "\x1b" not in run.brief("\x1b[2J")


# ---- reading and writing -------------------------------------------------------------------------

@pytest.mark.parametrize("text, why", [
    ("", "not JSON"), ('{"a": 1', "not JSON"), ("[1]", "not a JSON dict"), ("3", "not a JSON dict"),
    ('{"a": NaN}', "not JSON"), ('{"a": -Infinity}', "not JSON"), (DEEP, "too deep"),
    ('{"a": "\\ud800"}', "not JSON"), ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    ("{}", "no 'constants'"), ("\x00", "not JSON")])
def test_a_damaged_json_file_stops_with_its_name(tmp_path, text, why):
    file = tmp_path / "meta.json"
    file.write_text(text)
    line = stops(run.read_json, file, "constants")
    assert "meta.json" in line and why in line and len(line) < 300


def test_a_file_that_is_no_text_stops_with_its_name(tmp_path):
    (tmp_path / "meta.json").write_bytes(b"\xff\xfe\x00")
    assert "meta.json: not UTF-8" in stops(run.read_json, tmp_path / "meta.json")


def test_read_json_of_what_is_well(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "\U0001f600 \\ud800"}).encode())
    assert run.read_json(file, "a") == {"a": "\U0001f600 \\ud800"}
    file.write_text("[1, 2]")
    assert run.read_json(file, kind=list) == [1, 2]


LOG = '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def step_of(line):
    return json.loads(line)["step"]


@pytest.mark.parametrize("text, last, left", [
    (LOG, 2, '{"step": 1}\n{"step": 2}\n'), (LOG, 9, LOG), (LOG + '{"st', 3, LOG), (LOG, 0, ""),
    ("", 3, "")])
def test_truncate_log(tmp_path, capsys, text, last, left):
    file = tmp_path / "games.jsonl"
    file.write_text(text)
    run.truncate_log(file, last, step_of)
    assert file.read_text() == left
    assert ("torn last line" in capsys.readouterr().out) == text.endswith("st")


@pytest.mark.parametrize("line", ["no json", "[]", "{}", '{"step": null}', '"step"', DEEP, ""])
def test_a_foreign_line_in_a_log_is_named(tmp_path, line):
    file = tmp_path / "games.jsonl"
    file.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    said = stops(run.truncate_log, file, 2, step_of)
    assert "games.jsonl line 2" in said and "delete it" in said
    assert file.read_text().startswith('{"step": 1}\n')  # nothing was changed


def test_an_untouched_log_is_not_written_again(tmp_path):
    file = tmp_path / "games.jsonl"
    file.write_text(LOG)
    os.utime(file, (1, 1))
    run.truncate_log(file, 3, step_of)
    assert file.stat().st_mtime == 1
    run.truncate_log(tmp_path / "none.jsonl", 3, step_of)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_folder_is_replaced_whole(tmp_path):
    """Killed at any place of replace_folder, recover_folder leads to the old or the new one."""
    def fresh(name):
        base = tmp_path / name
        for part, text in (("x", "old"), ("x.tmp", "new")):
            (base / part).mkdir(parents=True)
            (base / part / "file").write_text(text)
        return base / "x.tmp", base / "x"

    tmp, folder = fresh("whole")
    run.replace_folder(tmp, folder)
    assert (folder / "file").read_text() == "new" and not tmp.exists()
    assert [p.name for p in folder.parent.iterdir()] == ["x"]

    for n, name in enumerate(["rename", "rename", "rmtree"]):
        tmp, folder = fresh(f"killed{n}")
        killer = f"""
            import pathlib, shutil
            calls = [0]
            def count(*args, **kwargs):
                calls[0] += 1
                if calls[0] == {n + 2}:
                    os._exit(9)
                return None
            def wrap(owner, what):
                real = getattr(owner, what)
                def call(*args, **kwargs):
                    count()
                    return real(*args, **kwargs)
                setattr(owner, what, call)
            wrap(pathlib.Path, "rename")
            wrap(shutil, "rmtree")
            run.replace_folder(pathlib.Path({str(tmp)!r}), pathlib.Path({str(folder)!r}))
        """
        process = script(killer)
        process.communicate(timeout=60)
        assert process.returncode == 9, name
        run.recover_folder(folder)
        assert (folder / "file").read_text() in ("old", "new")


# ---- who holds a folder --------------------------------------------------------------------------

@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The globals of a stage 09_fake.py whose folders lie below tmp_path."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RUNS", tmp_path / "results" / "runs")
    monkeypatch.setattr(run, "_locks", {})
    return dict(__file__=str(tmp_path / "09_fake.py"), RUN="a")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_claim_makes_the_folder(mine, tmp_path):
    assert run.claim(mine, tmp_path / "checkpoints") == tmp_path / "results/runs/a"
    assert (tmp_path / "results/runs/a/lock").read_text() == str(os.getpid())


@pytest.mark.parametrize("place", ["results/runs/a", "checkpoints/a", "checkpoints/a/step_000020"])
def test_a_folder_of_another_stage_stops(mine, tmp_path, place):
    write_json(tmp_path / place / "meta.json", dict(stage="02_selfplay_rl.py"))
    line = stops(run.claim, mine, tmp_path / "checkpoints")
    assert f"{place} belongs to '02_selfplay_rl.py'" in line and "RUN=" in line
    write_json(tmp_path / place / "meta.json", dict(stage="09_fake.py"))
    run.claim(mine, tmp_path / "checkpoints")


def test_two_processes_with_one_run(mine, tmp_path):
    """The second stops and names the first; when the first was killed, the folder is free."""
    holder = script(f"""
        import pathlib
        run.lock(pathlib.Path({str(tmp_path / "results/runs/a")!r}))
        print("up", flush=True)
        time.sleep(60)""")
    holder.stdout.readline()
    line = stops(run.claim, mine, tmp_path / "checkpoints")
    assert f"process '{holder.pid}'" in line and "results/runs/a is in use" in line
    holder.kill()
    holder.wait()
    time.sleep(0.1)
    run.claim(mine, tmp_path / "checkpoints")


def test_what_a_killed_replacement_left_is_put_back(mine, tmp_path):
    write_json(tmp_path / "checkpoints/a.replaced/meta.json", dict(stage="09_fake.py"))
    run.claim(mine, tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints/a/meta.json").is_file()


def test_what_a_user_has_put_aside_stays_there(mine, tmp_path):
    """`mv checkpoints/a checkpoints/a.old`, then a new run, and its save."""
    write_json(tmp_path / "checkpoints/a.old/meta.json", dict(stage="09_fake.py"))
    run.claim(mine, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints/a").exists()
    for name in ("a", "new"):
        write_json(tmp_path / f"checkpoints/{name}/meta.json", dict(stage="09_fake.py"))
    run.replace_folder(tmp_path / "checkpoints/new", tmp_path / "checkpoints/a")
    assert (tmp_path / "checkpoints/a.old/meta.json").is_file()


def test_a_message_does_not_steer_the_terminal():
    said = stops(run.die, "a tensor named x \x1b[2J \x9b\x07 \u202e in the file")
    assert said.isprintable() and "named x ?[2J ?? ? in" in said


def test_explain_leaves_other_errors_alone():
    assert run.explain(KeyError("x")) is None and run.explain(ValueError("allocate")) is None
    assert run.explain(OSError("no number")) is None
    assert run.explain(OSError(errno.EACCES, "Permission denied", "x/y")) == "x/y: Permission denied"
