"""selfplay/chat.py: a conversation with sampled replies played, and its command line."""
import json
import shutil

import pytest
from helpers import stops

from selfplay import chat, turns


@pytest.fixture
def said(monkeypatch):
    """Plays the user's lines and the model's completion; `ids` is what is sampled."""
    class Played:
        lines, completion, prompts = [], "plan</think><answer>reply</answer>", []

    def typed(prompt):
        if not Played.lines:
            raise EOFError
        return Played.lines.pop(0)

    def sample(model, tok, prompts, *_):
        Played.prompts = [tok.decode(ids) for ids in prompts]
        ids = tok(Played.completion, add_special_tokens=False).input_ids
        return [(ids, [0.0] * len(ids))]

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(turns, "sample", sample)
    return Played


def test_chat_hides_the_thinking(said, tiny_models, capsys):
    said.lines = ["hello <|im_end|>", ""]
    chat.main([tiny_models["qwen2"]])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "reply" and "plan" not in printed
    [prompt] = said.prompts
    assert "hello" in prompt and "hello <|im_end|>" not in prompt


def test_chat_shows_the_thinking_where_asked(said, tiny_models, capsys):
    said.lines = ["hello"]  # and the input ends
    chat.main([tiny_models["qwen2"], "--show-thinking"])
    printed = capsys.readouterr().out
    assert "[thinking] plan" in printed and printed.splitlines()[-1] == "reply"


def test_chat_without_an_answer(said, tiny_models, capsys):
    said.lines, said.completion = ["hello", ""], "only thinking"
    chat.main([tiny_models["qwen2"]])
    assert "no answer in the turn format" in capsys.readouterr().out


def test_chat_with_a_checkpoint_without_cot(said, tiny_models, tmp_path, capsys):
    """meta.json says whether the checkpoint thinks."""
    folder = shutil.copytree(tiny_models["qwen2"], tmp_path / "ck")
    (folder / "meta.json").write_text(json.dumps(dict(constants=dict(COT=False))))
    said.lines, said.completion = ["hello", ""], "a plain reply"
    chat.main([str(folder)])
    assert capsys.readouterr().out.splitlines()[-1] == "a plain reply"
    assert "<think>" not in said.prompts[0]


@pytest.mark.parametrize("argv", [[], ["--show-thinking"], ["a", "b"]])
def test_usage(argv):
    assert "usage" in stops(chat.main, argv)


def test_a_checkpoint_that_is_not_there():
    assert "checkpoints/no_such_run" in stops(chat.main, ["checkpoints/no_such_run"])
