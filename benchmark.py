"""A grid of runs, tasks × variants × seeds, side by side on Ray: on one machine, or on a cluster.

    python benchmark.py --run-dir runs/rates --command "ppo_continuous_lrrl.py --total-timesteps 300000" \\
        --env-ids HalfCheetah-v5 Hopper-v5 --num-seeds 5 \\
        --variant "peak=" --variant "fixed 3e-4=--lr-control constant --learning-rate 3e-4"
    python report.py runs/rates

A run is RUN_DIR/VARIANT/RUN_FOLDER, beside it a log of what it said. Stopped in any way, Ctrl-C and kill -9 included,
the same command goes on: it skips what has ended and resumes the rest from its checkpoints. A run that fails is tried
once more from there; then it is named at the end, and the exit code is 1. `--tuner pb2` adds a population as a rival.
"""

import contextlib
import glob
import itertools
import os
import shlex
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from lrrl_utils.command_line import MAY_CHANGE, parse_args
from lrrl_utils.files import lock, read_json
from lrrl_utils.parser import given_options
from lrrl_utils.ranges import Count, NonNegative, Rate, Seed, Whole
from lrrl_utils.scripts import (
    ENDED,
    ROOT,
    hide_gpus,
    last_line,
    reserve,
    split_command,
    split_options,
    status_of,
    train,
    try_out,
    wait_until_free,
)
from lrrl_utils.terminal import handle_signals, reject, say

