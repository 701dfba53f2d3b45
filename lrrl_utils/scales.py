"""Returns on a scale that tasks share: the untrained policy has 0, the best constant rate has 1."""

import numpy as np

from lrrl_utils.runs import clean, options_of
from lrrl_utils.statistics import best_of
from lrrl_utils.terminal import reject
from lrrl_utils.variants import differing


def final_returns(group):
    """{seed: final return} of the runs of a variant."""
    return {run.config["seed"]: run.summary["final_return"] for run in group}


def tasks_of(variants):
    return sorted({task for task, _ in variants})


def names_of(variants):
    return list(dict.fromkeys(name for _, name in variants))


def first_update(run):
    """The timestep of the first update of a run."""
    starts, *rollout = (run.config.get(key) or 0 for key in ("learning_starts", "num_envs", "num_steps"))
    return starts or np.prod(rollout)


def has_constant_rate(run, ruinous):
    """Whether a run has a constant rate, and not the options of a run that diverged, `ruinous`: [`options_of`, …]."""
    return run.config["lr_control"] == "constant" and options_of(run.config) not in ruinous


def find_scale(task, groups, ruinous):
    """Mean return of the untrained policy on a task, and the highest mean final return of a constant rate.

    The former is the mean over the episodes that end before the first update, of all runs.
    """
    constants = [group for group in groups if has_constant_rate(group[0], ruinous)]
    if not constants:
        reject(f"--normalize: there is no run of {task} with --lr-control constant whose rate has not diverged")
    best = max(np.mean(list(final_returns(group).values())) for group in constants)
    untrained = []
    for run in (run for group in groups for run in group):
        before = run.episodes["global_step"] <= first_update(run)
        untrained += run.episodes["episodic_return"][before].tolist()
    if not untrained or np.mean(untrained) >= best:
        reject(f"--normalize: there is no constant rate of {task} that is better than the untrained policy")
    return np.mean(untrained), best


def find_scales(variants, ruinous=()):
    """{task: (return that is 0, return that is 1)}; `reject` a task without."""
    return {
        task: find_scale(task, [group for (of_task, _), group in variants.items() if of_task == task], ruinous)
        for task in tasks_of(variants)
    }


def pair_tasks(variants):
    """{variant: {seed: [its run on each task]}}: variants with runs on all tasks, with the seeds of all of them."""
    paired = {}
    for variant in names_of(variants):
        by_seed = [{run.config["seed"]: run for run in variants.get((t, variant), [])} for t in tasks_of(variants)]
        if all(by_seed):
            seeds = sorted(set.intersection(*map(set, by_seed)))
            paired[variant] = {seed: [of_task[seed] for of_task in by_seed] for seed in seeds}
    return paired


def find_unpaired(variants):
    """A line for each variant on all tasks with seeds that are not on all of them."""
    lines = []
    for name, by_seed in pair_tasks(variants).items():
        seeds = {run.config["seed"] for task in tasks_of(variants) for run in variants[task, name]}
        if unpaired := " ".join(map(str, sorted(seeds - by_seed.keys()))):
            lines.append(
                clean(f"{name}: seeds {unpaired} are not on all tasks, so no table over all of them has these")
            )
    return lines


def find_mixed_scales(variants):
    """A line for each task whose constant rates, the best of which has 1, differ in more than the rate."""
    lines = []
    for task in tasks_of(variants):
        groups = [group for (of_task, _), group in variants.items() if of_task == task]
        constants = [group[0] for group in groups if has_constant_rate(group[0], ())]
        if different := [key for key in differing(constants) if key != "learning_rate"]:
            lines.append(clean(f"{task}: its constant rates, whose best one has 1, differ in {', '.join(different)}"))
    return lines


def normalized_returns(variants, scales):
    """Final returns on the scales, {variant: {seed: (tasks,)}}, of what `pair_tasks` finds."""
    zeros, ones = np.array([scales[task] for task in tasks_of(variants)]).T
    returns = {}
    for variant, runs in pair_tasks(variants).items():
        scores = {seed: np.array([run.summary["final_return"] for run in of_seed]) for seed, of_seed in runs.items()}
        returns[variant] = {seed: (x - zeros) / (ones - zeros) for seed, x in scores.items()}
    return returns


def beside_sweep(returns, sweep):
    """The `returns` with those seeds alone that all constant rates of `sweep` have, of variants that have them all."""
    seeds = sorted(set.intersection(*(set(returns[name]) for name in sweep)))
    whole = {name: scores for name, scores in returns.items() if scores.keys() >= set(seeds)}
    return {name: {seed: scores[seed] for seed in seeds} for name, scores in whole.items()}


def what_a_sweep_brings(returns, sweep):
    """[(IQM, low, high), …] of trying 1, 2, … of the constant rates `sweep`, a run each; see `statistics.best_of`."""
    scores = [list(scores.values()) for name, scores in beside_sweep(returns, sweep).items() if name in sweep]
    return [best_of(scores, tried) for tried in range(1, len(sweep) + 1)]


def find_sweep(variants, returns, ruinous=()):
    """The constant rates of a study with at least two seeds on all tasks, none if there is but one.

    None either if their runs differ in more than the rate, or two not even in that. `returns` are those of
    `normalized_returns`.
    """
    firsts = {
        name: [variants[task, name][0] for task in tasks_of(variants)]
        for name, seeds in returns.items()
        if len(seeds) > 1
    }
    constants = [name for name, runs in firsts.items() if all(has_constant_rate(run, ruinous) for run in runs)]
    differences = {key for of_task in zip(*(firsts[name] for name in constants)) for key in differing(of_task)}
    rates = {firsts[name][0].config["learning_rate"] for name in constants}
    enough = len(constants) > 1 and len(set.intersection(*(set(returns[name]) for name in constants))) > 1
    return constants if enough and differences == {"learning_rate"} and len(rates) == len(constants) else []
