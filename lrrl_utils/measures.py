"""Numbers that a run is told by, and the CSV files that they come from."""

import csv
import math

import numpy as np

from lrrl_utils.files import open_regular


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


def shown_rate(learning_rate):
    """A learning rate with the digits that a float32 has."""
    return float(f"{np.float32(float(learning_rate)):.7g}")


def read_csv(path):
    """A CSV file as {column: (rows,) array} of floats, NaN where a field is empty; "controller" is one of strings."""
    with open(open_regular(path), newline="") as file:
        names, *rows = csv.reader(file)
    columns = zip(names, zip(*rows) if rows else [()] * len(names))
    return {n: np.array(fields if n == "controller" else [float(x or "nan") for x in fields]) for n, fields in columns}
