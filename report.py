"""Run folders in; a table and a figure of learning curves out.

    python report.py results/ppo_halfcheetah

prints one Markdown row per task and variant and writes `report.md` and `curves.png` into the folder. The interval is a
95 % stratified bootstrap interval of the interquartile mean over seeds (rliable; Agarwal et al., NeurIPS 2021).

    python report.py results/ppo_bandits --normalize --baseline uniform lrrl

adds the differences to two variants, seed by seed, and a table over all tasks.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from command_line import parse_args, reject
from rliable import library, metrics
from scipy.stats import ttest_rel
from tracking import read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

BOOTSTRAP_REPETITIONS = 10_000
CURVE_POINTS = 60
NO_OPTIONS = {  # entries of config.json that do not make runs different
    *("seed", "run_dir", "device", "versions", "git_commit", "cuda", "torch_deterministic", "compile"),
    *(
        "rollouts_per_round",
        "command_line",
        "resume",
        "checkpoint_interval",
        "buffer_device",
        "replay_device",
        "eval_e",
        "track",
        "wandb_project_name",
        "wandb_entity",
        "capture_video",
        "save_model",
        "eval_episodes",
    ),
}
CONTROL_OPTIONS = {  # those that make variants of different names different, and mean nothing to some of them
    *("lr_control", "learning_rate", "learning_rates", "lr_decay_rate", "target_kl"),
    *("cyclic_base_lr", "cyclic_max_lr", "cyclic_half_period"),
    *("bandit", "bandit_scope", "bandit_step_size", "bandit_decay", "bandit_window", "bandit_interval"),
    *("bandit_feedback", "lr_range", "rollback"),
}


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]
    """parent of the run folders"""
    baseline: tuple[str, ...] = ()
    """variants, as the table names them: adds a column of differences to each"""
    normalize: bool = False
    """adds a table over all tasks, on a scale where the untrained policy has 0 and the best constant rate 1"""


def read_runs(folder):
    """The finished runs below `folder` as {(task, variant): [run, …]}, in the order of their seeds.

    A variant is named after what sets the learning rate and after the options in which its runs differ from others.
    """
    groups, runs = {}, {}
    for path in sorted(folder.glob("*/summary.json")):
        summary, config = (json.loads((path.parent / name).read_text()) for name in ("summary.json", "config.json"))
        if summary["status"] != "finished" or summary["final_return"] is None:
            reason = "no episode has ended" if summary["status"] == "finished" else summary["status"]
            print(f"left out: {path.parent} ({reason})", file=sys.stderr)
            continue
        control = config["lr_control"]
        fixed = control if control == "cyclic" else f"{control} {config['learning_rate']:g}"
        name = config["bandit"] if control == "bandit" else fixed
        run = {"config": config, "summary": summary, "episodes": read_csv(path.parent / "episodes.csv")}
        groups.setdefault((config["env_id"], name), []).append(run)

    def differing(some_runs):
        options = [{key: x for key, x in run["config"].items() if key not in NO_OPTIONS} for run in some_runs]
        keys = dict.fromkeys(key for these in options for key in these)
        return [key for key in keys if any(these.get(key) != options[0].get(key) for these in options)]

    for (task, name), group in sorted(groups.items(), key=lambda item: item[0]):
        rivals = [run for (other, _), runs_of_it in groups.items() if other == task for run in runs_of_it]
        keys = dict.fromkeys(differing(group) + [key for key in differing(rivals) if key not in CONTROL_OPTIONS])
        for run in sorted(group, key=lambda run: run["config"]["seed"]):
            values = {key: run["config"].get(key) for key in keys}
            values |= {key: " ".join(map("{:g}".format, x)) for key, x in values.items() if isinstance(x, list)}
            settings = ", ".join(f"{key} {x}" for key, x in values.items())
            runs.setdefault((task, f"{name} ({settings})" if settings else name), []).append(run)
    for (task, name), group in runs.items():
        seeds = [run["config"]["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            reject(f"{folder}: holds a seed more than once for {task}, {name}: {seeds}")
    return runs


def interquartile_mean(scores):
    """Interquartile mean of `scores`, (seeds,) or (seeds, tasks), and the two ends of its interval."""
    scores = {"": np.array(scores, dtype=float).reshape(len(scores), -1)}
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever random_state it is given
    mean, interval = library.get_interval_estimates(
        scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=BOOTSTRAP_REPETITIONS
    )
    return mean[""][0], *interval[""][:, 0]


def show(x):
    """At least three digits of a return."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def paired_difference(group, baseline):
    """Final returns minus those of the same seeds in `baseline`: mean and 95 % interval of Student's t, as text."""
    a, b = ({run["config"]["seed"]: run["summary"]["final_return"] for run in runs} for runs in (group, baseline))
    seeds = sorted(a.keys() & b.keys())
    if group is baseline or len(seeds) < 2:
        return ""
    ours, theirs = np.array([(a[seed], b[seed]) for seed in seeds]).T
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    return f"{show(np.mean(ours - theirs))} [{show(low)}, {show(high)}], {len(seeds)} pairs"


