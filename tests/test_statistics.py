"""Bands, profiles and probabilities are those of rliable; curves are means over time."""

import numpy as np
import pytest
from rliable import library, metrics
from scipy.stats import trim_mean

from lrrl_utils import statistics
from lrrl_utils.figures import mean_returns, share_of_rates
from lrrl_utils.runs import Run
from lrrl_utils.statistics import (
    best_of,
    draw_choices,
    interquartile_curve,
    interquartile_mean,
    performance_profile,
    plain_mean,
    probability_of_improvement,
    weighted_interquartile_means,
)
from lrrl_utils.tables import show_interval

RNG = np.random.default_rng(0)
SCORES = RNG.normal(0.5, 0.3, (6, 3))
RIVALS = RNG.normal(0.4, 0.3, (4, 3)).round(1)


def test_the_interval_covers_the_point_and_repeats():
    values = np.random.default_rng(0).normal(100, 10, 12)
    point, low, high = interquartile_mean(values)
    assert values.min() < low < point < high < values.max()
    assert interquartile_mean(values) == (point, low, high)


def test_estimates_are_those_of_rliable():
    scores = np.random.default_rng(0).normal(100, 10, (5, 3))
    np.random.seed(0)
    theirs = library.get_interval_estimates({"": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=10_000)
    np.testing.assert_allclose(interquartile_mean(scores), [theirs[0][""][0], *theirs[1][""][:, 0]], rtol=1e-9)
    np.random.seed(0)
    theirs = library.get_interval_estimates({"": scores}, lambda x: np.array([metrics.aggregate_mean(x)]), reps=10_000)
    np.testing.assert_allclose(plain_mean(scores), [theirs[0][""][0], *theirs[1][""][:, 0]], rtol=1e-9)


def test_the_best_of_some_options_is_kept_and_counts_for_its_other_seeds():
    levels = np.broadcast_to(np.array([1.0, 2.0, 3.0])[:, None, None], (3, 5, 2))
    for tried, expected in ((1, 2), (2, (2 + 3 + 3) / 3), (3, 3)):
        assert best_of(levels, tried) == pytest.approx([expected] * 3)
    lucky = [[[0.0], [10.0]], [[5.0], [5.0]]]  # with the second seed, the first option looks best, and has 0 else
    assert best_of(lucky, 2) == (5 / 2, 0, 5)  # the ends are those of two seeds: both are one of them
    skewed = np.broadcast_to(np.array([1.0, 1, 1, 1, -5])[:, None], (3, 5, 1))
    assert best_of(skewed, 1)[0] == interquartile_mean(skewed[0])[0] == 1  # as of a run that is no sweep


def test_one_seed_has_no_interval():
    improvement = probability_of_improvement([[3.0, 2.0], [4.0, 5.0]], [[1.0, 0.0], [2.0]])  # on the second task
    for point, low, high in (interquartile_mean([[3.0, 5.0]]), improvement):
        assert np.isfinite(point) and np.isnan([low, high]).all()
    assert show_interval(*interquartile_mean([3.0])) == "3"
    for points, low, high in (interquartile_curve(SCORES[:1, None]), performance_profile(SCORES[:1], [0.0, 1.0])):
        assert np.isfinite(points).all() and np.isnan([low, high]).all()


def test_many_choices_are_drawn():
    assert sorted(draw_choices(3, 2)) == [[0, 1], [0, 2], [1, 2]]
    drawn = draw_choices(30, 15)
    assert len(drawn) == 1000 and all(len(set(choice)) == 15 and max(choice) < 30 for choice in map(list, drawn))


def test_the_best_of_some_options_is_what_a_loop_finds():
    scores = np.random.default_rng(2).normal(size=(3, 4, 2))
    means = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        brought = []
        for seed, task in np.ndindex(4, 2):
            best = max((a, b), key=lambda option, at=(seed, task): scores[option, *at])
            brought += [scores[best, other, task] for other in range(4) if other != seed]
        means.append(trim_mean(brought, 0.25))
    point, low, high = best_of(scores, 2)
    assert point == pytest.approx(np.mean(means)) and low < point < high


def test_the_best_of_one_option_is_the_option():
    scores = SCORES + [0, 2, 4]  # tasks that differ are no chance
    np.testing.assert_allclose(best_of(scores[None], 1), interquartile_mean(scores), atol=0.03)  # of fewer repetitions
    few = SCORES[:3, :1]  # each seed alone is drawn now and then
    np.testing.assert_allclose(best_of(few[None], 1), interquartile_mean(few), atol=0.03)


def test_seeds_that_are_drawn_often_choose_and_count_often(monkeypatch):
    scores, counts = np.random.default_rng(3).normal(size=(2, 4, 1)), np.array([1, 2, 1, 0])
    brought = []
    for seed, times in enumerate(counts):
        choosers = [other for other in range(4) for _ in range(counts[other]) if other != seed]
        of_seed = [scores[scores[:, other, 0].argmax(), seed, 0] for other in choosers]
        brought += of_seed * (6 * times // len(choosers))  # each draw of a seed weighs the same
    assert len(brought) == 6 * 4 and len(set(brought)) > 3
    monkeypatch.setattr(statistics, "draw_counts", lambda *_: np.tile(counts, (1000, 1)))
    _, low, high = best_of(scores, 2)
    assert low == high == pytest.approx(trim_mean(brought, 0.25))
    weights = np.array([[1.0, 1, 1, 1], [0, 2.5, 1.5, 0]])  # four runs: one is cut off at either end
    np.testing.assert_allclose(
        weighted_interquartile_means(np.array([9.0, 4, 6, 1]), weights), [5, (1.5 * 4 + 0.5 * 6) / 2]
    )


def test_the_best_of_options_that_are_alike_is_no_better():
    alike = np.random.default_rng(1).normal(size=(5, 200, 1))
    point, low, high = best_of(alike[:, :20], 5)
    assert abs(best_of(alike, 5)[0]) < 0.1 and low < point < high


def test_a_band_is_the_interval_of_each_point():
    curves = RNG.normal(size=(6, 3, 5))
    band = interquartile_curve(curves)
    assert np.shape(band) == (3, 5)
    for i in range(5):  # of fewer repetitions
        np.testing.assert_allclose(np.array(band)[:, i], interquartile_mean(curves[..., i]), atol=0.06)


def test_profiles_are_those_of_rliable():
    thresholds = np.linspace(-0.5, 1.5, 21)
    np.random.seed(0)
    theirs, intervals = library.create_performance_profile({"": SCORES}, thresholds, reps=1000)
    point, low, high = performance_profile(SCORES, thresholds)
    np.testing.assert_allclose(point, theirs[""])
    np.testing.assert_allclose([low, high], intervals[""], atol=0.06)  # a run of 18 is 0.056


def test_the_probability_of_improvement_is_that_of_rliable():
    ours = SCORES.round(1)  # with draws
    np.random.seed(0)
    theirs, intervals = library.get_interval_estimates(
        {"": (ours, RIVALS)}, metrics.probability_of_improvement, reps=200
    )
    point, low, high = probability_of_improvement(ours.T, RIVALS.T)
    assert point == pytest.approx(theirs[""]) and low < point < high
    np.testing.assert_allclose([low, high], np.ravel(intervals[""]), atol=0.05)  # theirs has few repetitions


def test_tasks_may_have_different_numbers_of_seeds():
    point, low, high = probability_of_improvement([[1, 2, 3], [0, 0]], [[0, 2], [1, 1, 1]])
    assert point == pytest.approx((4.5 / 6 + 0) / 2) and low <= point <= high


def test_a_return_holds_until_the_next_episode_ends():
    episodes = {"global_step": np.array([10.0, 20.0, 40.0]), "episodic_return": np.array([1.0, 3.0, 5.0])}
    run = Run("", {}, {}, episodes, {})
    together = {"global_step": np.array([10.0, 10.0]), "episodic_return": np.array([1.0, 3.0])}
    assert mean_returns(Run("", {}, {}, together, {}), np.array([10.0, 20.0])) == [2]
    np.testing.assert_allclose(mean_returns(run, np.array([10.0, 20.0, 25.0, 45.0])), [1, 3, (15 * 3 + 5 * 5) / 20])


def test_the_share_of_a_rate_is_that_of_the_timesteps_of_all_runs():
    pulls = [(0, np.array([10.0, 30.0]), [0.1, 0.2]), (0, np.array([20.0]), [0.2]), (0, np.array([]), [])]
    shares = share_of_rates([0.1, 0.2], pulls, np.array([0.0, 10, 20, 30, 40]))
    np.testing.assert_allclose(shares, [[0.5, 0, 0, np.nan], [0.5, 1, 1, np.nan]])
    shares = share_of_rates([0.1], [(20, np.array([30.0]), [0.1])], np.array([0.0, 10, 20, 30]))
    np.testing.assert_allclose(shares, [[np.nan, np.nan, 1]])  # no round before learning starts
