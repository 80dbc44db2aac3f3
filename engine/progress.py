"""Progress bars by tqdm. On a terminal a bar is redrawn in place. In a file it is a plain line
every 30 seconds, without carriage returns. PROGRESS=false switches bars off."""
import sys

import tqdm

EVERY = 30  # seconds between two lines of a bar where the output is a file
_enabled = True


def enable(on):
    """Switch bars on or off; engine.run.configure does it by the stage's PROGRESS."""
    global _enabled
    _enabled = on


class _Lines:
    """A file for tqdm: what a bar would draw in place becomes a line of its own."""

    def write(self, text):
        text = text.replace("\x1b[A", "").strip()  # tqdm moves the cursor up past other bars
        if text:
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


def bar(total, what, unit, leave=False):
    """A tqdm bar over `total` units, for `with`; .update(n) moves it; leave: it stays when done."""
    if sys.stderr.isatty():
        look = dict(leave=leave, dynamic_ncols=True, mininterval=0.5)
    else:
        look = dict(leave=False, file=_Lines(), ncols=100, ascii=True, mininterval=EVERY,
                    miniters=1, delay=EVERY)
    return tqdm.tqdm(total=total, desc=what, unit=unit, disable=not _enabled, **look)


def say(text):
    """Print a line to stdout without breaking a bar."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
