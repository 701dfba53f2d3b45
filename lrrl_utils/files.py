"""Files of a run folder: written whole or not at all, read only if they are regular files, one writer at a time.

A run folder is data and may come from anyone: no link in it is followed, no pipe waited for, nothing huge read.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
from pathlib import Path


def open_regular(path, flags=os.O_RDONLY):
    """`os.open` of a regular file. Raises OSError for anything else, symbolic links included."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def read_json(path, limit=2**20):
    """The dict in a JSON file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read. ValueError: it holds something else.
    """
    with open(open_regular(path), encoding="utf-8") as file:
        text = file.read(limit + 1)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if len(text) > limit or not isinstance(content, dict):
        raise ValueError("it is no such file of a run")
    return content


@contextlib.contextmanager
def written_whole(path):
    """A binary file that takes the place of `path` when the block ends, on the disk by then; if it fails, nothing does.

    Raises:
        OSError: it cannot be written. What was there still is.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # a kill has left it, or somebody a link
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()  # a torn one would only take room
        raise


def write_json(path, content):
    """Write `content` with `written_whole`. Raises OSError."""
    with written_whole(path) as file:
        file.write(json.dumps(content, indent=2, default=str).encode() + b"\n")


def lock(folder):
    """Reserve `folder` for this process until the file descriptor that this returns is closed.

    Raises:
        BlockingIOError: another process has it. OSError: it is no folder that can be read.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # a file system without locks
    return descriptor
