"""What each learning rate does at each moment of a run, measured by branching it.

    python landscape.py runs/landscape --command "ppo_continuous_lrrl.py --env-id HalfCheetah-v5" --seeds 1 2

trains with a constant rate and keeps a checkpoint at each of `--moments`. From every checkpoint it goes on with each of
`--learning-rates` for `--length` timesteps, all else being as it was. It leaves `landscape.csv`, a row per branch;
`landscape.md`, the slope of the episodes' returns per 10,000 timesteps; and the same as `landscape.png`. Stopped at any
moment, it goes on when it is started again. Landscapes of hyper-parameters: Mohan et al., arXiv 2304.02396.
"""

import csv
import importlib
import itertools
import math
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro

from lrrl_utils.command_line import parse_args
from lrrl_utils.files import read_json, write_json, written_whole
from lrrl_utils.measures import read_csv
from lrrl_utils.ranges import Count, Rate, Seed
from lrrl_utils.state import capture
from lrrl_utils.terminal import reject, say

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ("env_id", "seed", "moment", "learning_rate", "branch_seed", "episodes", "slope", "standard_error")


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]  # where everything goes
    # the script that trains and its options; what sets the learning rate is not among them
    command: str = "ppo_continuous_lrrl.py"
    base_learning_rate: Rate = 3e-4  # the constant rate of the runs that are branched
    seeds: tuple[Seed, ...] = (1,)  # of the runs that are branched
    # when they are, in timesteps; in PPO, multiples of a rollout
    moments: tuple[Count, ...] = (51_200, 102_400, 153_600, 204_800, 256_000)
    learning_rates: tuple[Rate, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # those of the branches
    length: Count = 40_960  # timesteps of a branch
    branch_seeds: tuple[Seed, ...] = (1,)  # of the random numbers from there on
    workers: Count = 2  # branches trained side by side, each with a thread
    show_run: Path | None = None  # a run folder; the rates that its bandit drew are drawn into the figure


def train(args, *words):
    """Run the script with `words`, to its end."""
    script = shlex.split(args.command)[0]
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, words)]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if result.returncode not in (0, 3):  # a branch may diverge
        reject(f"{script}: {(result.stderr.strip() or 'has failed').splitlines()[-1]}")


def status_of(folder):
    try:
        return read_json(folder / "summary.json")["status"]
    except (OSError, ValueError, KeyError):
        return None


