"""What surrounds a training loop and is no algorithm: run folder, logs, W&B, progress, figure, checkpoints, signals.

    with Run(args, arms, device) as run:       # makes the run folder
        run.log_episode(...); run.log_round(...); run.log_scalars(...); run.progress(...)
        if run.wants_checkpoint(global_step):  # between two steps of the loop
            run.save_checkpoint(run.snapshot(global_step, state))  # a dict of plain values and tensors

CSV rows are on disk at once, `summary.json` every few seconds. However a run ends, short of a kill, `summary.json` and
`curves.png` are brought up to date, and the exit code tells: 0 finished, 130 Ctrl-C, 143 SIGTERM, 3 diverged (a
FloatingPointError), 1 any other error. In a run that is resumed, the rows that came after the checkpoint are cut off.
"""

import contextlib
import csv
import itertools
import json
import math
import os
import platform
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoints import Journal, identity, lock, to_plain, write_checkpoint
from command_line import reject

PROGRESS_SECONDS = 5  # between updates of summary.json, and between progress lines where there is no terminal
PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "mujoco", "tyro", "wandb", "tensorboard")


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


def git_commit():
    """The commit of this code, with "-dirty" behind it if it has been changed since; None where git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):  # there is no git
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip() or None


def read_csv(path):
    """A CSV file as {column: (rows,) array} of floats, NaN where a field is empty; "controller" is one of strings."""
    with open(path) as file:
        names, *rows = csv.reader(file)
    columns = zip(names, zip(*rows) if rows else [()] * len(names))
    return {n: np.array(fields if n == "controller" else [float(x or "nan") for x in fields]) for n, fields in columns}


def plot_curves(folder):
    """Draw a run folder's `curves.png` from its CSV files: returns, learning rates and the arms' probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = json.loads((folder / "config.json").read_text())
    episodes, rounds = read_csv(folder / "episodes.csv"), read_csv(folder / "rounds.csv")
    controllers = rounds.get("controller", np.full(len(rounds["round"]), ""))
    names = list(dict.fromkeys(controllers)) or [""]
    probabilities = [name for name in rounds if name.startswith("p_")]
    panels = 2 + len(names) * bool(probabilities)
    figure, axes = plt.subplots(panels, 1, figsize=(8, 2.6 * panels), sharex=True, layout="constrained")
    figure.suptitle(f"{config['env_id']}, {config['exp_name']}, seed {config['seed']}")

    steps, returns = episodes["global_step"], episodes["episodic_return"]
    axes[0].plot(steps, returns, ".", color="C0", alpha=0.3, markersize=4, label="episode")
    width = min(len(returns), max(10, len(returns) // 20))
    if width:
        smooth = np.convolve(returns, np.ones(width) / width, mode="valid")
        axes[0].plot(steps[width - 1 :], smooth, color="C0", label=f"mean of the last {width}")
        axes[0].legend(loc="best", fontsize="small")
    axes[0].set_ylabel("episodic return")

    rates = np.array(config["learning_rates"] if probabilities else rounds["learning_rate"])
    axes[1].set(ylabel="learning rate", yscale="log")
    if rates.size:
        axes[1].set_ylim(rates.min() / 2, rates.max() * 2)
    colors = dict(zip(np.sort(rates), plt.cm.viridis(np.linspace(0, 1, len(rates)))))
    for i, name in enumerate(names):
        of_this, color = controllers == name, "black" if len(names) == 1 else f"C{i}"
        steps = rounds["global_step"][of_this]
        axes[1].plot(steps, rounds["learning_rate"][of_this], ".", color=color, markersize=3, label=name)
        if probabilities:
            axis = axes[2 + i]
            axis.set_ylabel(f"probability {name}".strip())
            lines = sorted(zip(rates, probabilities), reverse=True)
            if len(rates) > 10:  # of so many lines, none could be told from another
                image = np.array([rounds[column][of_this] for _, column in lines])
                if len(steps):
                    colored = axis.pcolormesh(steps, [rate for rate, _ in lines], image, vmin=0, rasterized=True)
                    figure.colorbar(colored, ax=axis)
                axis.set(yscale="log", ylabel="learning rate: " + axis.get_ylabel())
                continue
            for rate, column in lines:
                axis.plot(steps, rounds[column][of_this], color=colors[rate], label=f"{rate:g}")
            axis.axhline(1 / len(rates), color="grey", linestyle=":", linewidth=1, label="uniform")
            axis.set_ylim(0, 1)
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", title="learning rate")
    if len(names) > 1:
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes[-1].set_xlabel("timesteps")
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


class Run:
    """One training run: its folder, its logs, its end. A context manager around the training loop.

    Args:
        args: the script's arguments.
        arms: the bandit's learning rates, None without a bandit.
        device: where the networks are, for config.json.
        controllers: names of the bandits, where there is more than one.
        checkpoint: what `load_checkpoint` has returned.
        **derived: what else the script derived from the arguments, for config.json.
    """

    def __init__(self, args, arms, device, controllers=(), checkpoint=None, **derived):
        self.args, self.arms, self.device, self.derived = args, arms, device, derived
        self.controllers = controllers if len(controllers) > 1 else ()
        self.global_step = 0
        self.episodes = []  # (global step, return)
        self.rounds = dict.fromkeys(self.controllers or [None], 0)
        self.pulls = {controller: [0] * len(arms or ()) for controller in self.rounds}
        self.recent_arms = {controller: deque(maxlen=20) for controller in self.rounds}
        self.summary = {"rollbacks": 0 if arms else None}  # what is added to summary.json
        self.clock, self.now, self.next_update = None, None, 0.0
        self.bar = self.wandb = self.writer = None
        self.on_exit = contextlib.ExitStack()  # for what a script must close, however the run ends
        self.signal = None  # one that has asked the run to stop after a checkpoint
        self.problems = {}  # files that could not be written: why
        self.journal = None
        self.tables = {}  # of the CSV files: file, writer
        self.wandb_id = None
        self.resumed = (checkpoint or {}).get("run")
        if self.resumed:
            self._restore()
        self.last_checkpoint = self.global_step
        self.folder = Path(args.resume) if args.resume else self._make_folder()
        self.lock = lock(self.folder)

    def _make_folder(self):
        name = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}".replace("/", "-")
        try:
            Path(self.args.run_dir).mkdir(parents=True, exist_ok=True)
            for moment in itertools.count(int(time.time())):  # a later second if another run has taken this one
                folder = Path(self.args.run_dir, f"{name}__{moment}")
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    return folder
        except OSError as error:
            reject(f"--run-dir {self.args.run_dir}: must be a folder that can be written ({error.strerror})")

    def _state(self):
        """What goes into a checkpoint of this."""
        with self._may_fail("checkpoint.pt"):
            for file, _ in self.tables.values():
                file.flush()  # or a row that met a full disk would be counted by half
        files = {name: file.fileno() for name, (file, _) in self.tables.items()}
        files |= {"replay.bin": self.journal.file} if self.journal else {}
        state = {name: getattr(self, name) for name in ("pulls", "summary", "rounds", "wandb_id")} | {
            "episodes": len(self.episodes),  # which only get more: `save_checkpoint` copies them
            "recent_arms": {controller: list(arms) for controller, arms in self.recent_arms.items()},
            "sizes": {name: os.fstat(file).st_size for name, file in files.items()},
            "identity": identity(self.args),
            "threads": torch.get_num_threads(),
        }
        return state

    def _restore(self):
        for name in ("global_step", "episodes", "pulls", "summary", "rounds", "wandb_id"):
            setattr(self, name, self.resumed[name])
        for controller, arms in self.resumed["recent_arms"].items():
            self.recent_arms[controller].extend(arms)

    def wants_checkpoint(self, global_step):
        """Whether `save_checkpoint` is to be called now: the interval has passed, or a signal wants the run to end."""
        interval = self.args.checkpoint_interval
        if not interval or "checkpoint.pt" in self.problems:
            return False
        return bool(self.signal) or global_step // interval > self.last_checkpoint // interval

    def snapshot(self, global_step, state):
        """A checkpoint: `state`, and that of this Run after `global_step`. Tensors in it are not copied."""
        return to_plain(state | {"run": self._state() | {"global_step": global_step}})

    def save_checkpoint(self, checkpoint):
        """Write a `snapshot` to checkpoint.pt, whole or not at all; the one before stays as checkpoint.prev.pt.

        If that fails there is a warning, and no further checkpoint.

        Raises:
            SystemExit: a signal has asked for it.
        """
        self.last_checkpoint = checkpoint["run"]["global_step"]
        if "checkpoint.pt" not in self.problems:
            with self._may_fail("checkpoint.pt"):
                for file in (
                    *(table.fileno() for table, _ in self.tables.values()),
                    self.journal and self.journal.file,
                ):
                    if file is not None:
                        os.fsync(file)  # what a checkpoint relies on must outlast a power cut, too
                episodes = self.episodes[: checkpoint["run"]["episodes"]]
                checkpoint = checkpoint | {"run": checkpoint["run"] | {"episodes": episodes}}
                write_checkpoint(self.folder, self.lock, checkpoint)
        if self.signal:
            raise SystemExit(128 + self.signal)

    @contextlib.contextmanager
    def saving(self, snapshot):
        """If the block raises, `save_checkpoint` what the function `snapshot` returns, if there are checkpoints."""
        try:
            yield
        except Exception:
            if self.args.checkpoint_interval:
                self.save_checkpoint(snapshot())
            raise

    def open_journal(self, dtype, rings, capacity, spare):
        """With checkpoints, keep a `Journal` of the replay memory, which belongs to them; returns it, or None."""
        if self.args.checkpoint_interval:
            self.journal = Journal(self.folder / "replay.bin", dtype, rings, capacity, spare)
        return self.journal

    def write_journal(self, ring, index, row):
        """`Journal.write`, if there is a journal; where that fails there is a warning, and no further checkpoint."""
        if self.journal and "checkpoint.pt" not in self.problems:
            with self._may_fail("checkpoint.pt"):
                self.journal.write(ring, index, row)

    @contextlib.contextmanager
    def _may_fail(self, name):
        """Writes the file `name`: where that fails there is one warning, and training goes on."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:  # torch and TensorBoard raise the others
            if name not in self.problems:
                self.problems[name] = getattr(error, "strerror", None) or str(error).split("\n")[0]
                tqdm.write(f"{self.folder}: {name} cannot be written: {self.problems[name]}", sys.stderr)

    def __enter__(self):
        def stop(signum, frame):
            at_the_end = self.global_step >= self.args.total_timesteps  # no step will follow
            if self.signal or at_the_end or not self.args.checkpoint_interval or "checkpoint.pt" in self.problems:
                raise SystemExit(128 + signum)
            self.signal = signum  # the script saves a checkpoint first, at the end of its step

        def thread_fails(failure):  # TensorBoard writes in a thread
            with self._may_fail("TensorBoard's events"):
                raise failure.exc_value

        self.handlers = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        threading.excepthook = thread_fails
        try:
            self._open_logs()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _open_logs(self):
        versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
        self.config = vars(self.args) | self.derived | {"versions": versions, "device": str(self.device)}
        self.config["git_commit"] = git_commit()
        if self.resumed:
            begun_by = json.loads((self.folder / "config.json").read_text())["git_commit"]
            if begun_by != self.config["git_commit"]:
                print(f"--resume: begun by commit {begun_by}, this is {self.config['git_commit']}", file=sys.stderr)
        self._write_json("config.json", self.config)
        columns = ["round", "global_step", "arm", "learning_rate", "performance", "feedback"]
        columns[2:2] = ["controller"] if self.controllers else []
        self._open_csv("rounds.csv", columns + [f"p_{arm}" for arm in range(len(self.arms or ()))])
        self._open_csv("episodes.csv", ["global_step", "episodic_return", "episodic_length"])
        self._write_summary("running")
        with self._may_fail("TensorBoard's events"):
            self.writer = SummaryWriter(self.folder, purge_step=self.global_step + 1 if self.resumed else None)
            if not self.resumed:
                table = "".join(f"|{name}|{value}|\n" for name, value in self.config.items())
                self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        if self.args.track:
            self._start_wandb()
        if self.args.cuda and str(self.device) == "cpu":
            print("--cuda: no GPU found, training on the CPU", file=sys.stderr)
        if sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            start = {"initial": self.global_step}
            self.bar = tqdm(total=self.args.total_timesteps, bar_format=layout, dynamic_ncols=True, **start)

    def _write_json(self, name, content):
        with self._may_fail(name):
            new = self.folder / f"{name}.new"
            new.write_text(json.dumps(content, indent=2, default=str) + "\n")
            new.replace(self.folder / name)  # at once: a kill leaves the old file or the new one

    def _open_csv(self, name, columns):
        if self.resumed:
            os.truncate(self.folder / name, self.resumed["sizes"][name])
        file = open(self.folder / name, "a", newline="", buffering=1)  # line-buffered: a row is on disk at once
        self.tables[name] = file, csv.writer(file, lineterminator="\n")
        if not self.resumed:
            self._write_row(name, columns)

    def _write_row(self, name, row):
        with self._may_fail(name):
            self.tables[name][1].writerow(row)

    def _start_wandb(self):
        import wandb

        names = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "name": self.folder.name}
        self.wandb_id = self.wandb_id or secrets.token_hex(4)
        names |= {"id": self.wandb_id, "resume": "allow"}
        os.environ.setdefault(
            "WANDB_FINISH_TIMEOUT", "600"
        )  # seconds; W&B waits for ever otherwise if it has gone away
        names |= {"config": self.config, "dir": self.folder, "save_code": True}
        try:
            self.wandb = wandb.init(**names)
        except Exception as error:  # of many kinds
            print(f"W&B: {error}; tracking offline, see {self.folder / 'wandb'}", file=sys.stderr)
            wandb.teardown()  # or the id would still be in use
            os.environ.pop("WANDB_SERVICE", None)  # nor that of a parent process, such as a sweep's
            self.wandb = wandb.init(**names, mode="offline")
        self.wandb.define_metric("*", step_metric="global_step")

    def __exit__(self, error_type, error, traceback):
        for signum in self.handlers:
            signal.signal(signum, signal.SIG_IGN)  # a second Ctrl-C must not tear what is written now
        status, exit_code = "finished", 0
        if isinstance(error, SystemExit):
            status, exit_code = "interrupted", error.code
        elif isinstance(error, FloatingPointError):
            status, exit_code = "diverged", 3
        elif error:
            status, exit_code = "failed", 1
        if self.journal:
            self.on_exit.callback(self.journal.close, keep=status != "finished")
        for finish in (lambda: self._write_summary(status), self.on_exit.close, self._close_logs):
            try:
                finish()
            except Exception as problem:  # what comes after can still be saved
                print(f"{self.folder} is not complete: {problem}", file=sys.stderr)
        os.close(self.lock)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        threading.excepthook = threading.__excepthook__
        if self.wandb:
            with self._may_fail("W&B's log"):
                self.wandb.finish(exit_code=exit_code)
        if status == "diverged":
            print(f"diverged at step {self.global_step}: {error}", file=sys.stderr)
        result = f", final return {final_return(self.episodes, self.global_step):.1f}" if self.episodes else ""
        print(f"{status}{result}, see {self.folder}")
        if self.problems:
            problems = "; ".join(f"{name} ({reason})" for name, reason in self.problems.items())
            print(f"{self.folder} is not complete: {problems}", file=sys.stderr)
        if status == "diverged":
            raise SystemExit(exit_code) from None

    def _close_logs(self):
        if self.bar:
            self.bar.close()
        if self.writer:
            with self._may_fail("TensorBoard's events"):
                self.writer.close()
        plot_curves(self.folder)

    def log_scalars(self, scalars, global_step):
        """Send {name: float} to TensorBoard and, with --track, to W&B."""
        with self._may_fail("TensorBoard's events"):
            for name, value in scalars.items() if self.writer else ():
                self.writer.add_scalar(name, value, global_step)
        if self.wandb:
            with self._may_fail("W&B's log"):
                self.wandb.log(scalars | {"global_step": global_step})

    def _flush(self):
        if self.writer:
            with self._may_fail("TensorBoard's events"):
                self.writer.flush()

    def log_episode(self, global_step, episodic_return, episodic_length):
        """Log an episode that has ended: raw return, length in timesteps."""
        self.episodes.append((global_step, episodic_return))
        self._write_row("episodes.csv", (global_step, episodic_return, episodic_length))
        lengths = {"charts/episodic_length": episodic_length}
        self.log_scalars({"charts/episodic_return": episodic_return} | lengths, global_step)

    def log_round(
        self,
        global_step,
        learning_rate,
        performance,
        arm=None,
        probabilities=(),
        feedback=None,
        controller=None,
        rolled_back=None,
    ):
        """Log a round that has closed; `probabilities` are those that its arm was drawn from.

        `rolled_back` is the reason where a round was undone; its performance is None if nothing was observed.
        """
        controller = controller if self.controllers else None
        self.rounds[controller] += 1
        probabilities = [float(p) for p in probabilities]
        row = [self.rounds[controller], global_step, arm, learning_rate, performance, feedback, *probabilities]
        row[2:2] = [controller] if self.controllers else []
        self._write_row("rounds.csv", row)
        scalars = {"charts/learning_rate": learning_rate, "lrrl/performance": performance}
        if arm is not None:
            recent_arms = self.recent_arms[controller]
            self.pulls[controller][arm] += 1
            recent_arms.append(arm)
            scalars |= {"lrrl/arm": arm, "lrrl/feedback": feedback, "lrrl/entropy": entropy(probabilities)}
            scalars["lrrl/pull_entropy"] = entropy(np.bincount(recent_arms) / len(recent_arms))
            scalars |= {f"lrrl/probability/{rate:g}": p for rate, p in zip(self.arms, probabilities)}
        if rolled_back:
            self.summary["rollbacks"] += 1
            scalars |= {"lrrl/rollbacks": self.summary["rollbacks"]}
            tqdm.write(f"step {global_step}: learning rate {learning_rate:g} is rolled back: {rolled_back}", sys.stderr)
        suffix = f"/{controller}" if controller else ""
        self.log_scalars({name + suffix: x for name, x in scalars.items() if x is not None}, global_step)
        self._flush()

    def progress(self, global_step, learning_rate):
        """Show how far the run is: a bar on a terminal, elsewhere a line every few seconds.

        The first call with a learning rate starts the clock of the steps per second, so that set-up, compilation and a
        warm-up (None) do not count.
        """
        self.global_step, self.now = global_step, time.perf_counter()
        if learning_rate is not None:
            self.clock = self.clock or (self.now, global_step)
        if self.sps:
            self.log_scalars({"charts/SPS": self.sps}, global_step)
        latest = f"return {self.episodes[-1][1]:.1f}" if self.episodes else "no episode yet"
        learning = "warming up" if learning_rate is None else f"learning rate {learning_rate:g}"
        status = f"SPS {self.sps or '?'}, {latest}, {learning}"
        if self.bar:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update(global_step - self.bar.n)
        if self.now < self.next_update:
            return
        self.next_update = self.now + PROGRESS_SECONDS
        self._flush()
        self._write_summary("running")
        if not self.bar:
            left = (self.args.total_timesteps - global_step) / (self.sps or math.inf)
            left = f"{tqdm.format_interval(left)} left, " if self.sps else ""
            print(f"step {global_step} of {self.args.total_timesteps}, {left}{status}", flush=True)

    @property
    def sps(self):
        """Timesteps per second from the first call of `progress` to the last one; None before there are two."""
        steps = self.global_step - self.clock[1] if self.clock else 0
        return round(steps / (self.now - self.clock[0]), 1) if steps else None

    def _write_summary(self, status):
        names = ("env_id", "seed", "lr_control", "total_timesteps")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)  # KiB
        summary = {name: getattr(self.args, name) for name in names} | {
            "bandit": self.args.bandit if self.arms else None,
            "global_step": self.global_step,
            "status": status,
            "final_return": final_return(self.episodes, self.global_step),
            "auc": area_under_curve(self.episodes, max([self.global_step, *(step for step, _ in self.episodes[-1:])])),
            "sps": self.sps,
            "pulls": (self.pulls if self.controllers else self.pulls[None]) if self.arms else None,
            "peak_rss_mb": round(peak / 1024, 1),
        }
        summary |= self.summary
        self._write_json("summary.json", summary)
        if self.wandb and status != "running":
            with self._may_fail("W&B's log"):
                self.wandb.summary.update(summary)
