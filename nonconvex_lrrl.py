"""Gradient descent on six non-convex functions of two variables, its learning rate chosen by bandits (LRRL).

    python nonconvex_lrrl.py

compares every rate alone, every schedule and four bandits, with SGD and with Adam, from many starting points at once.
It prints a table and leaves `report.md`, `values.csv` and a figure per function in the run folder.

LRRL: Donâncio et al., "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach", arXiv 2410.12598. The
paper's six functions are not known to us; these are among the usual ones (https://www.sfu.ca/~ssurjano/optimization.html).
"""

import csv
import ctypes
import itertools
import json
import math
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from scipy.stats import rankdata

from lrrl_utils.command_line import check, parse_args
from lrrl_utils.ranges import Count, NonNegative, Positive, PositiveShare, Seed, Window
from lrrl_utils.rivals import make_bandit
from lrrl_utils.schedules import ArmSet, scheduled_rate
from lrrl_utils.scripts import reserve
from lrrl_utils.terminal import reject, reject_errors

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
BANDITS = ("peak", "prior", "lrrl", "uniform")


@dataclass
class Args:
    run_dir: str = "runs"  # parent of the folder `nonconvex` for tables and figures
    seed: Seed = 1  # the first seed
    num_seeds: Count = 10  # seeds, each with starting points and draws of its own
    num_starts: Count = 100  # starting points for each seed, uniform over a function's domain
    num_steps: Count = 500  # gradient steps of a life
    learning_rate: Positive = 1e-2  # the first rate of the schedules linear, exponential and cosine
    lr_decay_rate: NonNegative = 6e-3  # d of the exponential schedule, learning-rate × exp(−d t), t in gradient steps
    cyclic_half_period: Count = 50  # gradient steps of the cyclic schedule from the lowest arm to the highest
    # the bandits' arms, each also tried alone: rates, or some of these by name (all5, lowest3, middle3, …)
    learning_rates: tuple[Positive, ...] | ArmSet = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    bandit_interval: int = 10  # κ, gradient steps of a round
    bandit_step_size: Positive = 0.2  # α, the step size of the weights
    bandit_decay: PositiveShare = 0.9  # δ, the share of its weight that an arm keeps from round to round
    bandit_window: Window = 5  # j, the rounds that an improvement is measured against


@dataclass
class Objective:
    """A function of points (n, 2) to values (n,), its square domain, its minima, the value there."""

    function: object
    low: float
    high: float
    minima: tuple
    minimum: float = 0.0