def step_of(folder):
    """The timestep of the last checkpoint in a run folder, 0 without one."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["run"]["global_step"] if path.exists() else 0


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
            words = ["--resume", resumable[0]]
        else:
            shutil.rmtree(parent, ignore_errors=True)
            words = [
                *shlex.split(args.command)[1:],
                "--seed",
                seed,
                "--run-dir",
                parent,
                "--checkpoint-interval",
                interval,
            ]
            words += ["--lr-control", "constant", "--learning-rate", args.base_learning_rate]
        if not resumable or step_of(resumable[0]) < moment:
            train(args, *words, "--total-timesteps", moment)
        (run,) = parent.glob("*/")
        if step_of(run) != moment:
            reject(f"--moments {moment}: the run has no checkpoint there; in PPO, take multiples of a rollout")
        snapshot.parent.mkdir(exist_ok=True)
        shutil.copytree(run, new := snapshot.with_suffix(".new"), dirs_exist_ok=True)
        new.rename(snapshot)
        say(f"seed {seed}: at {moment:,} timesteps")


def start_branch(snapshot, folder, learning_rate, branch_seed, seed):
    """Copy a snapshot and give the copy another rate and other random numbers, as if it always had had that rate."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(snapshot, folder)
    for name in ("checkpoint.prev.pt", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    config = read_json(folder / "config.json")
    config["learning_rate"] = learning_rate
    config["command_line"] += ["--learning-rate", str(learning_rate)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["run"]["identity"]["learning_rate"] = learning_rate
    key = (seed, branch_seed)
    checkpoint["state"]["rng"] = capture(np.random.default_rng(key))
    if "torch_rng" in checkpoint["state"]:
        torch_seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        checkpoint["state"]["torch_rng"] = torch.Generator().manual_seed(torch_seed).get_state()
    with written_whole(folder / "checkpoint.pt") as file:
        torch.save(checkpoint, file)
    write_json(folder / "config.json", config)


def slope_of(steps, returns):
    """The slope of a line through `returns` per 10,000 timesteps, and its standard error; NaN for want of episodes."""
    if len(steps) < 3:
        return math.nan, math.nan
    x = (steps - steps.mean()) / 1e4
    slope = x @ returns / (x @ x)
    residuals = returns - returns.mean() - slope * x
    return slope, math.sqrt(residuals @ residuals / (len(x) - 2) / (x @ x))


def measure_branch(args, seed, moment, learning_rate, branch_seed):
    """Train a branch, unless that was done; returns its row of the table."""
    folder = args.folder / "branches" / f"{seed}_{moment}_{learning_rate:g}_{branch_seed}"
    if status_of(folder) not in ("finished", "diverged") or read_json(folder / "summary.json")["global_step"] <= moment:
        start_branch(args.folder / "snapshots" / f"{seed}_{moment}", folder, learning_rate, branch_seed, seed)
        train(args, "--resume", folder, "--total-timesteps", moment + args.length)
        for name in ("checkpoint.pt", "checkpoint.prev.pt", "replay.bin"):
            (folder / name).unlink(missing_ok=True)
        say(f"seed {seed}, {moment:,} timesteps, learning rate {learning_rate:g}")
    episodes = read_csv(folder / "episodes.csv")
    later = episodes["global_step"] > moment
    steps, returns = episodes["global_step"][later], episodes["episodic_return"][later]
    env_id = read_json(folder / "config.json")["env_id"]
    return env_id, seed, moment, learning_rate, branch_seed, len(steps), *slope_of(steps, returns)


def mean_slopes(args, rows):
    """Means over branches, (rates, moments), and the half widths of their 95 % intervals from the branches' errors."""
    means, widths = (np.full((len(args.learning_rates), len(args.moments)), math.nan) for _ in range(2))
    for i, rate in enumerate(args.learning_rates):
        for j, moment in enumerate(args.moments):
            cells = [(row[6], row[7]) for row in rows if row[2:4] == (moment, rate) and math.isfinite(row[6])]
            if cells:
                slopes, errors = np.array(cells).T
                between = slopes.std(ddof=1) / math.sqrt(len(slopes)) if len(slopes) > 1 else 0.0
                means[i, j] = slopes.mean()
                widths[i, j] = 1.96 * max(between, math.sqrt((errors**2).sum()) / len(errors))
    return means, widths


def write_table(args, means, widths):
    heads = "".join(f" {rate:g} |" for rate in args.learning_rates)
    lines = [f"| branched at |{heads}", "|-|" + "-|" * len(args.learning_rates)]
    for j, moment in enumerate(args.moments):
        best = np.nanargmax(means[:, j]) if np.isfinite(means[:, j]).any() else None
        cells = [f"{mean:.3g} ± {width:.2g}" for mean, width in zip(means[:, j], widths[:, j])]
        cells = [f"**{cell}**" if i == best else cell for i, cell in enumerate(cells)]
        lines.append(f"| {moment:,} | {' | '.join(cells)} |")
    title = "Slope of the return per 10,000 timesteps, mean of the branches ± half of a 95 % interval.\n\n"
    (args.folder / "landscape.md").write_text(title + "\n".join(lines) + "\n")


def draw(args, means, widths, title):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    largest = np.nanmax(np.abs(means)) or 1.0
    x, y = np.arange(len(args.moments)), np.arange(len(args.learning_rates))
    image = axes.imshow(means, cmap="RdBu", vmin=-largest, vmax=largest, origin="lower", aspect="auto")
    for i, j in np.ndindex(means.shape):
        if math.isfinite(means[i, j]):
            strong = abs(means[i, j]) > 0.6 * largest
            text = f"{means[i, j]:.3g}\n±{widths[i, j]:.2g}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if strong else "black")
    if args.show_run:
        rounds = read_csv(args.show_run / "rounds.csv")
        at = np.interp(rounds["global_step"], args.moments, x, left=math.nan, right=math.nan)
        height = np.interp(np.log10(rounds["learning_rate"]), np.log10(args.learning_rates), y)
        axes.plot(at, height, "o-", color="black", markersize=3, linewidth=0.8, label="drawn in a run")
        axes.legend(fontsize="small", loc="upper right")
    axes.set_xticks(x, [f"{moment / 1000:g}k" for moment in args.moments])
    axes.set_yticks(y, [f"{rate:g}" for rate in args.learning_rates])
    axes.set(title=title, xlabel="branched at timestep", ylabel="learning rate from there on")
    figure.colorbar(image, label="slope of the return\nper 10,000 timesteps")
    figure.savefig(args.folder / "landscape.png", dpi=110)
    plt.close(figure)


def main(argv=None):
    args = parse_args(Args, argv)
    script, *options = shlex.split(args.command) or [""]
    if not (script.endswith("_lrrl.py") and Path(__file__).with_name(script).is_file()):
        reject(f"--command {args.command}: must begin with a training script beside this one")
    parse_args(importlib.import_module(script.removesuffix(".py")).Args, options)  # what is wrong is said at once
    args.moments, args.learning_rates = tuple(sorted(args.moments)), tuple(sorted(args.learning_rates))
    args.folder.mkdir(parents=True, exist_ok=True)
    grid = itertools.product([args], args.seeds, args.moments, args.learning_rates, args.branch_seeds)
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(make_snapshots, [args] * len(args.seeds), args.seeds))
        rows = list(pool.map(measure_branch, *zip(*grid)))
    with open(args.folder / "landscape.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
    means, widths = mean_slopes(args, rows)
    write_table(args, means, widths)
    draw(args, means, widths, rows[0][0])
    print((args.folder / "landscape.md").read_text())


if __name__ == "__main__":
    main()
