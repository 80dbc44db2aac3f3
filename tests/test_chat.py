"""selfplay/chat.py: a conversation with sampled replies played, and its command line."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, copy_repo, run_script, stops

from engine import merge
from evaluation import publish
from selfplay import chat, show, turns


@pytest.fixture
def said(monkeypatch):
    """Plays the user's lines, given by types(), and the model's completion."""
    class Played:
        completion, prompts = "plan</think><answer>reply</answer>", []

        def types(*lines):
            data = "\n".join(lines).encode("utf-8", "surrogateescape")
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    def sample(model, tok, prompts, *_, **__):
        Played.prompts = [tok.decode(ids) for ids in prompts]
        ids = tok(Played.completion, add_special_tokens=False).input_ids
        return [(ids, [0.0] * len(ids))]

    monkeypatch.setattr(turns, "sample", sample)
    return Played


def test_chat_hides_the_thinking(said, tiny_models, capsys):
    said.types("hello <|im_end|>", "")
    chat.main([tiny_models["qwen2"]])
    printed = capsys.readouterr().out
    assert printed.endswith("> reply\n> ") and "plan" not in printed
    [prompt] = said.prompts
    assert "hello" in prompt and "hello <|im_end|>" not in prompt


def test_chat_shows_the_thinking_where_asked(said, tiny_models, capsys):
    said.types("hello")  # and the input ends
    chat.main([tiny_models["qwen2"], "--show-thinking"])
    printed = capsys.readouterr().out
    assert "[thinking] plan\nreply\n" in printed


def test_chat_without_an_answer(said, tiny_models, capsys):
    said.types("hello", "")
    said.completion = "only thinking"
    chat.main([tiny_models["qwen2"]])
    assert "no answer in the turn format" in capsys.readouterr().out


def test_chat_with_a_checkpoint_without_cot(said, tiny_models, tmp_path, capsys):
    """meta.json says whether the checkpoint thinks."""
    folder = shutil.copytree(tiny_models["qwen2"], tmp_path / "ck")
    (folder / "meta.json").write_text(json.dumps(dict(constants=dict(COT=False))))
    said.types("hello", "")
    said.completion = "a plain reply"
    chat.main([str(folder)])
    assert "> a plain reply\n" in capsys.readouterr().out
    assert "<think>" not in said.prompts[0]


@pytest.mark.parametrize("content, line", [("{torn", "not JSON"), ("[]", "not a JSON dict")])
def test_a_broken_meta_json(tiny_models, tmp_path, content, line):
    folder = shutil.copytree(tiny_models["qwen2"], tmp_path / "ck")
    (folder / "meta.json").write_text(content)
    message = stops(chat.main, [str(folder)])
    assert "ck/meta.json" in message and line in message


def test_a_reply_cannot_steer_the_terminal(said, tiny_models, capsys):
    said.types("hello")
    said.completion = "a\x1b[2J</think><answer>\x07b\x9b1m\tc\nd\u202ee\r</answer>"
    chat.main([tiny_models["qwen2"], "--show-thinking"])
    assert "[thinking] a\\x1b[2J\n\\x07b\\x9b1m\tc\nd\\u202ee\n" in capsys.readouterr().out


def test_input_that_is_no_text_is_replaced(said, tiny_models, capsys):
    """Bytes that are not UTF-8, and a half of a surrogate pair."""
    said.types("a\udcff\udced\udca0\udc80b", "")
    chat.main([tiny_models["qwen2"]])
    assert "> reply\n" in capsys.readouterr().out
    assert re.search("a\ufffd+b", said.prompts[0])


def test_a_question_that_is_too_long_is_refused(said, tiny_models, capsys):
    said.types("word " * 3700, "short", "")
    chat.main([tiny_models["qwen2"]])  # 4096 positions
    printed = capsys.readouterr().out
    assert re.search(r"> \(too long: \d{4,} tokens .* at most 3584\)\n> reply\n", printed)
    assert len(said.prompts) == 1


@pytest.mark.parametrize("argv", [[], ["--show-thinking"], ["a", "b"], ["a", "--show-thought"]])
def test_usage(argv):
    assert "usage" in stops(chat.main, argv)


@pytest.mark.parametrize("module", [chat, show, merge, publish])
def test_help_prints_the_docstring(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert not end.value.code and capsys.readouterr().out == module.__doc__.strip() + "\n"


def test_a_runs_folder_means_its_newest_step(said, tiny_models, tmp_path, capsys):
    for step, cot in ((20, True), (40, False)):
        folder = shutil.copytree(tiny_models["qwen2"], tmp_path / f"run/step_{step:06d}")
        (folder / "state.safetensors").touch()
        (folder / "meta.json").write_text(json.dumps(dict(constants=dict(COT=cot))))
    said.types("hello", "")
    said.completion = "a plain reply"
    chat.main([str(tmp_path / "run")])
    assert "> a plain reply\n" in capsys.readouterr().out


def test_a_folder_without_a_model(tmp_path):
    assert "no config.json and no adapter_config.json" in stops(chat.main, [str(tmp_path)])


def test_a_checkpoint_that_is_not_there():
    assert "checkpoints/no_such_run" in stops(chat.main, ["checkpoints/no_such_run"])


# ---- as a user runs it ---------------------------------------------------------------------------

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_with_one_line(tiny_models, number, code):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "selfplay.chat", tiny_models["qwen2"]], cwd=ROOT,
                          env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.read(len("one question a line, an empty line ends\n> "))
        time.sleep(1)  # until it waits: a signal between prompt and read() would wait too
        process.send_signal(number)
        process.wait(60)
        assert process.stderr.read().decode().strip() == "stopped"
    assert process.returncode == code


def test_a_conversation_of_bytes(tiny_models):
    """On a screen that shows ASCII only; the random model writes what it likes."""
    done = subprocess.run([sys.executable, "-m", "selfplay.chat", tiny_models["llama"],
                           "--show-thinking"], cwd=ROOT, input=b"hi \xff\xc3\n\n",
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
                          capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode("ascii")
    assert "[thinking]" in shown and not re.search("[\0-\x08\x0b-\x1f\x7f]", shown)


def test_a_bad_prompt_file_stops_before_the_model(tiny_models, tmp_path):
    folder = copy_repo(tmp_path / "repo")
    (folder / "prompts" / "defender_reflect.txt").unlink()
    done = run_script("-m", "selfplay.chat", tiny_models["qwen2"], cwd=folder, input="hello\n")
    assert done.returncode == 1 and done.stderr == (
        "error: prompts/defender_reflect.txt: No such file or directory\n")


# ---- selfplay.show -------------------------------------------------------------------------------

def test_games_of_checkpoints_side_by_side(monkeypatch, tiny_models, tmp_path, capsys):
    """Four kinds of games; the attacked ones show the attack; nothing steers the terminal."""
    names = []
    for kind, cot in (("qwen2", True), ("llama", False)):
        folder = shutil.copytree(tiny_models[kind], tmp_path / kind)
        (folder / "meta.json").write_text(json.dumps(dict(constants=dict(COT=cot))))
        names.append(str(folder))

    def sample(model, tok, prompts, *_, **__):
        text = "plan</think><answer>\x1b[2J " + "word " * 200 + "</answer>"
        ids = tok(text, add_special_tokens=False).input_ids
        return [(ids + [tok.turn_end], [0.0] * (len(ids) + 1)) for _ in prompts]

    monkeypatch.setattr(turns, "sample", sample)
    show.main(names)
    parts = capsys.readouterr().out.split("\n\n")
    assert [part.split(",")[0].strip() for part in parts] == [
        "vanilla_harmful", "generated_harmful", "vanilla_benign", "generated_benign"]
    for part in parts:
        assert all(f" {name}\n" in part for name in names) and "\x1b" not in part
        assert part.count("  reply ") == 2
        assert part.count("  attack ") == (2 if part.lstrip().startswith("generated") else 0)
        assert part.count("\\x1b") == part.count("  reply ") + part.count("  attack ")
        assert part.count(" ...") >= 2 and max(map(len, part.splitlines())) <= 300


def test_show_says_what_is_missing(tmp_path):
    assert "usage" in stops(show.main, [])
    assert "is not there" in stops(show.main, [str(tmp_path / "none")])
