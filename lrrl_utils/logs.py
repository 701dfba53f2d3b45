"""What a run writes down as it goes: CSV files, JSON files, TensorBoard, W&B. Nothing here can end the training.

CSV rows are on disk at once. Where a file cannot be written, there is one warning, and the run goes on.
"""

import contextlib
import csv
import io
import math
import os
import secrets
import tempfile
import threading
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from lrrl_utils.files import open_regular, write_json, written_whole
from lrrl_utils.measures import entropy, shown_rate
from lrrl_utils.terminal import say

CLOSING_SECONDS = 10  # that TensorBoard gets to write its last events


class Logs:
    """The files of a run folder, TensorBoard's and W&B's among them.

    Args:
        folder: the run folder.
        arms: {bandit: its learning rates}; empty without a bandit.
    """

    def __init__(self, folder, arms):
        self.folder, self.arms = folder, arms
        self.controllers = tuple(arms) if len(arms) > 1 else ()
        self.problems = {}  # files that could not be written: why
        self.tables = {}  # file descriptors of the CSV files
        self.pending = {}  # bytes of rows that have found no room on the disk so far
        self.writer = self.wandb = self.wandb_id = None
        self.episodes = []  # (global step, return)
        self.rounds = dict.fromkeys(arms or [""], 0)
        self.pulls = {name: [0] * len(rates) for name, rates in arms.items()}
        self.recent_arms = {name: deque(maxlen=20) for name in arms}
        self.rollbacks = 0

    @property
    def most_arms(self):
        return max(map(len, self.arms.values()), default=0)

    @contextlib.contextmanager
    def may_fail(self, name):
        """Around the writing of the file `name`: where the disk fails there is one warning, and training goes on."""
        try:
            yield
        except OSError as error:
            self.note_problem(name, error)

    def note_problem(self, name, error):
        if name not in self.problems:
            self.problems[name] = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
            say(f"{self.folder}: {name} cannot be written: {self.problems[name]}", "stderr")

    def note_failure_of_thread(self, failure):
        """Stands in for `threading.excepthook`: the threads of an environment are not TensorBoard's."""
        if type(failure.thread).__module__.startswith("tensorboard"):
            self.note_problem("TensorBoard's events", failure.exc_value)
        else:
            threading.__excepthook__(failure)

    def write_json(self, name, content):
        with self.may_fail(name):
            write_json(self.folder / name, content)
            self.problems.pop(name, None)

    def open_tables(self, sizes=None):
        """Open the CSV files; those that are there are cut to `sizes`, {name: bytes}."""
        round_columns = ["round", "global_step", "arm", "learning_rate", "performance", "feedback"]
        round_columns[2:2] = ["controller"] if self.controllers else []
        columns = {
            "rounds.csv": round_columns + [f"p_{arm}" for arm in range(self.most_arms)],
            "episodes.csv": ["global_step", "episodic_return", "episodic_length"],
        }
        for name, header in columns.items():
            descriptor = open_regular(self.folder / name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            if sizes:
                os.truncate(descriptor, sizes[name])
            self.tables[name] = descriptor
            self.pending.setdefault(name, b"")
            if not sizes:
                self.write_row(name, header)

    def open_tensorboard(self, config, purge_step=None):
        with self.may_fail("TensorBoard's events"):
            self.writer = SummaryWriter(self.folder, purge_step=purge_step)
            if purge_step is None:
                table = "".join(f"|{name}|{value}|\n" for name, value in config.items())
                self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    def open_wandb(self, args, config, code):
        """Track with W&B, offline if it cannot be reached; `code` are the files to keep there."""
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": self.folder.name}
        self.wandb_id = self.wandb_id or secrets.token_hex(4)
        names |= {"id": self.wandb_id, "resume": "allow", "config": config, "dir": self.folder, "save_code": True}
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")  # seconds; if it has gone away, W&B waits for ever
        try:
            self.wandb = wandb.init(**names)
        except Exception as error:  # of many kinds
            say(f"W&B: {error}; tracking offline, see {self.folder / 'wandb'}", "stderr")
            wandb.teardown()  # or the id would still be in use
            os.environ.pop("WANDB_SERVICE", None)  # nor that of a parent process, such as a sweep's
            os.environ["WANDB_MODE"] = "offline"
            self.wandb = wandb.init(**names, mode="offline")
        self.wandb.define_metric("*", step_metric="global_step")
        kept = {str(file.resolve()) for file in code}
        with self.wandb_may_fail():
            self.wandb.log_code(code[0].parent, include_fn=lambda path: str(path) in kept)

    @contextlib.contextmanager
    def wandb_may_fail(self):
        try:
            yield
        except Exception as error:  # of many kinds
            self.note_problem("W&B's log", error)

    def write_row(self, name, row):
        """Append a row to a CSV file, and those before it that a full disk had no room for."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        self.pending[name] += text.getvalue().encode()
        self.write_pending(name)

    def write_pending(self, name):
        with self.may_fail(name):
            while self.pending[name]:
                written = os.write(self.tables[name], self.pending[name])
                self.pending[name] = self.pending[name][written:]
            self.problems.pop(name, None)

    def log_scalars(self, scalars, global_step):
        """Send {name: float} to TensorBoard and, with --track, to W&B."""
        if self.writer and "TensorBoard's events" not in self.problems:
            with self.may_fail("TensorBoard's events"):
                for name, value in scalars.items():
                    self.writer.add_scalar(name, value, global_step)
        if self.wandb:
            with self.wandb_may_fail():
                self.wandb.log(scalars | {"global_step": global_step})

    def flush(self):
        if self.writer and "TensorBoard's events" not in self.problems:
            with self.may_fail("TensorBoard's events"):
                self.writer.flush()

    def log_episode(self, global_step, episodic_return, episodic_length):
        """Log an episode that has ended: raw return, length in timesteps.

        Raises:
            FloatingPointError: the return is not finite.
        """
        if not math.isfinite(episodic_return):
            raise FloatingPointError(f"the return of an episode is {episodic_return}")
        self.episodes.append((global_step, episodic_return))
        self.write_row("episodes.csv", (global_step, episodic_return, episodic_length))
        lengths = {"charts/episodic_length": episodic_length}
        self.log_scalars({"charts/episodic_return": episodic_return} | lengths, global_step)

    def log_rounds(self, global_step, rounds, learning_rate, rolled_back=None):
        """Log `rounds`, `ClosedRound`s that have closed together; without a bandit, `learning_rate` was theirs.

        `rolled_back` is the reason where they were undone.
        """
        for closed in rounds:
            name = closed.bandit or ""
            self.rounds[name] += 1
            rate = shown_rate(learning_rate if closed.arm is None else closed.learning_rate)
            row = [self.rounds[name], global_step, closed.arm, rate, closed.performance, closed.feedback]
            row[2:2] = [name] if self.controllers else []
            padding = [None] * (self.most_arms - len(closed.probabilities))
            self.write_row("rounds.csv", [*row, *map(float, closed.probabilities), *padding])
            scalars = {"lrrl/performance": closed.performance}
            if closed.arm is not None:
                scalars |= self.pull_scalars(closed)
            if rolled_back and closed is rounds[0]:  # two bandits make one rollback
                self.rollbacks += 1
                scalars |= {"lrrl/rollbacks": self.rollbacks}
            suffix = f"/{name}" if self.controllers else ""
            self.log_scalars({key + suffix: x for key, x in scalars.items() if x is not None}, global_step)
        if rolled_back:
            names = [f"{closed.bandit} " if self.controllers else "" for closed in rounds]
            rates = ", ".join(f"{name}{shown_rate(closed.learning_rate):g}" for name, closed in zip(names, rounds))
            say(f"step {global_step}: learning rate {rates} is rolled back: {rolled_back}", "stderr")
        self.flush()

    def pull_scalars(self, closed):
        recent_arms, rates = self.recent_arms[closed.bandit], self.arms[closed.bandit]
        recent_arms.append(closed.arm)
        self.pulls[closed.bandit][closed.arm] += 1
        scalars = {"lrrl/arm": closed.arm, "lrrl/feedback": closed.feedback}
        scalars |= {"lrrl/entropy": entropy(closed.probabilities)}
        scalars |= {"lrrl/pull_entropy": entropy(np.bincount(recent_arms) / len(recent_arms))}
        return scalars | {f"lrrl/probability/{rate:g}": p for rate, p in zip(rates, closed.probabilities)}

    def save_model(self, model):
        """Write `model.pt`, a dict that `torch.load(…, weights_only=True)` reads; elsewhere if there is no room."""
        data = io.BytesIO()
        torch.save(model, data)
        for folder in (self.folder, Path(tempfile.gettempdir())):
            name = "model.pt" if folder == self.folder else f"{self.folder.name}-model.pt"
            with self.may_fail(name), written_whole(folder / name) as file:
                file.write(data.getbuffer())
            if name not in self.problems:
                if folder != self.folder:
                    self.problems["model.pt"] += f"; it is {folder / name}"
                return

    def state_dict(self):
        recent_arms = {controller: list(arms) for controller, arms in self.recent_arms.items()}
        pulls = {controller: list(counts) for controller, counts in self.pulls.items()}
        state = {"rounds": dict(self.rounds), "pulls": pulls, "recent_arms": recent_arms, "rollbacks": self.rollbacks}
        state |= {"wandb_id": self.wandb_id, "pending": {name: rows.decode() for name, rows in self.pending.items()}}
        return state | {"sizes": {name: os.fstat(descriptor).st_size for name, descriptor in self.tables.items()}}

    def load_state_dict(self, state):
        for name in ("rounds", "pulls", "rollbacks", "wandb_id"):
            setattr(self, name, state[name])
        self.pending = {name: rows.encode() for name, rows in state["pending"].items()}
        for controller, arms in state["recent_arms"].items():
            self.recent_arms[controller].extend(arms)

    def close(self):
        """Close all files. What hangs is left behind after some seconds."""
        for name, descriptor in self.tables.items():
            self.write_pending(name)
            os.close(descriptor)
        if self.writer:
            closing = threading.Thread(target=self._close_tensorboard, daemon=True)
            closing.start()
            closing.join(CLOSING_SECONDS)
            if closing.is_alive():
                self.note_problem("TensorBoard's events", TimeoutError("its writer hangs"))

    def _close_tensorboard(self):
        with self.may_fail("TensorBoard's events"):
            self.writer.close()
