"""What a run writes down as it goes: CSV files, JSON files, TensorBoard, W&B. Nothing here can end the training.

CSV rows are on disk at once. Where a file cannot be written, there is one warning, and the run goes on.
"""

import contextlib
import csv
import io
import math
import os
import secrets
import threading
from collections import deque

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from lrrl_utils.files import open_regular, write_json
from lrrl_utils.terminal import say

CLOSING_SECONDS = 10  # that TensorBoard gets to write its last events


def entropy(probabilities):
    """Entropy in nats: 0 for a certainty, log K for K equal probabilities."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def final_return(episodes, global_step):
    """Mean return of the episodes that ended in the last 10 % of timesteps, at least of the last 10; None without any.

    `episodes` holds (global step, return) pairs in the order in which they ended.
    """
    late = sum(step > 0.9 * global_step for step, _ in episodes)
    returns = [episodic_return for _, episodic_return in episodes[-max(late, 10) :]]
    return float(np.mean(returns)) if returns else None


def area_under_curve(episodes, global_step):
    """Mean of the episodic return over the timesteps up to `global_step`; None without an episode.

    A return holds from its episode's end until the next end (episodes that end together count by their mean); the time
    before the first end counts for nothing. A mean over episodes, in contrast, would favour short ones.
    """
    if not episodes:
        return None
    steps, returns = np.array(episodes, dtype=np.float64).T
    ends, which, counts = np.unique(steps, return_inverse=True, return_counts=True)
    durations = np.diff(ends, append=global_step)
    return float(np.average(np.bincount(which, returns) / counts, weights=durations if durations.any() else None))


def read_csv(path):
    """A CSV file as {column: (rows,) array} of floats, NaN where a field is empty; "controller" is one of strings."""
    with open(open_regular(path), newline="") as file:
        names, *rows = csv.reader(file)
    columns = zip(names, zip(*rows) if rows else [()] * len(names))
    return {n: np.array(fields if n == "controller" else [float(x or "nan") for x in fields]) for n, fields in columns}


def shown_rate(learning_rate):
    """A learning rate with the digits that a float32 has."""
    return float(f"{np.float32(float(learning_rate)):.7g}")


class Logs:
    """The files of a run folder, TensorBoard's and W&B's among them.

    Args:
        folder: the run folder.
        arms: the bandits' learning rates; none without a bandit.
        controllers: names of the bandits, where there is more than one.
    """

    def __init__(self, folder, arms=(), controllers=()):
        self.folder, self.arms, self.controllers = folder, arms, controllers
        self.problems = {}  # files that could not be written: why
        self.tables = {}  # file descriptors of the CSV files
        self.pending = {}  # bytes of rows that have found no room on the disk so far
        self.writer = self.wandb = self.wandb_id = None
        self.episodes = []  # (global step, return)
        self.rounds = dict.fromkeys(controllers or [""], 0)
        self.pulls = {controller: [0] * len(arms) for controller in self.rounds}
        self.recent_arms = {controller: deque(maxlen=20) for controller in self.rounds}
        self.rollbacks = 0

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

    def write_json(self, name, content):
        with self.may_fail(name):
            write_json(self.folder / name, content)

    def open_tables(self, sizes=None):
        """Open the CSV files; those that are there are cut to `sizes`, {name: bytes}."""
        round_columns = ["round", "global_step", "arm", "learning_rate", "performance", "feedback"]
        round_columns[2:2] = ["controller"] if self.controllers else []
        columns = {
            "rounds.csv": round_columns + [f"p_{arm}" for arm in range(len(self.arms))],
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
        """Log an episode that has ended: raw return, length in timesteps."""
        self.episodes.append((global_step, episodic_return))
        self.write_row("episodes.csv", (global_step, episodic_return, episodic_length))
        lengths = {"charts/episodic_length": episodic_length}
        self.log_scalars({"charts/episodic_return": episodic_return} | lengths, global_step)

    def log_rounds(self, global_step, rounds, learning_rate, rolled_back=None):
        """Log `rounds`, `ClosedRound`s that have closed together; without a bandit, `learning_rate` was theirs.

        `rolled_back` is the reason where they were undone.
        """
        for closed in rounds:
            controller = closed.bandit if self.controllers else ""
            self.rounds[controller] += 1
            rate = shown_rate(learning_rate if closed.arm is None else closed.learning_rate)
            row = [self.rounds[controller], global_step, closed.arm, rate, closed.performance, closed.feedback]
            row[2:2] = [controller] if self.controllers else []
            self.write_row("rounds.csv", row + [float(p) for p in closed.probabilities])
            scalars = {"lrrl/performance": closed.performance}
            if closed.arm is not None:
                scalars |= self.pull_scalars(controller, closed)
            if rolled_back:
                say(f"step {global_step}: learning rate {rate:g} is rolled back: {rolled_back}", "stderr")
                self.rollbacks += 1
                scalars |= {"lrrl/rollbacks": self.rollbacks}
                rolled_back = None  # two bandits make one rollback
            suffix = f"/{controller}" if controller else ""
            self.log_scalars({name + suffix: x for name, x in scalars.items() if x is not None}, global_step)
        self.flush()

    def pull_scalars(self, controller, closed):
        recent_arms = self.recent_arms[controller]
        recent_arms.append(closed.arm)
        self.pulls[controller][closed.arm] += 1
        scalars = {"lrrl/arm": closed.arm, "lrrl/feedback": closed.feedback}
        scalars |= {"lrrl/entropy": entropy(closed.probabilities)}
        scalars |= {"lrrl/pull_entropy": entropy(np.bincount(recent_arms) / len(recent_arms))}
        return scalars | {f"lrrl/probability/{rate:g}": p for rate, p in zip(self.arms, closed.probabilities)}

    def state_dict(self):
        recent_arms = {controller: list(arms) for controller, arms in self.recent_arms.items()}
        pulls = {controller: list(counts) for controller, counts in self.pulls.items()}
        state = {"rounds": dict(self.rounds), "pulls": pulls, "recent_arms": recent_arms, "rollbacks": self.rollbacks}
        state |= {"wandb_id": self.wandb_id, "pending": dict(self.pending)}
        return state | {"sizes": {name: os.fstat(descriptor).st_size for name, descriptor in self.tables.items()}}

    def load_state_dict(self, state):
        for name in ("rounds", "pulls", "rollbacks", "wandb_id", "pending"):
            setattr(self, name, state[name])
        for controller, arms in state["recent_arms"].items():
            self.recent_arms[controller].extend(arms)

    def close(self):
        """Close all files. What hangs is left behind after some seconds."""
        for descriptor in self.tables.values():
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
