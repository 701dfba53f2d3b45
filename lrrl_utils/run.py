"""The life cycle of a training run: its folder, checkpoints, signals, progress, exit code.

    with Run(args, state, device, bandits, checkpoint) as run:
        for global_step in range(run.global_step + 1, args.total_timesteps + 1):
            ...
            run.log_episode(...); run.log_rounds(...); run.log_scalars(...); run.progress(...)
            run.end_step(global_step)  # saves a checkpoint when one is due

However a run ends, short of a kill, `summary.json` and `curves.png` are brought up to date, and the exit code tells:
0 finished, 3 diverged (a FloatingPointError), 128 + n signal n, 1 any other error. In a run that is resumed, the rows
that came after the checkpoint are cut off.
"""

import contextlib
import inspect
import itertools
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from bandits import Rounds
from lrrl_utils.checkpoints import Checkpoints
from lrrl_utils.curves import plot_curves
from lrrl_utils.files import lock, read_json
from lrrl_utils.logs import Logs
from lrrl_utils.measures import area_under_curve, final_return, shown_rate
from lrrl_utils.origin import describe_origin
from lrrl_utils.terminal import handle_signals, reject, say

PROGRESS_SECONDS = 5  # between updates of summary.json, and between progress lines where there is no terminal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


class Stopped(SystemExit):
    """A signal has asked the run to end."""