def rosenbrock(p):
    x, y = p.unbind(-1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def ackley(p):
    radius = torch.linalg.vector_norm(p, dim=-1) / math.sqrt(2)  # its gradient at 0 is 0; that of a square root is NaN
    return 20 + math.e - 20 * torch.exp(-0.2 * radius) - torch.exp(torch.cos(2 * math.pi * p).mean(-1))


def rastrigin(p):
    return 20 + (p**2 - 10 * torch.cos(2 * math.pi * p)).sum(-1)


def himmelblau(p):
    x, y = p.unbind(-1)
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def beale(p):
    x, y = p.unbind(-1)
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def styblinski_tang(p):
    return (p**4 - 16 * p**2 + 5 * p).sum(-1) / 2


VALLEYS = ((3, 2), (-2.805118087, 3.131312518), (-3.779310253, -3.283185991), (3.584428340, -1.848126527))
OBJECTIVES = {
    "rosenbrock": Objective(rosenbrock, -2.048, 2.048, ((1, 1),)),
    "ackley": Objective(ackley, -5, 5, ((0, 0),)),
    "rastrigin": Objective(rastrigin, -5.12, 5.12, ((0, 0),)),
    "himmelblau": Objective(himmelblau, -5, 5, VALLEYS),
    "beale": Objective(beale, -4.5, 4.5, ((3, 0.5),)),
    "styblinski_tang": Objective(styblinski_tang, -5, 5, ((-2.903534028, -2.903534028),), -78.33233140754285),
}


def make_schedules(args):
    """{name: (num_steps,) rates} of the arms alone and of the schedules."""
    options = vars(args) | {"total_timesteps": args.num_steps}
    options |= {"cyclic_base_lr": min(args.learning_rates), "cyclic_max_lr": max(args.learning_rates)}
    rates = {f"constant {rate:g}": np.full(args.num_steps, rate) for rate in args.learning_rates}
    for control in ("linear", "exponential", "cosine", "cyclic"):
        schedule = SimpleNamespace(**options, lr_control=control)
        rates[control] = np.array([scheduled_rate(schedule, t) for t in range(args.num_steps)])
    return rates


def descend(args, objective, optimizer_class, starts, rates=None, bandits=None):
    """All lives at once: from `starts`, (n, 2), with the same `rates`, (num_steps,), or with a bandit for each life.

    A step that would leave the domain ends at its edge, so values stay finite whatever the rate. Where it would have
    left by more than the domain's width in the last tenth of the steps, the life counts as diverged.

    Returns:
        values (num_steps + 1, n), path (num_steps + 1, n, 2), diverged (n,) and, with bandits, the mean over lives of
        the probabilities that arms were drawn from, (rounds, K).
    """
    points = torch.tensor(starts, requires_grad=True)
    optimizer = optimizer_class([points], lr=1.0)  # its steps are scaled below: each life has a rate of its own
    width = objective.high - objective.low
    values, path, probabilities = [], [starts], []
    diverged = torch.zeros(len(starts), dtype=torch.bool)
    for t in range(args.num_steps + 1):
        values_now = objective.function(points)
        values.append(values_now.detach().numpy())
        if t == args.num_steps:
            break
        if bandits is None:
            rate = rates[t]
        elif t % args.bandit_interval == 0:
            for bandit, performance in zip(bandits, -values[t]):
                if t:
                    bandit.update(performance)
                else:
                    bandit.observe(performance)
                bandit.pull()
            probabilities.append(np.mean([bandit.drawn_from for bandit in bandits], axis=0))
            rate = torch.tensor([[bandit.learning_rate] for bandit in bandits], dtype=torch.float64)
        before = points.detach().clone()
        optimizer.zero_grad()
        values_now.sum().backward()
        optimizer.step()
        with torch.no_grad():
            points.copy_(before + rate * (points - before))
            if t >= 0.9 * args.num_steps:
                diverged |= ((points > objective.high + width) | (points < objective.low - width)).any(1)
            points.clamp_(objective.low, objective.high)
        path.append(points.detach().numpy().copy())
    return np.array(values), np.array(path), diverged.numpy(), np.array(probabilities)


def end_with_parent(parent):
    """Let Linux end this worker when the process `parent`, which started it, has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the program, too, which kills its workers
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it had gone before


def end_at_once(signum, frame):
    """End the program at Ctrl-C. Shutting the pool down would now and then wait for ever for killed workers."""
    for process in active_children():
        process.kill()
    os._exit(130)


def study(args, name):
    """The lives of every variant on a function, {optimizer: {variant: {"final": (lives,), "auc": (lives,), …}}}."""
    torch.set_num_threads(1)  # the other functions need the other cores
    objective, schedules = OBJECTIVES[name], make_schedules(args)
    options = {"step_size": args.bandit_step_size, "decay": args.bandit_decay, "window": args.bandit_window}
    seeds = range(args.seed, args.seed + args.num_seeds)
    uniform = np.concatenate([np.random.default_rng(seed).random((args.num_starts, 2)) for seed in seeds])
    starts = objective.low + (objective.high - objective.low) * uniform
    lives = {optimizer: {} for optimizer in OPTIMIZERS}
    for optimizer, variant in itertools.product(OPTIMIZERS, (*schedules, *BANDITS)):
        bandits = None
        if variant in BANDITS:
            keys = [(seed, i) for seed in seeds for i in range(args.num_starts)]
            bandits = [make_bandit(variant, args.learning_rates, **options, seed=key) for key in keys]
        rates = schedules.get(variant)
        values, path, diverged, probabilities = descend(args, objective, OPTIMIZERS[optimizer], starts, rates, bandits)
        gaps = values - objective.minimum
        life = {"final": gaps[-1], "auc": gaps.mean(0), "diverged": diverged.mean()}
        lives[optimizer][variant] = life | {"paths": path[:, :3].swapaxes(0, 1), "probabilities": probabilities}
    return lives


def plot(args, name, results, path):
    """A function's figure: for each optimizer, paths over contours, and the probabilities of every bandit's arms."""
    objective = OBJECTIVES[name]
    axis = np.linspace(objective.low, objective.high, 200)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    heights = objective.function(torch.from_numpy(grid)).numpy() - objective.minimum
    columns = 1 + len(BANDITS)
    figure, axes = plt.subplots(
        len(OPTIMIZERS), columns, figsize=(4.5 * columns, 4 * len(OPTIMIZERS)), layout="constrained", squeeze=False
    )
    figure.suptitle(name)
    for row, optimizer in zip(axes, OPTIMIZERS):
        lives = results[optimizer]
        row[0].contour(axis, axis, np.log1p(heights), levels=25, cmap="Greys", linewidths=0.5)
        best = min((v for v in lives if v.startswith("constant")), key=lambda v: np.median(lives[v]["final"]))
        for i, variant in reversed([*enumerate((best, *BANDITS))]):
            for life, points in enumerate(lives[variant]["paths"]):
                label = variant if life == 0 else None
                row[0].plot(*points.T, ".-", color=f"C{i}", markersize=2, linewidth=0.6, alpha=0.7, label=label)
        row[0].plot(*np.array(objective.minima, dtype=float).T, "*", color="black", markersize=9)
        row[0].set(title=f"{optimizer}, paths of three lives", xlim=axis[[0, -1]], ylim=axis[[0, -1]])
        row[0].legend(fontsize="small", loc="upper right")
        for panel, bandit in zip(row[1:], BANDITS):
            steps = args.bandit_interval * np.arange(len(lives[bandit]["probabilities"]))
            for rate, column in zip(args.learning_rates, lives[bandit]["probabilities"].T):
                panel.plot(steps, column, label=f"{rate:g}")
            panel.set(title=f"{optimizer}, {bandit}", xlabel="step", ylabel="probability, mean over lives", ylim=(0, 1))
            panel.legend(fontsize="small", title="learning rate")
    figure.savefig(path, dpi=70)
    plt.close(figure)


def quartiles(x):
    """Median and quartiles as text."""
    low, median, high = np.percentile(x, (25, 50, 75))
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


def make_report(results):
    """Markdown: a table of means over the functions, and one of values for each function."""
    variants = list(next(iter(results.values()))["sgd"])
    columns = {}
    for optimizer in OPTIMIZERS:
        for measure, title in (("final", "final value"), ("auc", "mean value")):
            medians = [[np.median(lives[optimizer][v][measure]) for v in variants] for lives in results.values()]
            # a millionth above the minimum is there, and the fourth digit is no difference
            seen = [[float(f"{max(median, 1e-6):.3g}") for median in row] for row in medians]
            columns[f"{optimizer}: {title}"] = [f"{rank:.1f}" for rank in rankdata(seen, axis=1).mean(0)]
        shares = [[lives[optimizer][v]["diverged"] for v in variants] for lives in results.values()]
        columns[f"{optimizer}: diverged"] = [f"{share:.0%}" for share in np.mean(shares, axis=0)]
    lines = ["Means over the functions: ranks of the medians, 1 is the lowest, and the share of lives diverged.", ""]
    lines += [f"| variant | {' | '.join(columns)} |", "|-|" + "-|" * len(columns)]
    for i, variant in enumerate(variants):
        lines.append(f"| {variant} | {' | '.join(column[i] for column in columns.values())} |")
    for name, lives in results.items():
        lines += ["", f"## {name}", "", "Values above the minimum: median [quartiles] over lives.", ""]
        lines += ["| optimizer | variant | final value | mean value over the steps | diverged |", "|-|-|-|-|-|"]
        for optimizer, variant in ((optimizer, variant) for optimizer in OPTIMIZERS for variant in variants):
            life = lives[optimizer][variant]
            cells = optimizer, variant, quartiles(life["final"]), quartiles(life["auc"]), f"{life['diverged']:.0%}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_args(Args, argv)
    check(args, f"[1, {args.num_steps}]", "bandit_interval")
    with reject_errors("--learning-rates"):
        make_bandit("uniform", args.learning_rates)
    if len(args.learning_rates) < 2:
        reject(f"--learning-rates {args.learning_rates[0]:g}: must be two rates or more")
    folder = Path(args.run_dir, "nonconvex")
    reserve("--run-dir", folder)

    results = {}
    signal.signal(signal.SIGINT, end_at_once)
    with ProcessPoolExecutor(initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        for name, lives in zip(OBJECTIVES, pool.map(study, itertools.repeat(args), OBJECTIVES)):
            results[name] = lives
            plot(args, name, lives, folder / f"{name}.png")
            print(f"{name} done", flush=True)

    report = make_report(results)
    print(report)
    (folder / "report.md").write_text(report)
    (folder / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    with open(folder / "values.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["function", "optimizer", "variant", "seed", "start", "final_value", "mean_value"])
        for name, lives in results.items():
            for optimizer, variants in lives.items():
                for variant, life in variants.items():
                    for i, (final, auc) in enumerate(zip(life["final"], life["auc"])):
                        seed, start = args.seed + i // args.num_starts, i % args.num_starts
                        writer.writerow([name, optimizer, variant, seed, start, f"{final:.6g}", f"{auc:.6g}"])


if __name__ == "__main__":
    main()
