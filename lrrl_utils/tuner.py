"""A population of runs, whose constant rates Ray Tune changes as they go: PB2 and PBT, rivals that cost several runs.

PB2: Parker-Holder et al., "Provably Efficient Online Hyperparameter Optimization with Population-Based Bandits",
NeurIPS 2020. PBT: Jaderberg et al., arXiv 1711.09846. Both are Ray Tune's own; PB2 works on log10 of the rate.

Each member trains in stretches. After a stretch, all are compared by the mean return of the episodes that ended in it;
the worst go on from a copy of the best one's checkpoint, with another rate; in PB2 from the second stretch on, as after
the first nothing has improved yet. A stretch is a run folder, a branch of the one before. So when a population that was
stopped is begun anew, the stretches that are there are not trained again.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path

# before Ray Tune is imported: no tables on the screen, and signals are the driver's
os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1"}

import numpy as np
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.schedulers.pb2 import PB2
from tqdm import tqdm

from lrrl_utils.files import read_json, write_json
from lrrl_utils.measures import read_csv
from lrrl_utils.scripts import (
    has_ended_beyond,
    hide_gpus,
    last_line,
    lock_when_free,
    start_branch,
    status_of,
    step_of,
    train,
    wait_until_free,
)
from lrrl_utils.terminal import say

WORST = -1e9  # a score; Ray Tune takes finite ones only
POINTER = "stretch.json"  # what Ray Tune takes for a checkpoint: the run folder of a stretch, and which one it is


def train_stretch(plan, parent, i, rate, member):
    """The run folder of stretch `i` with a rate: a branch of the run folder `parent`, or a new run if that is None.

    Raises RuntimeError if the script fails.
    """
    key = f"{parent and parent.parent.name} {rate!r} {member} {plan['options']} {plan['moments'][i + 1]}"
    folder = Path(plan["folder"], f"{i}_{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock_when_free(folder)  # Ray Tune may not have ended yet what it replaces by this
    try:
        return find_stretch(plan, folder, i) or train_in(plan, folder, parent, i, rate, member)
    finally:
        os.close(descriptor)


def find_stretch(plan, folder, i):
    """The run folder in `folder` if it has come to the end of stretch `i`, else None."""
    for run in folder.glob("*/"):
        wait_until_free(run)
        if has_ended_beyond(run, plan["moments"][i]):
            is_last, end = i + 2 == len(plan["moments"]), read_json(run / "summary.json")["global_step"]
            # the next stretch goes on from its checkpoint, which a full disk may have kept from being that of the end
            if is_last or status_of(run) == "diverged" or step_of(run) == end:
                return run
    return None


def train_in(plan, folder, parent, i, rate, member):
    end = plan["moments"][i + 1]
    if parent:
        start_branch(parent, folder / parent.name, rate, (plan["seed"], member, i))
        words = ["--resume", folder / parent.name, "--env-id", plan["env_id"]]
    else:
        for run in folder.glob("*/"):
            shutil.rmtree(run)
        words = [*plan["options"], "--seed", 1000 * plan["seed"] + member, "--learning-rate", rate]
        words += ["--checkpoint-interval", end, "--run-dir", folder, *plan["keep"]]
    train(plan["script"], [*words, "--total-timesteps", end], folder / "log.txt", own_session=True)
    if run := find_stretch(plan, folder, i):
        return run
    raise RuntimeError(f"{last_line(folder / 'log.txt')} (see {folder / 'log.txt'})")


def score_of(run, begin):
    """Mean return of the episodes that ended after timestep `begin`, or of the last one if none did; WORST if diverged.

    Raises RuntimeError if no episode has ended at all.
    """
    if status_of(run) == "diverged":
        return WORST
    episodes = read_csv(run / "episodes.csv")
    returns = episodes["episodic_return"]
    later = returns[episodes["global_step"] > begin]
    if len(returns):
        return float(np.mean(later if len(later) else returns[-1:]))
    raise RuntimeError("no episode has ended in the first stretch: give fewer --tuner-rounds, and another --run-dir")


def train_member(config, plan):
    """A member of the population, as Ray Tune runs it: from its checkpoint on, to the end or until it is changed."""
    os.chdir(plan["cwd"])
    hide_gpus(plan["gpus"])
    # not from the configuration: who goes on from another member's checkpoint gets that, too
    member = member_of(tune.get_context().get_trial_id())
    run, stretches = None, 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            pointer = read_json(Path(directory, POINTER))
        run, stretches = Path(pointer["run"]), pointer["stretches"]
    low, high = plan["range"]  # float32 may be beyond it
    rate = config["rate"] if "rate" in config else min(max(10 ** config["log_rate"], low), high)
    for i in range(stretches, len(plan["moments"]) - 1):
        if run is None or status_of(run) != "diverged":  # until it is replaced by a better one
            run = train_stretch(plan, run, i, rate, member)
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, POINTER).write_text(json.dumps({"run": str(run), "stretches": i + 1}))
            report = {"score": score_of(run, plan["moments"][i]), "stretches": i + 1, "run": str(run)}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(directory))


def member_of(trial_id):
    return int(trial_id.rpartition("_")[2])


class Seeded:
    """Lets a scheduler's draws depend on seed, stretch and member alone: Ray Tune draws, too, as long as it waits."""

    def __init__(self, seed, **options):
        super().__init__(**options)
        self.seed = seed

    def _checkpoint_or_exploit(self, trial, *rest):
        key = self.seed, self._trial_state[trial].last_train_time, member_of(trial.trial_id)
        random.seed(str(key))
        np.random.seed(np.random.SeedSequence(key).generate_state(1))
        super()._checkpoint_or_exploit(trial, *rest)