class Run(Logs):
    """One training run: its folder, its logs, its end. A context manager around the training loop.

    Args:
        args: the script's arguments.
        state: {name: object} of all that the rest of the run depends on, between two steps. A resumed run starts by
            restoring it.
        device: where the networks are.
        bandits: {name: bandit}, if a bandit sets the rate.
        checkpoint: what `load_checkpoint` has returned.
        replay: a replay memory, whose rows are kept in a file beside the checkpoints: `dtype` of a row, `rings`,
            `capacity` of each, `count` of all rows that it has got (rings,), `write(ring, indices, rows)`, and
            `journal`, called with a ring, an index and a row.
        **derived: what else the script derived from the arguments, for config.json.
    """

    def __init__(self, args, state, device, bandits=None, checkpoint=None, replay=None, **derived):
        self.args, self.device, self.derived = args, device, derived
        self.global_step, self.summary = 0, {}  # the summary is what a script adds to summary.json
        self.clock, self.now, self.next_update = None, 0.0, 0.0
        self.bar = self.signal = None
        script, bandits_py = Path(sys.modules[type(args).__module__].__file__), Path(inspect.getfile(Rounds))
        self.code = script, bandits_py, bandits_py.with_name("peak.py")
        self.on_exit = contextlib.ExitStack()  # for what a script must close, however the run ends
        self.resumed = (checkpoint or {}).get("run")
        folder = Path(args.resume) if checkpoint else self.make_folder()
        self.lock = checkpoint["lock"] if checkpoint else lock(folder)
        super().__init__(folder, {name: bandit.arms for name, bandit in (bandits or {}).items()})
        self.checkpoints = Checkpoints(args, state, self, self.lock, replay)
        if checkpoint:
            self.checkpoints.restore(checkpoint)
            self.global_step = self.resumed["global_step"]

    def make_folder(self):
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

    # CHECKPOINTS

    def checkpoint_if_it_fails(self, global_step, *names):
        """Around a block that may raise or be stopped: it then leaves a checkpoint of how things were before it.

        `names` are those of the state that the block changes, as long as it does not end; all of it without any.
        """
        return self.checkpoints.saved_if_it_fails(global_step, names)

    def end_step(self, global_step):
        """Save a checkpoint if one is due, and end the run if a signal has asked for it."""
        if self.signal or self.checkpoints.is_due(global_step):
            self.checkpoints.save(global_step)
        self.stop_if_asked()

    def stop_if_asked(self):
        """End the run if a signal has asked for it. Raises Stopped, a SystemExit."""
        if self.signal:
            raise Stopped(128 + self.signal)

    # START AND END

    def __enter__(self):
        def stop(signum, frame):
            if self.signal and time.monotonic() > self.signal_time + 1:
                raise Stopped(128 + signum)  # somebody insists; systems and parents that end send several at once
            if not self.signal:  # only that: whatever is going on here may hold a lock
                self.signal, self.signal_time = signum, time.monotonic()

        self.handlers = handle_signals(SIGNALS, stop)
        threading.excepthook = self.note_failure_of_thread
        try:
            self.open_logs()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def open_logs(self):
        origin = describe_origin(self.code, self.device)
        config = vars(self.args) | self.derived | origin
        config |= {"arms": self.arms} if self.controllers else {}
        if self.resumed:
            begun = read_json(self.folder / "config.json")
            before = {name: begun.get(name) for name in origin}
            for name in (name for name in origin if before[name] != origin[name]):
                say(f"--resume: begun with {name} {before[name]}, this is {origin[name]}", "stderr")
            config["resumed"] = [*begun.get("resumed", ()), before | {"global_step": self.global_step}]
        self.open_tables(self.resumed and self.resumed["sizes"])
        self.write_summary("running")  # before the config, whose timesteps a finished run is not to have
        self.write_json("config.json", config)
        self.open_tensorboard(config, self.global_step + 1 if self.resumed else None)
        if self.args.track:
            self.open_wandb(self.args, config, self.code)
        if self.args.cuda and str(self.device) == "cpu":
            say("--cuda: no GPU found, training on the CPU", "stderr")
        if sys.stderr and sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            of = {"total": self.args.total_timesteps, "initial": self.global_step}
            self.bar = tqdm(bar_format=layout, dynamic_ncols=True, **of)

    def __exit__(self, error_type, error, traceback):
        for signum in self.handlers:
            signal.signal(signum, signal.SIG_IGN)  # another one must not tear what is written now
        status, exit_code = "finished", 0
        if isinstance(error, Stopped):
            status, exit_code = "interrupted", error.code
        elif isinstance(error, FloatingPointError):
            status, exit_code = "diverged", 3
        elif error:
            status, exit_code = "failed", getattr(error, "code", 1) or 1  # an environment may raise SystemExit(0)
        self.on_exit.callback(self.checkpoints.close, status != "finished" or getattr(self.args, "keep_replay", False))
        steps = (lambda: self.write_summary(status), self.on_exit.close, self.close, self.plot)
        for finish in (*steps, steps[0]):  # the summary once more: a replay that is gone has made room
            try:
                finish()
            except Exception as problem:  # what comes after can still be saved
                say(f"{self.folder} is not complete: {problem}", "stderr")
        os.close(self.lock)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        threading.excepthook = threading.__excepthook__
        if self.wandb:
            with self.wandb_may_fail():
                self.wandb.finish(exit_code=exit_code)
        self.say_how_it_ended(status, error)
        if status == "diverged" or (status == "failed" and isinstance(error, SystemExit)):
            raise SystemExit(exit_code) from None

    def plot(self):
        if self.bar:
            self.bar.close()
        with self.may_fail("curves.png"):
            plot_curves(self.folder)

    def say_how_it_ended(self, status, error):
        if status == "diverged":
            say(f"diverged at step {self.global_step}: {error}", "stderr")
        if status == "finished" and not any(self.rounds.values()):
            say("no round has closed: too few timesteps, or no end of an episode; no rate was learnt about", "stderr")
        result = f", final return {final_return(self.episodes, self.global_step):.1f}" if self.episodes else ""
        say(f"{status}{result}, see {self.folder}")
        if self.problems:
            problems = "; ".join(f"{name} ({reason})" for name, reason in self.problems.items())
            say(f"{self.folder} is not complete: {problems}", "stderr")

    # PROGRESS

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
        learning = "warming up" if learning_rate is None else f"learning rate {shown_rate(learning_rate):g}"
        status = f"SPS {self.sps or '?'}, {latest}, {learning}"
        if self.bar:
            with self.may_fail("the progress bar"):
                self.bar.set_postfix_str(status, refresh=False)
                self.bar.update(global_step - self.bar.n)
        if self.now < self.next_update:
            return
        self.next_update = self.now + PROGRESS_SECONDS
        self.flush()
        self.write_summary("running")
        if not self.bar:
            left = (self.args.total_timesteps - global_step) / (self.sps or math.inf)
            left = f"{tqdm.format_interval(left)} left, " if self.sps else ""
            say(f"step {global_step} of {self.args.total_timesteps}, {left}{status}")

    @property
    def sps(self):
        """Timesteps per second from the first call of `progress` to the last one; None before there are two."""
        steps = self.global_step - self.clock[1] if self.clock else 0
        return round(steps / (self.now - self.clock[0]), 1) if steps else None

    def write_summary(self, status):
        names = ("env_id", "seed", "lr_control", "total_timesteps")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)  # KiB
        pulls = self.pulls if self.controllers else next(iter(self.pulls.values()), None)
        summary = {name: getattr(self.args, name) for name in names} | {
            "bandit": self.args.bandit if self.arms else None,
            "global_step": self.global_step,
            "status": status,
            "final_return": final_return(self.episodes, self.global_step),
            "auc": area_under_curve(self.episodes, max([self.global_step, *(step for step, _ in self.episodes[-1:])])),
            "sps": self.sps,
            "pulls": pulls,
            "peak_rss_mb": round(peak / 1024, 1),
            "rollbacks": self.rollbacks if self.arms else None,
        }
        self.write_json("summary.json", summary := summary | self.summary)
        if self.wandb and status != "running":
            with self.wandb_may_fail():
                self.wandb.summary.update(summary)