def make_table(runs, baselines=()):
    """A Markdown table of final returns and areas under the curve, and of the differences to `baselines`."""
    columns = ["task", "variant", "seeds", "final return: IQM [95 %]", "of each seed", "AUC: IQM [95 %]"]
    columns += [f"final return minus {baseline}'s, seed by seed: mean [95 %]" for baseline in baselines]
    lines = [f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    for (task, name), group in runs.items():
        cells = [task, name, str(len(group))]
        for measure in ("final_return", "auc"):
            values = [run["summary"][measure] for run in group]
            point, low, high = interquartile_mean(values)
            cells.append(f"{show(point)} [{show(low)}, {show(high)}]")
            if measure == "final_return":
                cells.append(", ".join(show(value) for value in values))
        cells += [paired_difference(group, runs.get((task, baseline), [])) for baseline in baselines]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def normalized_returns(runs):
    """Final returns where the untrained policy has 0 and the best constant rate 1, {variant: {seed: (tasks,)}}.

    The untrained policy's return is the mean over the episodes that end before the first update, of all runs of a task;
    the best constant rate is the one with the highest mean final return on it. Only variants with runs on all tasks
    are there, with the seeds that they have on all of them.
    """
    scales, returns = {}, {}
    for task in (tasks := sorted({task for task, _ in runs})):
        groups = [group for (t, _), group in runs.items() if t == task]
        constants = [group for group in groups if group[0]["config"]["lr_control"] == "constant"]
        if not constants:
            reject(f"--normalize: there is no run of {task} with --lr-control constant")
        means = [np.mean([run["summary"]["final_return"] for run in group]) for group in constants]
        untrained = []
        for run in (run for group in groups for run in group):
            config = run["config"]
            first_update = config.get("learning_starts") or config["num_envs"] * config["num_steps"]
            before = run["episodes"]["global_step"] <= first_update
            untrained += run["episodes"]["episodic_return"][before].tolist()
        scales[task] = np.mean(untrained), max(means)
    for variant in dict.fromkeys(name for _, name in runs):
        if all((task, variant) in runs for task in tasks):
            finals = [
                {run["config"]["seed"]: run["summary"]["final_return"] for run in runs[t, variant]} for t in tasks
            ]
            seeds = sorted(set.intersection(*(set(of_task) for of_task in finals)))
            zeros, ones = np.array([scales[task] for task in tasks]).T
            scores = np.array([[of_task[seed] for of_task in finals] for seed in seeds]).reshape(-1, len(tasks))
            returns[variant] = dict(zip(seeds, (scores - zeros) / (ones - zeros)))
    return returns


def make_normalized_table(runs, baselines=()):
    """A Markdown table over all tasks: interquartile means of normalised final returns and of paired differences."""
    returns = normalized_returns(runs)
    columns = ["over all tasks", "seeds", "normalised final return: IQM [95 %]"]
    columns += [f"minus {baseline}'s, pair by pair: IQM [95 %]" for baseline in baselines]
    lines = [f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    for variant, scores in returns.items():
        cells = [variant, str(len(scores))]
        for baseline in (None, *baselines):
            others = returns.get(baseline, {})
            seeds = [seed for seed in scores if baseline is None or (seed in others and variant != baseline)]
            differences = [scores[seed] - others.get(seed, 0.0) for seed in seeds]
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*interquartile_mean(differences)) if seeds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_learning_curves(runs, path):
    """Mean return over seeds, each seed shown thinly; a panel per task.

    A point is the mean over a stretch of timesteps, in which a return holds until the next episode ends.
    """
    tasks, names = sorted({task for task, _ in runs}), list(dict.fromkeys(name for _, name in runs))
    size = (max(5.5 * len(tasks), 7), 4 + 0.2 * len(names) / len(tasks))
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    lines = {}
    for axis, task in zip(axes[0], tasks):
        for name, group in ((name, group) for (t, name), group in runs.items() if t == task):
            color = names.index(name)  # the same in every panel
            first = max(run["episodes"]["global_step"][0] for run in group)
            last = min(run["summary"]["global_step"] for run in group)
            edges = np.linspace(first, last, CURVE_POINTS + 1)
            steps = (edges[:-1] + edges[1:]) / 2
            curves = []
            for run in group:
                ends, returns = run["episodes"]["global_step"], run["episodes"]["episodic_return"]
                until = np.append(ends, max(last, ends[-1]))
                integral = np.append(0, np.cumsum(returns * np.diff(until)))
                curves.append(np.diff(np.interp(edges, until, integral)) / np.diff(edges))
                axis.plot(steps, curves[-1], color=f"C{color}", alpha=0.2, linewidth=0.7)
            lines[f"{name}, {len(group)} seeds"] = axis.plot(steps, np.mean(curves, axis=0), color=f"C{color}")[0]
        axis.set(title=task, xlabel="timesteps", ylabel="episodic return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(lines.values(), lines, loc="outside lower left", ncols=len(tasks), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    args = parse_args(Args, argv)
    runs = read_runs(args.folder)
    if not runs:
        reject(f"FOLDER {args.folder}: must be a folder that holds run folders of finished runs")
    for baseline in args.baseline:
        if baseline not in (names := sorted({name for _, name in runs})):
            reject(f"--baseline {baseline}: must be one of {', '.join(names)}")
    table = make_table(runs, args.baseline)
    if args.normalize:
        table += "\n\n" + make_normalized_table(runs, args.baseline)
    print(table)
    (args.folder / "report.md").write_text(table + "\n")
    plot_learning_curves(runs, args.folder / "curves.png")


if __name__ == "__main__":
    main()
