"""What each learning rate does at each moment of a run, measured by branching it.

    python landscape.py runs/landscape --command "ppo_continuous_lrrl.py --compile --env-id HalfCheetah-v5" --seeds 1 2

trains with a constant rate and keeps a checkpoint at each of `--moments`. From every checkpoint it goes on with each of
`--learning-rates` for `--length` timesteps, all else being as it was. The gain of a branch is how much higher its
episodes' returns are in its second half than in the half a length before it, per 10,000 timesteps. It leaves
`landscape.csv`, a row per branch; `landscape.md`, the mean gains; and the same as `landscape.png`. Stopped at any
moment, it goes on when it is started again; seeds and rates may be added then. Landscapes of hyper-parameters: Mohan et
al., arXiv 2304.02396.
"""

import csv
import itertools
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from scipy.stats import t as student

from lrrl_utils import scripts
from lrrl_utils.command_line import parse_args
from lrrl_utils.files import read_json, write_json
from lrrl_utils.measures import read_csv
from lrrl_utils.ranges import Count, Rate, Seed
from lrrl_utils.scripts import (
    DIVERGED,
    has_ended_beyond,
    last_line,
    reserve,
    split_command,
    start_branch,
    status_of,
    step_of,
    try_out,
)
from lrrl_utils.terminal import reject, say

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIXED = ("command", "base_learning_rate", "moments", "length")  # what a folder was begun with
SET_HERE = {"lr_control", "learning_rate", "learning_rates", "lr_range", "bandit", "seed", "run_dir", "total_timesteps"}
SET_HERE |= {"checkpoint_interval", "keep_replay", "resume"}


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]  # where everything goes
    # the script that trains and its options; what sets the learning rate is not among them
    command: str = "ppo_continuous_lrrl.py --compile"
    base_learning_rate: Rate = 3e-4  # the constant rate of the runs that are branched
    seeds: tuple[Seed, ...] = (1,)  # of the runs that are branched
    # when they are, in timesteps; multiples of a rollout
    moments: tuple[Count, ...] = (51_200, 102_400, 153_600, 204_800, 256_000)
    learning_rates: tuple[Rate, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # those of the branches
    length: Count = 40_960  # timesteps of a branch
    branch_seeds: tuple[Seed, ...] = (1,)  # of the random numbers from there on
    workers: Count = 2  # branches trained side by side, each with a thread
    show_run: Path | None = None  # a run folder; the rates that its bandit drew are drawn into the figure


def train(args, name, *words, may_diverge=False):
    """Run the script with `words`, to its end; what it says goes to `logs/<name>.txt`."""
    script, _ = split_command(args.command, SET_HERE)
    log = args.folder / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    code = scripts.train(script, words, log)
    if code > 128:
        raise KeyboardInterrupt  # as for us, so for those that we have started
    if code and not (code == DIVERGED and may_diverge):
        reject(f"{script}: exit code {code}, {last_line(log)} (see {log})")


def make_snapshots(args, seed):
    """Train the run of a seed; copies of its folder at each of the moments are kept as `snapshots/<seed>_<moment>`."""
    parent = args.folder / "parents" / str(seed)
    interval = math.gcd(*args.moments)
    for moment in sorted(args.moments):
        snapshot = args.folder / "snapshots" / f"{seed}_{moment}"
        if snapshot.exists():
            continue
        resumable = [run for run in parent.glob("*/") if step_of(run)]
        if resumable:
            words = ["--resume", resumable[0], "--env-id", args.env_id]
        else:
            shutil.rmtree(parent, ignore_errors=True)
            script, words = split_command(args.command, SET_HERE)
            words += ["--seed", seed, "--run-dir", parent, "--checkpoint-interval", interval]
            words += ["--lr-control", "constant", "--learning-rate", args.base_learning_rate]
            words += ["--keep-replay"] if args.has_replay else []
        if not resumable or step_of(resumable[0]) < moment:
            train(args, seed, *words, "--total-timesteps", moment)
        (run,) = parent.glob("*/")
        if step_of(run) != moment:
            reject(f"--moments {moment}: {run} has no checkpoint there")
        snapshot.parent.mkdir(exist_ok=True)
        shutil.copytree(run, new := snapshot.with_suffix(".new"), dirs_exist_ok=True)
        new.rename(snapshot)
        say(f"seed {seed}: at {moment:,} timesteps")


def gain_of(before, after, length):
    """How much higher the returns `after` are than those `before`, and the error of that; NaN for want of episodes.

    Per 10,000 timesteps, where `length` timesteps lie between the two.
    """
    if min(len(before), len(after)) < 2:
        return math.nan, math.nan
    error = math.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return (after.mean() - before.mean()) * 1e4 / length, error * 1e4 / length


def measure_branch(args, seed, moment, learning_rate, branch_seed):
    """Train a branch, unless that was done; returns its row of the table, a dict."""
    folder = args.folder / "branches" / f"{seed}_{moment}_{learning_rate:g}_{branch_seed}"
    if not has_ended_beyond(folder, moment):
        snapshot = args.folder / "snapshots" / f"{seed}_{moment}"
        start_branch(snapshot, folder, learning_rate, (seed, moment, branch_seed))
        words = ["--resume", folder, "--env-id", args.env_id, "--total-timesteps", moment + args.length]
        train(args, folder.name, *words, may_diverge=True)
        for name in ("checkpoint.pt", "checkpoint.prev.pt", "replay.bin"):
            (folder / name).unlink(missing_ok=True)
        say(f"seed {seed}, {moment:,} timesteps, learning rate {learning_rate:g}: {status_of(folder)}")
    config, episodes = read_json(folder / "config.json"), read_csv(folder / "episodes.csv")
    steps, returns = episodes["global_step"], episodes["episodic_return"]
    before = returns[(steps > moment - args.length // 2) & (steps <= moment)]
    after = returns[steps > moment + args.length // 2]
    gain, error = gain_of(before, after, args.length)
    row = {"env_id": config["env_id"], "seed": seed, "moment": moment, "learning_rate": learning_rate}
    row |= {"branch_seed": branch_seed, "status": status_of(folder), "episodes_before": len(before)}
    return row | {"episodes_after": len(after), "gain": gain, "standard_error": error}


def mean_gain(rows):
    """The mean gain of some branches and half the width of its 95 % interval.

    It is -inf if one has diverged, NaN if there were too few episodes. With three seeds or more, the interval is
    Student's between the means of the seeds. With fewer, it tells what chance is in the returns, or how far two seeds
    are apart if that is more; branches of a seed, which share the returns before them, count as one.
    """
    if any(row["status"] == "diverged" for row in rows):
        return -math.inf, math.nan
    if any(math.isnan(row["gain"]) for row in rows):
        return math.nan, math.nan
    seeds = sorted({row["seed"] for row in rows})
    means = [np.mean([row["gain"] for row in rows if row["seed"] == seed]) for seed in seeds]
    if len(means) > 2:
        width = student.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / math.sqrt(len(means))
    else:
        variances = [np.mean([row["standard_error"] ** 2 for row in rows if row["seed"] == seed]) for seed in seeds]
        width = 1.96 * max(math.sqrt(sum(variances)) / len(seeds), np.ptp(means) / 2)
    return np.mean(means), width


def text_of(mean, width, between):
    """A cell of table and figure; `–` where there were too few episodes."""
    if math.isfinite(mean):
        return f"{float(f'{mean:.3g}'):,.12g}{between}{float(f'{width:.2g}'):,.12g}"  # three digits, two, no exponents
    return "–" if math.isnan(mean) else "diverged"


def write_table(args, means, widths):
    heads = "".join(f" {rate:g} |" for rate in args.learning_rates)
    lines = [f"| branched at |{heads}", "|-|" + "-|" * len(args.learning_rates)]
    for j, moment in enumerate(args.moments):
        best = np.nanargmax(means[:, j]) if np.isfinite(means[:, j]).any() else None
        cells = [text_of(mean, width, " ± ") for mean, width in zip(means[:, j], widths[:, j])]
        cells = [f"**{cell}**" if i == best else cell for i, cell in enumerate(cells)]
        lines.append(f"| {moment:,} | {' | '.join(cells)} |")
    title = "Gain of the return per 10,000 timesteps, mean of the branches ± half of a 95 % interval.\n\n"
    (args.folder / "landscape.md").write_text(title + "\n".join(lines) + "\n")


def draw(args, means, widths, title):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    gains = means[np.isfinite(means)]
    largest = np.max(gains, initial=0.0) or np.max(-gains, initial=0.0) or 1.0  # losses beyond it are as dark
    x, y = np.arange(len(args.moments)), np.arange(len(args.learning_rates))
    axes.set_facecolor("lightgrey")  # where there is no gain
    shown = np.where(np.isfinite(means), means, math.nan)
    image = axes.imshow(shown, cmap="RdBu", vmin=-largest, vmax=largest, origin="lower", aspect="auto")
    for i, j in np.ndindex(means.shape):
        is_dark = abs(means[i, j]) > 0.6 * largest
        color = "white" if is_dark and math.isfinite(means[i, j]) else "black"
        text = text_of(means[i, j], widths[i, j], "\n±")
        axes.text(j, i + 0.24, text, ha="center", va="center", fontsize=7, color=color)  # a run's rates go below it
    if args.show_run:
        rounds = read_csv(args.show_run / "rounds.csv")
        controllers = rounds.get("controller", np.full(len(rounds["global_step"]), ""))
        for controller in np.unique(controllers):
            ends, rates = (rounds[column][controllers == controller] for column in ("global_step", "learning_rate"))
            middles = (ends + np.append(0, ends[:-1])) / 2
            at = np.interp(middles, args.moments, x, left=math.nan, right=math.nan)
            log_rates = np.log10(args.learning_rates)
            height = np.interp(np.log10(rates), log_rates, y, left=math.nan, right=math.nan)
            axes.plot(at, height, "o-", color="black", markersize=3, linewidth=0.8)
        title += " (line: the rates that a run drew)"
    axes.set_xticks(x, [f"{moment / 1000:g}k" for moment in args.moments])
    axes.set_yticks(y, [f"{rate:g}" for rate in args.learning_rates])
    axes.set(title=title, xlabel="branched at timestep", ylabel="learning rate from there on")
    extend = "min" if np.min(gains, initial=0.0) < -largest else "neither"
    figure.colorbar(image, label="gain of the return\nper 10,000 timesteps", extend=extend)
    figure.savefig(args.folder / "landscape.png", dpi=110)
    plt.close(figure)


def make_landscape(args):
    """Train what is missing, then write table and figure."""
    begun, now = args.folder / "landscape.json", {name: getattr(args, name) for name in FIXED}
    if not begun.exists():
        write_json(begun, now)
    for name, value in read_json(begun).items():
        if value != (list(now[name]) if isinstance(now[name], tuple) else now[name]):
            reject(f"--{name.replace('_', '-')}: {args.folder} was begun with {value}; take another folder")
    grid = list(itertools.product([args], args.seeds, args.moments, args.learning_rates, args.branch_seeds))
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(make_snapshots, [args] * len(args.seeds), args.seeds))
        rows = list(pool.map(lambda job: measure_branch(*job), grid))
    with open(args.folder / "landscape.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows)
    cells = itertools.product(args.learning_rates, args.moments)
    found = [mean_gain([row for row in rows if (row["learning_rate"], row["moment"]) == cell]) for cell in cells]
    means, widths = np.array(found).reshape(len(args.learning_rates), len(args.moments), 2).transpose(2, 0, 1)
    write_table(args, means, widths)
    draw(args, means, widths, rows[0]["env_id"])
    print((args.folder / "landscape.md").read_text())


def main(argv=None):
    try:
        carry_out(parse_args(Args, argv))
    except KeyboardInterrupt:
        say("stopped; the same command goes on", "stderr")
        raise SystemExit(130) from None


def carry_out(args):
    script, options = split_command(args.command, SET_HERE)
    options += ["--lr-control", "constant", "--learning-rate", str(args.base_learning_rate)]
    ((theirs, refused),) = try_out([(script, [*options, "--total-timesteps", str(min(args.moments))])])
    if refused:
        reject(f"--command {args.command}: {refused}")
    if theirs.get("exploration_fraction") is not None:
        reject(f"--command {args.command}: ε must not depend on the length of a run; give --exploration-steps instead")
    args.env_id, args.has_replay = theirs["env_id"], "keep_replay" in theirs
    rollout = theirs.get("num_envs", 1) * theirs.get("num_steps", 1)
    for option, timesteps in (("length", args.length), *(("moments", moment) for moment in args.moments)):
        if timesteps % rollout:
            reject(f"--{option} {timesteps}: must be a multiple of a rollout, which has {rollout} timesteps")
    if min(args.moments) < args.length // 2:
        reject(f"--moments {min(args.moments)}: must be half of --length or more, for the returns before it are needed")
    if args.show_run and not (args.show_run / "rounds.csv").is_file():
        reject(f"--show-run {args.show_run}: must be a run folder")
    for name in ("seeds", "moments", "learning_rates", "branch_seeds"):
        setattr(args, name, tuple(sorted(set(getattr(args, name)))))
    descriptor = reserve("FOLDER", args.folder)
    try:
        make_landscape(args)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
