"""Estimates over seeds and tasks with 95 % bootstrap intervals, as in rliable (Agarwal et al., NeurIPS 2021).

The percentile bootstrap is stratified: it draws seeds anew for each task. All repetitions are made at once. One seed
tells nothing of chance: the ends of its interval are NaN.
"""

import itertools
import math

import numpy as np
from scipy.stats import t as student
from scipy.stats import trim_mean

REPETITIONS = 10_000
CURVE_REPETITIONS = 1_000  # of what has many points
CHOICES = 1_000  # of options that are tried


def interquartile_mean(scores, cut=0.25):
    """Interquartile mean of `scores`, (seeds,) or (seeds, tasks), and the two ends of its interval.

    `cut` is the share of the scores that is left out at either end; with 0 it is the plain mean.
    """
    scores = np.array(scores, dtype=float).reshape(len(scores), -1)
    seeds = np.random.RandomState(0).choice(len(scores), (REPETITIONS, *scores.shape))
    samples = scores[seeds, np.arange(scores.shape[1])].reshape(REPETITIONS, -1)
    low, high = np.percentile(trim_mean(samples, cut, axis=1), [2.5, 97.5]) if len(scores) > 1 else [np.nan] * 2
    return trim_mean(scores, cut, axis=None), low, high


def plain_mean(scores):
    """As `interquartile_mean`, but of all scores: the highest and the lowest runs count as well."""
    return interquartile_mean(scores, cut=0.0)


def interquartile_curve(curves):
    """Interquartile means of `curves`, (seeds, tasks, points), and both ends of their intervals: three of (points,)."""
    curves = np.array(curves, dtype=float)
    seeds, tasks, points = curves.shape
    drawn = np.random.RandomState(0).choice(seeds, (CURVE_REPETITIONS, seeds, tasks))
    samples = curves[drawn, np.arange(tasks)].reshape(CURVE_REPETITIONS, -1, points)
    low, high = np.percentile(trim_mean(samples, 0.25, axis=1), [2.5, 97.5], axis=0)
    if seeds == 1:
        low = high = np.full(points, np.nan)
    return trim_mean(curves.reshape(-1, points), 0.25, axis=0), low, high


def draw_counts(rng, seeds):
    """How often each of the seeds is drawn in each repetition, (repetitions, seeds)."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), CURVE_REPETITIONS)


def performance_profile(scores, thresholds):
    """The share of runs with a score above each threshold, and both ends of its interval: three of (thresholds,).

    `scores` is (seeds, tasks).
    """
    above = np.asarray(scores, dtype=float)[..., None] > thresholds  # (seeds, tasks, thresholds)
    rng = np.random.default_rng(0)
    shares = [draw_counts(rng, len(above)) @ of_task / len(above) for of_task in above.swapaxes(0, 1)]
    low, high = np.percentile(np.mean(shares, axis=0), [2.5, 97.5], axis=0)
    if len(above) == 1:
        low = high = np.full(len(low), np.nan)
    return above.mean(axis=(0, 1)), low, high


def probability_of_improvement(ours, theirs):
    """The probability that a run of ours scores higher than one of theirs, mean over tasks, and its interval's ends.

    Both are lists of the scores on each task, (seeds,). A draw counts for half.
    """
    rng = np.random.default_rng(0)
    points, samples = [], []
    for x, y in zip(ours, theirs):
        wins = (np.subtract.outer(x, y) > 0) + 0.5 * (np.subtract.outer(x, y) == 0)
        points.append(wins.mean())
        samples.append(((draw_counts(rng, len(x)) @ wins) * draw_counts(rng, len(y))).sum(axis=1) / wins.size)
    has_interval = all(len(scores) > 1 for scores in [*ours, *theirs])
    low, high = np.percentile(np.mean(samples, axis=0), [2.5, 97.5]) if has_interval else [np.nan] * 2
    return np.mean(points), low, high


def paired_mean(ours, theirs):
    """Mean of the differences of pairs, and the two ends of its 95 % interval of Student's t."""
    differences = np.subtract(ours, theirs)
    mean, n = np.mean(differences), len(differences)
    width = student.ppf(0.975, n - 1) * np.std(differences, ddof=1) / np.sqrt(n)
    return mean, mean - width, mean + width


def best_of(scores, tried):
    """What it brings to try so many of some options with a run each and to keep the best: its IQM and interval.

    `scores` is (options, seeds, tasks), with two seeds or more. The option whose run with a seed scores highest counts
    for its runs with other seeds, because the highest of some scores owes part of its height to chance. A mean over all
    choices of `tried` options, or over a thousand of them. Where the bootstrap draws one seed only, all others choose.
    """
    scores = np.array(scores, dtype=float)
    options, seeds, tasks = scores.shape
    rng = np.random.default_rng(0)
    counts = np.stack([draw_counts(rng, seeds) for _ in range(tasks)], axis=2)  # (repetitions, seeds, tasks)
    counts[0] = 1  # the scores as they are
    others = 1 - np.eye(seeds)[:, :, None]
    choosers = counts[:, None] * others  # (repetitions, seeds that count, seeds that choose, tasks)
    choosers = np.where(choosers.any(axis=2, keepdims=True), choosers, others)
    weights = counts[:, :, None] * choosers / choosers.sum(axis=2, keepdims=True)
    brought = []
    for choice in draw_choices(options, tried):
        best = scores[choice].argmax(axis=0)[None, None]
        of_best = np.take_along_axis(scores[choice][:, :, None], best, axis=0)[0]  # (seeds, seeds that choose, tasks)
        brought.append(weighted_interquartile_means(of_best.ravel(), weights.reshape(len(weights), -1)))
    estimates = np.mean(brought, axis=0)
    return estimates[0], *np.percentile(estimates, [2.5, 97.5])


def draw_choices(options, tried):
    """Choices of `tried` of some options, each a list of indices: all of them, or some at random if they are many."""
    if math.comb(options, tried) <= CHOICES:
        return map(list, itertools.combinations(range(options), tried))
    rng = np.random.default_rng(0)
    return [rng.choice(options, tried, replace=False) for _ in range(CHOICES)]


def weighted_interquartile_means(values, weights):
    """Interquartile means of `values`, (n,), for each row of `weights`, (rows, n), which add up to a number of runs."""
    order = np.argsort(values)
    ends = np.cumsum(weights[:, order], axis=1)
    runs = round(ends[0, -1])
    kept = np.diff(np.clip(ends, runs // 4, runs - runs // 4), axis=1, prepend=runs // 4)
    return kept @ values[order] / kept.sum(axis=1)
