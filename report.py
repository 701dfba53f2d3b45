"""Run folders in; a table and a figure of learning curves out.

    python report.py results/ppo_halfcheetah

prints one Markdown row per task and variant and writes `report.md` and `curves.png` into the folder. The interval is a
95 % stratified bootstrap interval of the interquartile mean over seeds (rliable; Agarwal et al., NeurIPS 2021).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from rliable import library, metrics
from scipy.stats import ttest_rel

from tracking import parse_args, read_csv, reject

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BOOTSTRAP_REPETITIONS = 10_000
CURVE_POINTS = 200
NO_OPTIONS = {  # entries of config.json that do not make runs different
    *("seed", "run_dir", "device", "versions", "git_commit", "cuda", "torch_deterministic", "compile"),
    *(
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
    *("bandit", "bandit_scope", "bandit_step_size", "bandit_decay", "bandit_window"),
}


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]
    """parent of the run folders"""
    baseline: str | None = None
    """a variant, as the table names it: adds a column of differences to it"""


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
            settings = ", ".join(f"{key} {run['config'].get(key)}" for key in keys)
            runs.setdefault((task, f"{name} ({settings})" if settings else name), []).append(run)
    for (task, name), group in runs.items():
        seeds = [run["config"]["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            reject(f"{folder}: holds a seed more than once for {task}, {name}: {seeds}")
    return runs


def interquartile_mean(values):
    """Interquartile mean of `values`, one per seed, and the two ends of its interval."""
    scores = {"": np.array(values, dtype=float)[:, None]}  # (seeds, tasks)
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


def make_table(runs, baseline=None):
    """A Markdown table of final returns and areas under the curve, with `baseline` also of differences to it."""
    columns = ["task", "variant", "seeds", "final return: IQM [95 %]", "of each seed", "AUC: IQM [95 %]"]
    columns += [f"final return minus {baseline}'s, seed by seed: mean [95 %]"] if baseline else []
    lines = [f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    for (task, name), group in runs.items():
        cells = [task, name, str(len(group))]
        for measure in ("final_return", "auc"):
            values = [run["summary"][measure] for run in group]
            point, low, high = interquartile_mean(values)
            cells.append(f"{show(point)} [{show(low)}, {show(high)}]")
            if measure == "final_return":
                cells.append(", ".join(show(value) for value in values))
        if baseline:
            cells.append(paired_difference(group, runs.get((task, baseline), [])))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_learning_curves(runs, path):
    """Mean return over seeds, each seed shown thinly; a panel per task. A return holds until the next episode ends."""
    tasks = sorted({task for task, _ in runs})
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for color, (name, group) in enumerate((name, group) for (t, name), group in runs.items() if t == task):
            first = max(run["episodes"]["global_step"][0] for run in group)
            last = min(run["summary"]["global_step"] for run in group)
            steps = np.linspace(first, last, CURVE_POINTS)
            curves = []
            for run in group:
                ends, returns = run["episodes"]["global_step"], run["episodes"]["episodic_return"]
                curves.append(returns[np.searchsorted(ends, steps, side="right") - 1])
                axis.plot(steps, curves[-1], color=f"C{color}", alpha=0.2, linewidth=0.7)
            axis.plot(steps, np.mean(curves, axis=0), color=f"C{color}", label=f"{name} ({len(group)} seeds)")
        axis.set(title=task, xlabel="timesteps", ylabel="episodic return")
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    args = parse_args(Args, argv)
    runs = read_runs(args.folder)
    if not runs:
        reject(f"FOLDER {args.folder}: must be a folder that holds run folders of finished runs")
    if args.baseline and args.baseline not in (names := sorted({name for _, name in runs})):
        reject(f"--baseline {args.baseline}: must be one of {', '.join(names)}")
    table = make_table(runs, args.baseline)
    print(table)
    (args.folder / "report.md").write_text(table + "\n")
    plot_learning_curves(runs, args.folder / "curves.png")


if __name__ == "__main__":
    main()
