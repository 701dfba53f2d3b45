"""What the programs say on the terminal: plain lines, and one line with exit code 2 for bad input."""

import contextlib
import os
import signal
import sys
import warnings
from pathlib import Path

from tqdm import tqdm


def say(text, stream="stdout"):
    """Print a line to standard output or error, at once; if nobody listens any more, that is no reason to stop."""
    file = getattr(sys, stream)
    if file is None:
        return
    try:
        with tqdm.external_write_mode(file=file):  # a progress bar makes room
            print(text, file=file, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # or Python would fail at its end


def open_terminal():
    """Make sure that standard input, output and error are there, whoever closed them, and can show any character."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free, or the next file of ours would
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may not know a λ


def handle_signals(signums, handler):
    """Install `handler`, but for a SIGHUP that `nohup` has told this process to ignore; {signum: handler before}."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {x: signal.signal(x, handler) for x in signums if not (x == signal.SIGHUP and ignored)}


def option_name(name):
    return f"--{name.replace('_', '-')}"


def reject(message):
    """End the program for bad input: one line on standard error, exit code 2."""
    line = " ".join("".join(x if x.isprintable() else " " for x in message).split())
    say(f"{Path(sys.argv[0]).name}: error: {line}", "stderr")
    raise SystemExit(2)


@contextlib.contextmanager
def reject_errors(option):
    """`reject` with the message of whatever error the block raises; warnings stay off the screen."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        reject(f"{option}: {error}")