SET_HERE = {"env_id", "seed", "run_dir", "resume", "checkpoint_interval"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 30  # between lines of progress where there is no terminal
FREE = {"env_id", "seed", "checkpoint_interval", *MAY_CHANGE}  # options in which runs of a variant may differ


@dataclass
class Args:
    env_ids: tuple[str, ...]  # the tasks

    # GRID
    command: str = "ppo_continuous_lrrl.py"  # the training script, and the options that all runs have
    # NAME=OPTIONS, once for each variant; NAME is what tables call it. Without any (and no --tuner): one without a name
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    num_seeds: Count = 3  # runs of each variant on each task
    start_seed: Seed = 1  # the first seed
    run_dir: str = "runs/benchmark"  # the folder of the study
    dry_run: bool = False  # whether to print the commands of the runs, and start none

    # RAY
    workers: Whole = 0  # runs side by side, a thread each; 0: as many as there are CPU cores
    ray_address: str | None = None  # a cluster that is there already and sees the same folders: auto, or HOST:PORT
    gpus_per_run: NonNegative = 0.0  # GPUs of a run, or the part of one that it gets; 0: runs are on the CPU
    # timesteps between checkpoints (default: a tenth of a run); those of a population are a stretch apart
    checkpoint_interval: Whole | None = None

    # POPULATION
    tuner: Literal["pb2", "pbt"] | None = None  # pb2 or pbt: adds this variant, runs whose rates Ray Tune changes
    population: Annotated[int, "[1, 1000]"] = 4  # runs of a population, each as long as any other run
    tuner_range: tuple[Rate, Rate] = (3e-5, 3e-3)  # the ends of the range of its rates
    tuner_rounds: Count = 10  # stretches of a run, after which the tuner compares and changes (pb2: from the second on)


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    variant: str
    env_id: str
    seed: int
    script: str
    exp_name: str
    options: tuple[str, ...]  # those that decide what is computed
    checkpoint_interval: int
    folder: str  # parent of the run folder
    prefix: str  # how the name of the run folder begins
    timesteps: int
    rollout: int  # timesteps between two moments at which a run can be branched
    has_replay: bool  # whether the script has a replay, which a branch needs

    @property
    def title(self):
        return " ".join(filter(None, [self.variant, self.env_id, f"seed {self.seed}"]))

    @property
    def log(self):
        return Path(self.folder, f"{self.prefix}.log")

    @property
    def runs(self):
        """Its run folders: one, unless somebody has copied one there."""
        return [path.parent for path in Path(self.folder).glob(f"{glob.escape(self.prefix)}__*/config.json")]

    @property
    def population_folder(self):
        """Where a population trains."""
        return Path(self.folder, f".{self.prefix}")

    @property
    def stretches(self):
        """The run folders of a population that trains."""
        return [path.parent for path in self.population_folder.glob("*/*/config.json")]

    def first_stretch(self, args):
        """Timesteps after which the members of a population are compared for the first time."""
        return max(self.timesteps // args.population // args.tuner_rounds // self.rollout, 1) * self.rollout

    @property
    def has_ended(self):
        return any(status_of(run) in ENDED for run in self.runs)

    @property
    def words(self):
        """What the script is to be called with: it goes on where there is a checkpoint."""
        for run in self.runs:
            if (run / "checkpoint.pt").exists() or (run / "checkpoint.prev.pt").exists():
                return ["--resume", str(run), "--env-id", self.env_id, *self.may_change]
        interval = ["--checkpoint-interval", str(self.checkpoint_interval)]
        return [*self.options, *interval, "--run-dir", self.folder]

    @property
    def may_change(self):
        """Those of its options with which a run may go on in another way than it was begun."""
        options = group(self.options).items()
        return [word for name, values in options if given_options([name]) & {*MAY_CHANGE} for word in (name, *values)]

    @property
    def global_step(self):
        """How far it is, in timesteps."""
        if self.has_ended:
            return self.timesteps
        steps = [0]
        for run in self.runs:
            with contextlib.suppress(OSError, ValueError, KeyError):
                steps.append(read_json(run / "summary.json")["global_step"])
        return max(steps)


# BEFORE THE FIRST RUN


def read_variants(args):
    """{name: [option, …]} of --variant; one without a name if there is none."""
    variants = {}
    for text in args.variant:
        name, equals, options = text.partition("=")
        if not equals or not name.strip() or name.startswith("-"):
            reject(f"--variant {text}: must be NAME=OPTIONS, like fixed=--lr-control constant")
        if name != name.strip() or name.startswith(".") or "/" in name or not name.isprintable():
            reject(f"--variant {text}: its name is that of a folder: no slash, no space at its ends, no leading dot")
        if len(name.encode()) > 200:
            reject(f"--variant {text}: its name is too long for a folder")
        if name in variants or name == args.tuner:
            reject(f"--variant {text}: there are two variants {name}")
        variants[name] = split_options(f"--variant {name}:", options, SET_HERE)
    return variants or ({} if args.tuner else {"": []})


def check_ray(args):
    """Rejects parts of GPUs that Ray does not know, and an address that is empty."""
    if args.gpus_per_run > 1 and args.gpus_per_run % 1:
        reject(f"--gpus-per-run {args.gpus_per_run:g}: must be a whole number, or below 1")
    if args.ray_address == "":
        reject("--ray-address: must be auto or HOST:PORT; without the option, Ray is started here")


def make_jobs(args):
    """The runs of the grid, populations last.

    Rejects what the script would refuse: each variant is tried out on the first task, and the first one on each task.
    """
    script, options = split_command(args.command, SET_HERE)
    variants = read_variants(args)
    if args.tuner:
        variants[args.tuner] = ["--lr-control", "constant"]
    if args.tuner and args.tuner_range[0] >= args.tuner_range[1]:
        reject(f"--tuner-range {args.tuner_range[0]:g} {args.tuner_range[1]:g}: must be LOW HIGH, LOW below HIGH")
    last_seed = args.start_seed + args.num_seeds - 1
    if (1000 * last_seed + 999 if args.tuner else last_seed) >= 2**32:  # a member's seed has its number at the end
        reject(f"--start-seed {args.start_seed}, --num-seeds {args.num_seeds}: the last seed is too large")
    if len(set(args.env_ids)) < len(args.env_ids):
        reject(f"--env-ids {' '.join(args.env_ids)}: names a task twice")
    cells = list(itertools.product(variants, args.env_ids))
    words = {(name, env_id): [*options, *variants[name], "--env-id", env_id] for name, env_id in cells}
    tried = [cell for cell in cells if cell[0] == cells[0][0] or cell[1] == cells[0][1]]
    interval = ["--checkpoint-interval", str(1 if args.checkpoint_interval is None else args.checkpoint_interval)]
    found = dict(zip(tried, try_out([(script, [*words[cell], *interval]) for cell in tried], args.gpus_per_run)))
    for (name, env_id), (_, refused) in found.items():
        if refused:
            reject(f"{f'--variant {name}, ' if name else ''}{env_id}: {refused}")
    jobs = []
    seeds = range(args.start_seed, args.start_seed + args.num_seeds)
    for seed, (name, env_id) in itertools.product(seeds, cells):
        theirs, _ = found[name, args.env_ids[0]]
        of_tuner = ["--compile" if theirs["compile"] else "--no-compile"]  # as decided for the length of a whole run
        a_tenth = max(theirs["total_timesteps"] // 10, 1)
        job = Job(
            variant=name,
            env_id=env_id,
            seed=seed,
            script=script,
            exp_name=theirs["exp_name"],
            options=(*words[name, env_id], *(of_tuner if name == args.tuner else ()), "--seed", str(seed)),
            checkpoint_interval=a_tenth if args.checkpoint_interval is None else args.checkpoint_interval,
            folder=str(Path(args.run_dir, name)),
            prefix=f"{env_id}__{theirs['exp_name']}__{seed}".replace("/", "-"),
            timesteps=theirs["total_timesteps"] * (args.population if name == args.tuner else 1),
            rollout=theirs.get("num_envs", 1) * theirs.get("num_steps", 1),
            has_replay="keep_replay" in theirs,
        )
        jobs.append(job)
    if args.tuner:
        theirs, _ = found[args.tuner, args.env_ids[0]]
        check_stretches(args, next(job for job in jobs if job.variant == args.tuner), theirs)
    return sorted(jobs, key=lambda job: job.variant == args.tuner)


def check_stretches(args, job, theirs):
    """Rejects a population whose members cannot train in stretches. `theirs` are the options of its script."""
    if theirs.get("exploration_fraction"):
        reject(f"--tuner {args.tuner}: ε must not depend on the length of a run; give --exploration-steps instead")
    end = str(job.first_stretch(args))
    words = [*job.options, "--total-timesteps", end, "--checkpoint-interval", end]
    ((_, refused),) = try_out([(job.script, words)], args.gpus_per_run)
    if refused:
        reject(f"--tuner-rounds {args.tuner_rounds}: a first stretch of {end} timesteps: {refused}")


def group(words):
    """{option: its values} of a command line."""
    values = []
    options = {"": values}  # words before any option, which no run has
    for word in words:
        if word.startswith("--"):
            values = options[word] = []
        else:
            values.append(word)
    return options


def without_free(words):
    return {option: values for option, values in group(words).items() if not given_options([option]) & FREE}


def check_begun(args, jobs):
    """Rejects a variant's folder that has runs with other options, whatever their task and seed.

    Without variants, several commands may fill one folder: only the runs of this one count there.
    """
    of_tuner = {"population": args.population, "tuner_range": list(args.tuner_range), "tuner_rounds": args.tuner_rounds}
    for job in {job.variant or job: job for job in jobs}.values():
        # "*" finds folders with a leading dot, too, those of populations that train
        everything = [path.parent for path in Path(job.folder).glob("*/config.json")]
        for run in everything if job.variant else job.runs:
            try:
                config = read_json(run / "config.json")
                begun = [str(word) for word in config["command_line"]]
            except (OSError, ValueError, KeyError, TypeError):
                reject(f"--run-dir: {run} holds no config.json of a run; move it away")
            is_ours = config.get("exp_name") in (job.exp_name, None)
            ours, theirs = without_free(job.options), without_free(begun)
            if not {"--compile", "--no-compile"} & ours.keys():  # the script decides it, and adds it
                theirs = {option: x for option, x in theirs.items() if option not in ("--compile", "--no-compile")}
            if not is_ours or ours != theirs:
                begun = [config.get("exp_name") or job.exp_name, *begun]
                reject(f"--run-dir: {run} was begun with {shlex.join(begun)}; take another folder, or move it away")
            for name, x in of_tuner.items() if job.variant == args.tuner else ():
                if config.get(name) != x:
                    option = f"--{name.replace('_', '-')}"
                    reject(f"{option}: {run} was begun with {config.get(name)}; take another folder, or move it away")


# ON THE WORKERS OF RAY


def run(job, gpus, cwd):
    """Train a run to its end. Returns what went wrong, "" if nothing did."""
    os.chdir(cwd)
    hide_gpus(gpus)
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    for _attempt in range(2):
        for folder in job.runs:
            wait_until_free(folder)
        if job.has_ended:
            return ""
        if "--resume" not in job.words:
            for folder in job.runs:
                shutil.rmtree(folder)  # it was stopped before its first checkpoint
        code = train(job.script, job.words, job.log, own_session=True)
    return "" if job.has_ended else f"exit code {code}, {last_line(job.log)} (see {job.log})"


# THE DRIVER


def start_ray(args):
    """A Ray of our own, or the cluster at --ray-address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let anything else on the machine go first
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")  # they get a SIGTERM and save a checkpoint
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # of the workers
    import ray

    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if args.ray_address is None:
        ours = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        ray.init("local", num_cpus=args.workers or None, **ours, **quiet)
    else:
        try:
            if ":" in args.ray_address:  # Ray would try for minutes
                host, _, port = args.ray_address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(args.ray_address, **quiet)
        except (OSError, ValueError) as error:
            reject(f"--ray-address {args.ray_address}: {str(error).splitlines()[0]}")
    gpus = max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
    if args.gpus_per_run > gpus:
        reject(f"--gpus-per-run {args.gpus_per_run:g}: no machine has more than {gpus:g} GPUs")
    return ray


class Progress:
    """How far the grid is: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, jobs):
        self.steps = {job: job.global_step for job in jobs}
        self.total, self.before = sum(job.timesteps for job in jobs), sum(self.steps.values())
        self.start, self.next_line = time.monotonic(), 0.0
        self.bar = tqdm(total=self.total, bar_format="{percentage:3.0f}%|{bar}|{postfix}", disable=None)

    def update(self, active, ended=()):
        """Show it. `active` are the jobs that run now, `ended` those that have ended just now, well or not."""
        self.steps |= {job: job.global_step for job in [*active, *ended]}
        self.total -= sum(job.timesteps - self.steps[job] for job in ended)  # what those that failed will not do
        done, now = sum(self.steps.values()), time.monotonic()
        text = f"{sum(self.steps[job] >= job.timesteps for job in self.steps)} of {len(self.steps)} runs"
        if done > self.before:
            left = (self.total - done) * (now - self.start) / (done - self.before)
            text += f", {tqdm.format_interval(left)} left"
        self.bar.total = self.total
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if self.bar.disable and (ended or now > self.next_line):
            self.next_line = now + SECONDS
            say(f"{done / max(self.total, 1):.0%}, {text}")


def last_of(error):
    """The last line of what an exception says."""
    return ["", *str(error).strip().splitlines()][-1]


def run_grid(ray, args, jobs):
    """Train all jobs. Returns {title: what went wrong}."""
    remote = ray.remote(num_cpus=1, num_gpus=args.gpus_per_run, max_retries=1)(run)
    limit = args.workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
    waiting, active, failed = [job for job in reversed(jobs) if not job.has_ended], {}, {}
    progress = Progress(jobs)
    while waiting or active:
        while waiting and len(active) < limit:
            job = waiting.pop()
            active[remote.remote(job, args.gpus_per_run, os.getcwd())] = job
        ready, _ = ray.wait(list(active), timeout=2)
        ended = {active.pop(reference): reference for reference in ready}
        for job, reference in ended.items():
            try:
                problem = ray.get(reference)
            except ray.exceptions.RayError as error:
                problem = f"{type(error).__name__}: {last_of(error)}"
            if problem:
                failed[job.title] = problem
                say(f"{job.title} has failed: {problem}", "stderr")
        progress.update(active.values(), ended)
    progress.bar.close()
    return failed


def wait_until_quiet(jobs, seconds=20):
    """Wait until the runs that were asked to stop have saved their checkpoints."""
    end = time.monotonic() + seconds
    for folder in itertools.chain.from_iterable([*job.runs, *job.stretches] for job in jobs):
        while time.monotonic() < end:
            try:
                os.close(lock(folder))
                break
            except BlockingIOError:
                time.sleep(0.1)


def work(args, jobs):
    """Train all jobs that have not ended. Returns {title: what went wrong}."""

    asked = []  # the signals that came: Ray makes every SystemExit one of code 1

    def stop(signum, frame):
        asked.append(signum)
        raise SystemExit(128 + signum)

    ray = start_ray(args)
    handle_signals(SIGNALS, stop)  # after Ray has set its own
    try:
        failed = run_grid(ray, args, [job for job in jobs if job.variant != args.tuner])
        for job in jobs:
            if job.variant == args.tuner and job.has_ended:
                shutil.rmtree(job.population_folder, ignore_errors=True)  # a signal may have stopped that
            elif job.variant == args.tuner:
                from lrrl_utils.tuner import train_population  # Ray Tune takes seconds to import

                try:
                    problem = train_population(job, args)
                except Exception as error:  # of many kinds, and the other populations are to go on
                    problem = f"{type(error).__name__}: {last_of(error)}"
                if problem:
                    failed[job.title] = problem
                say(
                    f"{job.title} has {f'failed: {problem}' if problem else 'ended'}", "stderr" if problem else "stdout"
                )
        ray.shutdown()
    except SystemExit:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # who presses Ctrl-C again has to wait, too
        ray.shutdown()  # ends the workers, whose runs get a SIGTERM then
        wait_until_quiet(jobs)
        say("stopped; the same command goes on", "stderr")
        raise SystemExit(128 + asked[0] if asked else 1) from None
    return failed


def main(argv=None):
    try:
        carry_out(parse_args(Args, argv))
    except KeyboardInterrupt:  # before `work` takes the signals
        say("stopped before the first run", "stderr")
        raise SystemExit(130) from None


def carry_out(args):
    check_ray(args)
    jobs = make_jobs(args)
    check_begun(args, jobs)
    if args.dry_run:
        for job in (job for job in jobs if not job.has_ended):
            script = job.script if Path.cwd() == ROOT else str(ROOT / job.script)
            command = shlex.join(["python", script, *job.words])
            if job.variant == args.tuner:
                say(f"left out: {job.title}, whose {args.population} members need Ray", "stderr")
            else:
                say(command)
        return
    if all(job.has_ended for job in jobs):
        for job in jobs:
            shutil.rmtree(job.population_folder, ignore_errors=True)  # a kill may have stopped that
        say(f"all {len(jobs)} runs have ended, see {args.run_dir}")
        return
    descriptor = reserve("--run-dir", Path(args.run_dir))
    try:
        failed = work(args, jobs)
    finally:
        os.close(descriptor)
    say(f"{len(jobs) - len(failed)} of {len(jobs)} runs have ended, see {args.run_dir}")
    for title, problem in failed.items():
        say(f"failed: {title}: {problem}", "stderr")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
