"""engine/progress.py: a bar on a terminal, lines in a file, nothing with PROGRESS=false."""
import io
import sys

import pytest

from engine import progress, run


class Terminal(io.StringIO):
    """A stderr that says that it is a terminal. Set in a test, not in a fixture: pytest puts its
    own stderr there between the two."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    """Bars are on before and after each test, whatever it switches."""
    monkeypatch.setattr(progress, "_enabled", True)


@pytest.fixture
def clock(monkeypatch):
    """The time that tqdm sees: a list of one number, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


# ---- the output is a file ------------------------------------------------------------------------

def test_a_short_bar_writes_nothing_to_a_file(capsys):
    with progress.bar(3, "learning", "turn") as bar:
        for _ in range(3):
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_a_line_every_thirty_seconds(capsys, clock):
    """The first no sooner than 30 s after the start, and then 30 s between two."""
    assert progress.EVERY == 30
    with progress.bar(100, "learning", "turn") as bar:
        for second in range(1, 101):
            clock[0] += 1
            bar.update()
            written = capsys.readouterr().err
            assert bool(written) == (second in (30, 60, 90)), second
            if written:
                assert written.startswith("learning") and f"{second}/100" in written
                assert written.count("\n") == 1 and written.endswith("\n")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("leave", [False, True])
def test_lines_have_no_carriage_return(capsys, monkeypatch, leave):
    """Two bars at a time, as in 02: whole lines, and nothing that moves a cursor."""
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.bar(2, "steps", "step", leave=leave) as outer:
        for _ in range(2):
            with progress.bar(3, "sampling", "token") as inner:
                inner.update(3)
            outer.update()
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    assert err.endswith("\n") and "\n\n" not in err
    for line in err.splitlines():
        assert line.startswith(("steps: ", "sampling: ")) and len(line) <= 100
    for words in ("steps:  50%", "1/2", "2/2", "sampling: 100%", "3/3"):
        assert words in err


def test_say_writes_whole_lines_beside_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.bar(2, "steps", "step") as bar:
        for step in (1, 2):
            progress.say(f"step {step:03d}/2 | atk r +0.31")
            bar.update()
    out, err = capsys.readouterr()
    assert out == "step 001/2 | atk r +0.31\nstep 002/2 | atk r +0.31\n"
    assert "atk" not in err


# ---- the output is a terminal --------------------------------------------------------------------

def test_a_terminal_is_drawn_in_place(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(10, "learning", "turn") as bar:
        for _ in range(10):
            clock[0] += 1
            bar.update()
    drawn = sys.stderr.getvalue()
    assert "learning" in drawn and "10/10" in drawn and "turn" in drawn
    assert "\r" in drawn and "\n" not in drawn
    assert drawn.split("\r")[-2].strip() == "", "it is wiped at its end"


def test_a_bar_may_stay_on_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(10, "steps", "step", leave=True) as bar:
        bar.update(10)
    assert sys.stderr.getvalue().endswith("\n") and "10/10" in sys.stderr.getvalue()


# ---- PROGRESS=false ------------------------------------------------------------------------------

def configured(*argv):
    """configure() of a script with the constant PROGRESS."""
    run.configure(dict(__name__="fake", __file__="fake.py", __doc__="", PROGRESS=True), list(argv))


@pytest.mark.parametrize("tty", [False, True])
def test_progress_false_is_silent(capsys, monkeypatch, tty):
    if tty:
        monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "EVERY", 0)
    configured("PROGRESS=false")
    capsys.readouterr()
    with progress.bar(2, "steps", "step", leave=True) as bar:
        bar.total -= 1
        bar.update()
        progress.say("a line")
    assert capsys.readouterr() == ("a line\n", "")
    assert not tty or sys.stderr.getvalue() == ""


def test_a_script_without_the_constant_has_bars(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    configured("PROGRESS=false")
    configured()
    with progress.bar(2, "steps", "step") as bar:
        bar.update()
    assert "steps" in capsys.readouterr().err
