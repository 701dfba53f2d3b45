"""Checkpoints as they are on disk: read back whole and without running code, one process at a time.

`checkpoint.pt` holds a run's state, `checkpoint.prev.pt` the one before, `replay.bin` the rows of a replay memory.
`tracking.Run` writes them.
"""

import contextlib
import errno
import fcntl
import math
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from command_line import reject

FORMAT = 1  # of checkpoints; another one is not read


def load_checkpoint(args, *files):
    """The state that `Run.save_checkpoint` wrote into the folder `args.resume`; None without one.

    `files` are others that the run cannot go on without. Where checkpoint.pt is no whole checkpoint of this run, the
    one before takes its place, and a line on standard error says so. Neither can run code.
    """
    if not args.resume:
        return None
    folder, problems = Path(args.resume), []
    os.close(lock(folder))
    if not any(folder.glob("checkpoint*.pt")):
        reject(f"--resume {folder}: holds no checkpoint; it had no --checkpoint-interval or ended before the first")
    for name in files:
        if not (folder / name).exists():
            reject(f"--resume {folder}: holds no {name}; that is deleted when a run has finished")
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        try:
            with zipfile.ZipFile(folder / name) as archive:
                if damaged := archive.testzip():  # torch.load compares no checksums
                    raise ValueError(f"its {damaged} is damaged")
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
            if state["run"]["identity"] != identity(args):
                raise ValueError(f"it belongs to {state['run']['identity']}")
            for file, size in state["run"]["sizes"].items():
                if (folder / file).stat().st_size < size:
                    raise ValueError(f"{file} has lost rows since")
        except Exception as error:  # a torn or foreign file can raise nearly anything
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EIO, errno.EACCES):
                reject(f"--resume {folder}: {name} cannot be read now ({reason})")  # so it may well be whole
            problems.append(f"{name} cannot be used ({reason})")
            continue
        if problems:
            print(f"--resume: {problems[0]}; going on from {name}", file=sys.stderr)
            with contextlib.suppress(FileNotFoundError):  # or the next one would make it the previous one
                (folder / "checkpoint.pt").replace(folder / "checkpoint.bad.pt")
        torch.set_num_threads(state["run"]["threads"])  # some sums depend on it
        return state
    reject(f"--resume {folder}: {'; '.join(problems)}")


def write_checkpoint(folder, descriptor, checkpoint):
    """Write `checkpoint`, whole or not at all, and keep the one before; `descriptor` is what `lock(folder)` gave.

    Raises:
        OSError, RuntimeError: it cannot be written. The ones that were there still are.
    """
    path, previous, new = (folder / f"checkpoint{suffix}.pt" for suffix in ("", ".prev", ".new"))
    try:
        with open(new, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)  # a torn one would only take room
        raise
    if path.exists():
        previous.unlink(missing_ok=True)
        try:
            previous.hardlink_to(path)
        except OSError:  # a file system without links
            path.replace(previous)
    new.replace(path)
    os.fsync(descriptor)


def lock(folder):
    """Reserve `folder` for this process, or `reject`; closing the file descriptor that this returns lets it go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        reject(f"--resume {folder}: a process is still writing there")
    except OSError:
        pass  # a file system without locks
    return descriptor


def identity(args):
    """What a checkpoint and a run must have in common, as text."""
    return f"{args.env_id}, {args.exp_name}, seed {args.seed}, checkpoint format {FORMAT}"


def to_plain(x):
    """`x` with tensors for its NumPy arrays and Python's numbers for NumPy's: what `weights_only=True` lets in."""
    if isinstance(x, dict):
        return {key: to_plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [to_plain(value) for value in x]
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    return x.item() if isinstance(x, np.generic) else x


class Journal:
    """The newest rows of a replay memory, written through to a file from which a resumed run reads them back.

    So a checkpoint need not copy them. The file has room for more rows than the memory, so that those that belong to a
    checkpoint are still there when newer ones have been written after it.

    Args:
        path: of the file.
        dtype: of a row, a NumPy type.
        rings: rings in the memory.
        capacity: rows of a ring that the memory holds.
        spare: rows that a ring may get between a checkpoint and the one after the next.
    """

    def __init__(self, path, dtype, rings, capacity, spare):
        self.dtype, self.capacity, self.length = np.dtype(dtype), capacity, capacity + spare
        self.path, self.shape = path, (self.length, rings)  # rows stay where they are when there get to be more
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def write(self, ring, index, row):
        """Write `row`, the `index`-th that its ring gets.

        Raises:
            OSError: it cannot be written.
        """
        place = index % self.length * self.shape[1] + ring
        if os.pwrite(self.file, row.tobytes(), place * self.dtype.itemsize) < self.dtype.itemsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, ring, count):
        """The newest rows, at most `capacity`, of a ring that has got `count`: pairs of an index and rows."""
        os.truncate(self.path, max(os.fstat(self.file).st_size, math.prod(self.shape) * self.dtype.itemsize))
        rows = np.memmap(self.path, self.dtype, "r", shape=self.shape)
        for index in range(max(count - self.capacity, 0), count, 1000):  # so many that they fit into memory twice
            yield index, rows[np.arange(index, min(index + 1000, count)) % self.length, ring]

    def close(self, keep):
        os.close(self.file)
        if not keep:
            Path(self.path).unlink(missing_ok=True)