class SeededPBT(Seeded, PopulationBasedTraining):
    pass


class SeededPB2(Seeded, PB2):
    def _get_new_config(self, trial, trial_to_clone):
        self.data = self.data.sort_values(["Time", "Trial"], kind="stable", ignore_index=True)  # they came in any order
        scores = self.data.Reward
        healthy = scores[scores > WORST]  # beside WORST, all of these would look the same
        self.data.Reward = scores.where(scores > WORST, 2 * healthy.min() - healthy.max())
        return super()._get_new_config(trial, trial_to_clone)


def make_scheduler(name, low, high, seed):
    """Ray Tune's scheduler, and how its members draw their first rates."""
    common = {"time_attr": "stretches", "metric": "score", "mode": "max", "perturbation_interval": 1, "synch": True}
    common |= {"seed": seed}
    if name == "pb2":
        bounds = [math.log10(low), math.log10(high)]
        return SeededPB2(hyperparam_bounds={"log_rate": bounds}, **common), {"log_rate": tune.uniform(*bounds)}
    rates = {"rate": tune.loguniform(low, high)}

    def clip(config):
        return config | {"rate": min(max(config["rate"], low), high)}  # it multiplies by 0.8 or 1.2

    return SeededPBT(hyperparam_mutations=rates, custom_explore_fn=clip, **common), rates


class Lines(tune.Callback):
    """Says on standard output how far a population is."""

    def __init__(self, title, stretches):
        self.title, self.stretches, self.done, self.start = title, stretches, 0, time.monotonic()

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.done += 1
        left = (self.stretches - self.done) * (time.monotonic() - self.start) / self.done
        say(f"{self.title}: {self.done} of {self.stretches} stretches, {tqdm.format_interval(left)} left")


def train_population(job, args):
    """Train the population that `job`, one of `benchmark.py`, stands for; its best member leaves a run folder.

    Returns what went wrong, "" if nothing did.
    """
    folder = job.population_folder
    timesteps = job.timesteps // args.population
    stretch = job.first_stretch(args)
    plan = {"script": job.script, "options": job.options, "env_id": job.env_id, "seed": job.seed, "cwd": os.getcwd()}
    plan["keep"] = ["--keep-replay"] if job.has_replay else []  # for the stretch after it
    plan |= {"gpus": args.gpus_per_run, "range": args.tuner_range}
    plan |= {"folder": str(folder), "moments": [*range(0, timesteps - stretch + 1, stretch)][: args.tuner_rounds]}
    plan["moments"].append(timesteps)
    scheduler, rates = make_scheduler(args.tuner, *args.tuner_range, job.seed)
    np.random.seed(job.seed)  # of the first rates
    shutil.rmtree(folder / "tune", ignore_errors=True)
    begun = {"command_line": list(job.options), "population": args.population}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", begun | {"tuner_range": args.tuner_range, "tuner_rounds": args.tuner_rounds})
    write_json(folder / "summary.json", {"status": "running"})  # report.py says so
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(train_member, plan=plan), {"cpu": 1, "gpu": args.gpus_per_run}),
        param_space=rates,
        tune_config=tune.TuneConfig(scheduler=scheduler, num_samples=args.population, reuse_actors=False),
        run_config=tune.RunConfig(
            storage_path=str(folder.resolve()),
            name="tune",
            verbose=0,
            callbacks=[Lines(job.title, args.population * (len(plan["moments"]) - 1))],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    with warnings.catch_warnings(action="ignore"):
        results = tuner.fit()
    if results.errors:
        return str(results.errors[0]).strip().splitlines()[-1]
    keep_best(job, args, Path(best_of(results).metrics["run"]), folder)
    return ""


def best_of(results):
    """The member that ended best."""
    return max(results, key=lambda result: result.metrics["score"])


def keep_best(job, args, run, folder):
    """Make `run` the run folder of the whole population, and take the others away."""
    config, summary = read_json(run / "config.json"), read_json(run / "summary.json")
    words = config["command_line"][len(job.options) :]
    rates = [float(words[i + 1]) for i, word in enumerate(words) if word == "--learning-rate"]
    changes = {"seed": job.seed, "lr_control": args.tuner, "run_dir": job.folder, "command_line": list(job.options)}
    changes |= {"learning_rate": None, "rates": config.get("rates", rates)}  # which were written if we were killed here
    changes |= {"population": args.population, "tuner_range": args.tuner_range, "tuner_rounds": args.tuner_rounds}
    changes |= {"stretches": len(job.stretches)}  # that were trained
    write_json(run / "config.json", config | changes)
    write_json(run / "summary.json", summary | {"seed": job.seed, "lr_control": args.tuner})
    for path in [*run.glob("checkpoint*.pt"), *run.glob("replay.bin")]:
        path.unlink()
    run.rename(Path(job.folder, f"{job.prefix}__{int(time.time())}"))
    shutil.rmtree(folder)
