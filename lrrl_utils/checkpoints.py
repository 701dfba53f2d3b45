"""Checkpoints as they are on disk: read back whole and without running code, one process at a time.

`checkpoint.pt` holds a run's state, `checkpoint.prev.pt` the one before, `replay.bin` the rows of a replay memory.
"""

import contextlib
import errno
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from lrrl_utils.command_line import MAY_CHANGE
from lrrl_utils.files import lock, open_regular, written_whole
from lrrl_utils.journal import Journal
from lrrl_utils.state import capture, check_in_place, restore
from lrrl_utils.terminal import reject, say

FORMAT = 2  # of checkpoints; another one is not read


def load_checkpoint(args):
    """The checkpoint of the run folder `args.resume`, which is reserved from now on; None without one.

    Where checkpoint.pt is no whole checkpoint of this run, the one before takes its place, and a line on standard error
    says so. Neither can run code. `checkpoint["lock"]` is what `files.lock` gave.
    """
    if not args.resume:
        return None
    folder = Path(args.resume)
    try:
        descriptor = lock(folder)
    except BlockingIOError:
        reject(f"--resume {folder}: a process is still writing there")
    except OSError as error:
        reject(f"--resume {folder}: cannot be read ({error.strerror})")
    try:
        return read_latest(folder, identity(args)) | {"lock": descriptor}
    except BaseException:
        os.close(descriptor)
        raise


def read_latest(folder, expected):
    """The newest checkpoint in `folder` that is whole and of the run `expected`, or `reject` the folder."""
    if not any(folder.glob("checkpoint*.pt")):
        reject(f"--resume {folder}: holds no checkpoint; it had no --checkpoint-interval or ended before the first")
    if not os.access(folder, os.W_OK):
        reject(f"--resume {folder}: cannot be written")
    for name in ("videos", "wandb"):
        if (folder / name).is_symlink():  # what would be written there might overwrite files of its target
            reject(f"--resume {folder}: {name} is a link, it must be a folder")
    problems = []
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        try:
            state = read_checkpoint(folder, name, expected)
        except Exception as error:  # a torn or foreign file can raise nearly anything
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0].split(". ")[0]
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EIO, errno.EACCES):
                reject(f"--resume {folder}: {name} cannot be read now ({reason})")  # so it may well be whole
            problems.append(f"{name} cannot be used ({reason or type(error).__name__})")
            continue
        if problems:
            say(f"--resume: {problems[0]}; going on from {name}", "stderr")
            with contextlib.suppress(OSError):  # or the next one would make it the previous one
                (folder / "checkpoint.pt").replace(folder / "checkpoint.bad.pt")
        torch.set_num_threads(state["run"]["threads"])  # some sums depend on it
        return state
    reject(f"--resume {folder}: {'; '.join(problems)}")


def read_checkpoint(folder, name, expected):
    """What `write_checkpoint` wrote, if it is whole, of the run `expected`, and its files have not shrunk since.

    Raises:
        Exception: of nearly any kind, if it is not.
    """
    with open(open_regular(folder / name), "rb") as file:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > os.fstat(file.fileno()).st_size:  # torch packs nothing
                raise ValueError("it would grow when it is unpacked")
            if damaged := archive.testzip():  # torch.load compares no checksums
                raise ValueError(f"its {damaged} is damaged")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    found = state["run"].get("identity")
    if not isinstance(found, dict):
        raise ValueError("it belongs to another version of this program")
    if found["format"] != FORMAT:
        raise ValueError(f"it has format {found['format']}, this version reads format {FORMAT}")
    for option in sorted(found.keys() | expected.keys()):
        if found.get(option) != expected.get(option):
            raise ValueError(f"it belongs to a run with {option} {found.get(option)}, not {expected.get(option)}")
    for file, size in state["run"]["sizes"].items():
        try:
            with open(open_regular(folder / file)) as opened:
                found = os.fstat(opened.fileno()).st_size
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from error
        if found < size:
            raise ValueError(f"{file} has lost rows since")
    return state


def write_checkpoint(folder, descriptor, checkpoint):
    """Write `checkpoint`, whole or not at all, and keep the one before; `descriptor` is what `files.lock` gave.

    Raises:
        OSError: it cannot be written. The ones that were there still are.
    """
    path, previous = folder / "checkpoint.pt", folder / "checkpoint.prev.pt"
    with written_whole(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's own, raised while it handles that of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())  # a full disk may only show here
        if path.exists():
            previous.unlink(missing_ok=True)
            try:
                previous.hardlink_to(path)
            except OSError:  # a file system without links
                path.replace(previous)
    os.fsync(descriptor)


def identity(args):
    """All that a checkpoint and a run must have in common, as plain values: the options that no run may change."""
    options = {name: x for name, x in vars(args).items() if name not in (*MAY_CHANGE, "command_line")}
    options |= {"total_timesteps": None, "format": FORMAT}  # which may grow
    return json.loads(json.dumps(options, default=str))


class Checkpoints:
    """The checkpoints of a run, and the journal of its replay memory.

    Args:
        args: the script's arguments.
        state: {name: object} of all that the rest of the run depends on, between two steps.
        logs: the run's `Logs`, part of every checkpoint.
        descriptor: what `files.lock` gave for the run folder.
        replay: a replay memory or None; see `Run`.
    """

    def __init__(self, args, state, logs, descriptor, replay=None):
        for name, x in state.items():
            check_in_place(f"state[{name!r}]", x)
        self.state, self.logs, self.lock, self.replay = state, logs, descriptor, replay
        self.interval, self.folder, self.last_step = args.checkpoint_interval, logs.folder, 0
        self.identity = identity(args)
        self.journal = None
        if replay and self.interval:
            interval = min(self.interval, args.total_timesteps)  # a huge one means: only when stopped
            spare = 4 * (interval // replay.rings + replay.rings)
            path = self.folder / "replay.bin"
            try:
                self.journal = Journal(path, replay.dtype, replay.rings, replay.capacity, spare)
            except OSError as error:
                reject(f"{path}: {error.strerror}")
            replay.journal = self.write_journal

    def write_journal(self, ring, index, row):
        if "checkpoint.pt" not in self.logs.problems:
            with self.logs.may_fail("checkpoint.pt"):
                self.journal.write(ring, index, row)

    def restore(self, checkpoint):
        """Bring back the state of the run, of its logs and of the replay, or `reject` the folder."""
        own = checkpoint["run"]
        try:
            if type(own["global_step"]) is not int:
                raise ValueError("its timestep is no number")
            self.last_step = own["global_step"]
            self.logs.load_state_dict(own["logs"])
            self.logs.episodes = [tuple(episode) for episode in own["episodes"]]
            if changed := self.state.keys() ^ checkpoint["state"].keys():
                raise ValueError(f"its state is of another script: {', '.join(sorted(changed))}")
            restore(self.state, checkpoint["state"])
            if self.journal:
                self.journal.load_state_dict(own["journal"])
                for ring, count in enumerate(own["rows"]):
                    for index, rows in self.journal.read(ring, count):
                        self.replay.write(ring, index + np.arange(len(rows)), rows)
        except Exception as error:  # a forged file can raise nearly anything
            problem = f"{type(error).__name__}: {error}".split("\n")[0]
            reject(f"--resume {self.folder}: replay.bin or checkpoint.pt cannot be used ({problem})")

    def own_state(self, global_step):
        """What goes into a checkpoint beside the script's state."""
        own = {"global_step": global_step, "identity": self.identity, "threads": torch.get_num_threads()}
        own |= {"logs": self.logs.state_dict(), "episodes": len(self.logs.episodes)}  # which only get more
        own["sizes"] = dict(own["logs"].pop("sizes"))
        if self.journal:
            own |= {"journal": self.journal.state_dict(), "rows": self.replay.count.tolist()}
            own["sizes"]["replay.bin"] = os.fstat(self.journal.file).st_size
        return own

    def is_due(self, global_step):
        return self.interval and global_step // self.interval > self.last_step // self.interval

    def save(self, global_step):
        """Write a checkpoint, if there are any. If that fails there is a warning, and no further one."""
        if self.interval:
            self.write(capture(self.state, copy=False), self.own_state(global_step))

    def write(self, state, own):
        self.last_step = own["global_step"]
        if "checkpoint.pt" in self.logs.problems:
            return
        with self.logs.may_fail("checkpoint.pt"):
            for descriptor in (*self.logs.tables.values(), *([self.journal.file] if self.journal else [])):
                os.fsync(descriptor)  # what a checkpoint relies on must outlast a power cut, too
            own = own | {"episodes": self.logs.episodes[: own["episodes"]]}
            write_checkpoint(self.folder, self.lock, {"state": state, "run": own})

    @contextlib.contextmanager
    def saved_if_it_fails(self, global_step, names):
        """If the block raises or is stopped, write a checkpoint of how things were before it.

        `names` are those of the state that the block changes, as long as it does not end; all of it without any.
        """
        if not self.interval:
            yield
            return
        before = {name: capture(self.state[name]) for name in names or self.state}
        own = None if names else self.own_state(global_step)
        try:
            yield
        except FloatingPointError:  # the learning rate's fault: it would happen again
            raise
        except (Exception, SystemExit):
            own = own or self.own_state(global_step)  # so small a block has logged nothing that it would log again
            self.write(capture({**self.state, **dict.fromkeys(before)}) | before, own)
            raise

    def close(self, keep):
        """Close the journal; it is only kept where the run may go on."""
        if self.journal:
            self.journal.close(keep)
