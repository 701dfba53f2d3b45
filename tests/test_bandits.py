"""What bandits.py promises of its bandits: the rules to the letter, finite probabilities, seeded draws, whole state,
and that those learn that claim to."""

import copy
import inspect
import io
import json
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandits import BANDITS, LRRL, Bandit, Peak, Prior, Rounds, Uniform
from lrrl_utils.rivals import RIVALS, BanditName, make_bandit
from lrrl_utils.state import capture, restore
from tests import simulator
from tests.test_state import plain, through_a_file

ARMS = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
any_finite = st.floats(allow_nan=False, allow_infinity=False)
every_bandit = pytest.mark.parametrize("name", [*BANDITS, *RIVALS])


def play(bandit, performances):
    """Pull and update once per performance; returns the arms pulled."""
    arms = []
    for performance in performances:
        arms.append(bandit.pull())
        bandit.update(performance)
    return arms


def test_lrrl_follows_the_recursion_worked_out_by_hand():
    bandit = LRRL([1e-4, 1e-3], step_size=0.5, decay=0.8, window=2, seed=0)

    bandit.arm = 0
    assert bandit.update(1.0) == 0.0  # the window holds this round alone
    assert bandit.weights.tolist() == [0.0, 0.0]

    bandit.arm = 0
    assert bandit.update(3.0) == 1.0  # 3 − (1 + 3) / 2
    assert bandit.weights == pytest.approx([0.5, 0.0])  # 0.8 · 0 + 0.5 · 1 / e⁰

    bandit.arm = 1
    assert bandit.update(2.0) == -0.5  # 2 − (3 + 2) / 2: the 1 has left the window
    assert bandit.weights == pytest.approx([0.4, -0.25])  # 0.8 · 0.5 | 0.8 · 0 + 0.5 · (−0.5) / e⁰

    bandit.arm = 0
    assert bandit.update(4.0) == 1.0
    first = 0.8 * 0.4 + 0.5 * 1.0 / math.exp(0.4)
    assert bandit.weights == pytest.approx([first, -0.2])
    assert bandit.probabilities[0] == pytest.approx(math.exp(first) / (math.exp(first) + math.exp(-0.2)))


def test_the_improvement_is_measured_against_the_whole_window_while_it_fills():
    bandit = LRRL(ARMS, window=3)
    feedbacks = []
    for performance in (1.0, 2.0, 6.0, 6.0):
        bandit.pull()
        feedbacks.append(bandit.update(performance))
    assert feedbacks == pytest.approx([0.0, 0.5, 3.0, 6.0 - 14 / 3])


def test_lrrl_takes_exp_w_no_lower_than_1e_4():
    bandit = LRRL([1e-4, 1e-3], step_size=1.0, decay=1.0)
    bandit.weights[:] = [-20.0, 0.0]
    bandit.performances.append(0.0)
    bandit.arm = 0
    bandit.update(2.0)
    assert bandit.weights[0] == pytest.approx(-20.0 + 1.0 * 1e4)


def test_the_defaults_are_the_documented_ones():
    defaults = {name: parameter.default for name, parameter in inspect.signature(LRRL).parameters.items()}
    assert (defaults["step_size"], defaults["decay"], defaults["window"]) == (0.2, 0.9, 5)


def test_uniform_never_learns_but_reports_the_same_feedback():
    uniform, lrrl = Uniform(ARMS), LRRL(ARMS)
    for performance in (1.0, 5.0, -3.0, 8.0):
        uniform.pull(), lrrl.pull()
        assert uniform.update(performance) == lrrl.update(performance)
        assert uniform.probabilities.tolist() == [0.2] * 5
    assert lrrl.probabilities.tolist() != [0.2] * 5


@every_bandit
@given(performances=st.lists(any_finite, max_size=30), seed=st.integers(0, 100))
def test_any_finite_performance_leaves_finite_probabilities_that_sum_to_1(name, performances, seed):
    bandit = make_bandit(name, ARMS, seed=seed)
    for performance in performances:
        bandit.pull()
        assert math.isfinite(bandit.update(performance))
        probabilities = bandit.probabilities
        assert probabilities.shape == (5,) and probabilities.dtype == np.float64
        assert (probabilities >= 0).all() and probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_feedback_and_weights_are_clipped_to_1e6():
    bandit = LRRL(ARMS, step_size=1e9)
    assert play(bandit, [-1.7e308, 1.7e308]) and bandit.performances[-1] == 1.7e308
    bandit.pull()
    assert bandit.update(-1.7e308) == -1e6
    assert 8e5 < np.abs(bandit.weights).max() <= 1e6


@every_bandit
@pytest.mark.parametrize("performance", [math.nan, math.inf, -math.inf])
def test_a_performance_that_is_not_finite_is_refused_and_changes_nothing(name, performance):
    bandit = make_bandit(name, ARMS)
    play(bandit, [1.0, 2.0])
    bandit.pull()
    before = plain(capture(bandit))
    for see in (bandit.update, bandit.observe):
        with pytest.raises(ValueError, match="finite"):
            see(performance)
        assert plain(capture(bandit)) | {"has_observed": False} == before


@every_bandit
@given(performances=st.lists(any_finite, min_size=1, max_size=20), more=st.lists(any_finite, max_size=20))
def test_a_state_that_went_through_a_checkpoint_goes_on_alike(name, performances, more):
    original = make_bandit(name, ARMS, seed=3)
    play(original, performances)
    original.pull()  # in the middle of a round
    restored = make_bandit(name, ARMS, seed=4)
    restore(restored, through_a_file(capture(original)))
    assert restored.learning_rate == original.learning_rate
    assert restored.update(1.0) == original.update(1.0)
    assert play(restored, more) == play(original, more)
    assert plain(capture(restored)) == plain(capture(original))


@every_bandit
def test_a_state_is_a_copy_that_later_rounds_do_not_touch(name):
    bandit = make_bandit(name, ARMS)
    play(bandit, [1.0, 2.0, 4.0])
    state = capture(bandit)
    before = copy.deepcopy(plain(state))
    play(bandit, [8.0, 1.0])
    assert plain(state) == before


@pytest.mark.parametrize("name", ["peak", "prior", "lrrl", "uniform", "exp3"])  # the others draw no random numbers
def test_draws_repeat_with_the_seed_and_differ_without(name):
    draws = [play(make_bandit(name, ARMS, seed=seed), [0.0] * 50) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_draws_are_independent_of_the_callers_generator_of_the_same_seed():
    arms = play(Uniform(ARMS, seed=1), [0.0] * 50)
    assert arms != np.random.default_rng(1).choice(5, size=50, p=[0.2] * 5).tolist()


def test_draws_follow_the_probabilities():
    bandit = LRRL(ARMS, decay=1.0, seed=1)
    bandit.weights[:] = np.log([0.1, 0.1, 0.2, 0.2, 0.4])
    arms = play(bandit, [0.0] * 5000)  # without improvement the weights stay
    assert np.bincount(arms) / 5000 == pytest.approx(bandit.probabilities, abs=0.03)


@every_bandit
def test_a_single_arm_works(name):
    bandit = make_bandit(name, [1e-3])
    assert play(bandit, [1.0, -1e300, 1e300]) == [0, 0, 0]
    assert bandit.probabilities.tolist() == [1.0]


def test_lrrl_comes_to_prefer_the_arm_that_always_improves():
    bandit = LRRL(ARMS, step_size=1.0, decay=0.98, seed=1)
    level, late = 0.0, []
    for n in range(600):
        arm = bandit.pull()
        level += 0.3 if arm == 2 else -0.1
        bandit.update(level)
        late += [arm] * (n >= 300)
    assert late.count(2) / len(late) > 0.3  # 0.2 by chance, with a standard deviation of 0.023


@every_bandit
@pytest.mark.parametrize("arms", [[], [0.0], [-1e-3], [math.nan], [math.inf], [1e-3, 1e-3]])
def test_arms_that_are_no_distinct_positive_finite_rates_are_refused(name, arms):
    with pytest.raises(ValueError, match="learning rate"):
        make_bandit(name, arms)


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"step_size": 0.0}, {"step_size": math.nan}, {"decay": 0.0}, {"decay": 1.1}, {"decay": math.nan}],
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LRRL(ARMS, **options)


@every_bandit
def test_there_is_no_rate_before_a_pull_nor_after_an_update(name):
    bandit = make_bandit(name, ARMS)
    for unready in (lambda: bandit.learning_rate, lambda: bandit.update(1.0)):
        with pytest.raises(RuntimeError, match="pull"):
            unready()
    arm = bandit.pull()
    assert bandit.learning_rate == ARMS[arm]
    bandit.update(1.0)
    with pytest.raises(RuntimeError, match="pull"):
        bandit.update(1.0)


@every_bandit
def test_a_round_of_one_performance_needs_no_observation(name):
    one, other = make_bandit(name, ARMS, seed=1), make_bandit(name, ARMS, seed=1)
    for performance in (1.0, 3.0, 2.0):
        assert one.pull() == other.pull()
        other.observe(performance)
        assert one.update(performance) == other.update(performance)
    assert plain(capture(one)) == plain(capture(other))


def test_make_bandit_knows_the_names_and_passes_on_what_a_bandit_takes():
    bandit = make_bandit("lrrl", ARMS, step_size=0.7, decay=0.5, window=3, seed=9)
    assert (bandit.step_size, bandit.decay, bandit.performances.maxlen) == (0.7, 0.5, 3)
    assert isinstance(make_bandit("uniform", ARMS, step_size=0.7, decay=0.5, window=3, seed=9), Uniform)
    assert make_bandit("lrrl", ARMS, decay=None).decay == 0.9 and make_bandit("exp3", ARMS, decay=None).decay == 0.98
    assert get_args(BanditName) == (*BANDITS, *RIVALS)
    with pytest.raises(ValueError, match="lrrl, uniform, prior, exp3"):
        make_bandit("no-such-bandit", ARMS)


@pytest.mark.parametrize("options", [{"step_sise": 0.5}, {"stepsize": None, "decay": 0.5}, {"interval": 100}])
@pytest.mark.parametrize("name", ["lrrl", "uniform"])
def test_an_option_that_no_bandit_has_is_an_error_that_names_it(name, options):
    with pytest.raises(TypeError, match=f"no bandit has an option {next(iter(options))}$"):
        make_bandit(name, ARMS, **options)


def test_a_users_bandit_needs_probabilities_and_learn_and_nothing_else():
    class Greedy(Bandit):
        def __init__(self, arms, window=5, seed=0):
            super().__init__(arms, window, seed)
            self.totals = np.zeros(len(self.arms))

        @property
        def probabilities(self):
            return np.eye(len(self.arms))[self.totals.argmax()].tolist()  # any sequence will do

        def learn(self, feedback):
            self.totals[self.arm] += feedback

    bandit = Greedy(ARMS)
    assert play(bandit, [1.0, 0.0, 1.0]) == [0, 0, 1]
    resumed = Greedy(ARMS)
    restore(resumed, through_a_file(capture(bandit)))
    assert resumed.totals.tolist() == bandit.totals.tolist() and resumed.pull() == bandit.pull()


@every_bandit
def test_a_failure_leaves_the_window_as_it_was_and_is_measured_against_it(name):
    bandit = make_bandit(name, ARMS, window=3, seed=1)
    with pytest.raises(RuntimeError, match="pull"):
        bandit.fail(1.0)
    bandit.pull()
    assert bandit.fail(-5.0, before=[1.0, 3.0]) == pytest.approx(-5.0 - (1 + 3 - 5) / 3) and not bandit.performances
    play(bandit, [1.0, 2.0, 3.0, 4.0])
    bandit.pull()
    assert bandit.fail(-8.0, before=[100.0]) == pytest.approx(-8.0 - (3 + 4 - 8) / 3) and bandit.arm is None
    assert list(bandit.performances) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("name", ["peak", "lrrl"])
def test_an_arm_that_has_failed_is_drawn_less(name):
    bandit = make_bandit(name, ARMS, seed=1)
    play(bandit, [1.0, 2.0, 3.0])
    arm, before = bandit.pull(), bandit.probabilities
    bandit.fail(-3.0)
    assert bandit.probabilities[arm] < before[arm]


# --- peak -------------------------------------------------------------------------------------------------------------


def draws(bandit, performance, rounds=80):
    """The arms that `bandit` draws when `performance(n, rate)` is observed n-th; one observation before the first."""
    arms, rounds_of = [], Rounds({"agent": bandit})
    rounds_of.earn(performance(0, ARMS[2]), 1)
    for n in range(1, rounds):
        if not rounds_of.is_open:
            rounds_of.begin(n / rounds)
            arms.append(bandit.arm)
        rounds_of.earn(performance(n, bandit.learning_rate), 1)
        if rounds_of.is_over:
            rounds_of.close()
    return arms


@settings(max_examples=30)
@given(scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 10), range_of_arms=st.booleans())
def test_peak_draws_the_same_whatever_the_scale_and_the_zero_of_performance(scale, shift, seed, range_of_arms):
    arms = np.geomspace(3e-5, 3e-3, 25) if range_of_arms else ARMS

    def play_scaled(a, b):
        noise = np.random.default_rng(seed).standard_normal(200)
        return draws(Peak(arms, seed=seed), lambda n, rate: a * (noise[n] + n * (rate < 2e-4)) + b)

    assert play_scaled(1.0, 0.0) == play_scaled(scale, scale * shift)


def test_peak_is_the_posterior_of_its_model_for_one_size_of_drifts(monkeypatch):
    """Against the same Gaussian model written as one big regression: levels and drifts of all times at once."""
    monkeypatch.setattr(Peak, "SIZES", (0.3,))
    monkeypatch.setattr(Peak, "CUT", 1e9)
    bandit, rng, observations, pulled = Peak(ARMS), np.random.default_rng(3), [0.0], []
    bandit.set_update_size(5.0)
    bandit.observe(0.0)
    for t, arm in enumerate((2, 2, 0, 4, 4, 1)):
        bandit.arm, bandit.progress = arm, t / 6
        observations.append(float(rng.standard_normal()))
        bandit.observe(observations[-1])
        bandit.update(0.0)
        pulled.append(arm)

    sigma, log_rates, times, arms = math.sqrt(bandit.variance[0]), np.log10(ARMS), np.arange(1, 7), np.array(pulled)
    z = log_rates[arms] - math.log10(0.0075 / 5) + np.arange(6) / 6  # of the arm in use
    rho = math.exp(-1 / 1000) ** np.abs(times[:, None] - times)
    kernel = 0.2**2 * np.exp(-0.5 * (log_rates[:, None] - log_rates) ** 2 / 0.5**2)
    common = 1 + 0.1**2 * (1 + np.minimum(times[:, None], times))  # it walked a step before the first observation, too
    place, width, deviations = (
        np.multiply.outer(z, z),
        0.3**2 * np.multiply.outer(z**2, z**2),
        kernel[np.ix_(arms, arms)],
    )
    drift_covariance = 0.3**2 * (common + rho * (place + width + deviations))
    to_levels = np.tril(np.ones((6, 6)))  # L_t = L_0 + the drifts up to t; L_0 is observed with variance 1
    covariance = 1 + to_levels @ (drift_covariance + 0.1**2 * np.eye(6)) @ to_levels.T + np.eye(6)
    # of (c, b, a, g) at the end with the drifts at all times
    cross = 0.3**2 * np.stack([common[-1], rho[-1] * z, 0.3**2 * rho[-1] * z**2, *(rho[-1] * kernel[:, arms])])
    cross = cross @ to_levels.T
    residual = np.array(observations[1:]) + sigma * to_levels @ (0.3 * (z**2 + np.maximum(z, 0) ** 3))
    expected = cross @ np.linalg.solve(covariance, residual) / sigma
    assert bandit.mean[0, 1:, 1] + bandit.mean[0, 1:, 0] / sigma == pytest.approx(expected, abs=1e-9)
    prior = np.zeros((8, 8))
    prior[:3, :3], prior[3:, 3:] = np.diag([common[-1, -1], 1, 0.3**2]), kernel
    posterior = 0.3**2 * prior - cross @ np.linalg.solve(covariance, cross.T)
    assert bandit.covariance[0, 1:, 1:] == pytest.approx(posterior, abs=1e-9)


@pytest.mark.parametrize("name", ["peak", "prior"])
def test_before_anything_is_known_the_rate_that_moves_the_parameters_as_expected_is_drawn_most(name):
    def likeliest(size, progress):
        bandit = make_bandit(name, [1e-5, 1.0, 1e-4, 1e-2, 1e-3, 1e-1])
        if size:
            bandit.set_update_size(size)
        bandit.progress, bandit.survived = progress, np.ones(6, bool)  # so that nothing is out of reach
        return bandit.arms[np.argmax(bandit.probabilities)]

    assert likeliest(None, 0.0) == 1e-3  # the lower one in the middle
    assert likeliest(None, 0.9) == 1e-4
    assert likeliest(7.5, 0.0) == 1e-3
    assert likeliest(7.5, 1.0) == 1e-4
    assert likeliest(0.1, 0.0) == 1e-1


@pytest.mark.parametrize("size", [0.0, math.inf, math.nan])
def test_a_size_that_says_nothing_leaves_the_middle_arm(size):
    bandit = Peak(ARMS)
    bandit.set_update_size(size)
    assert not bandit.needs_update_size and bandit.best == pytest.approx(math.log10(3e-4))


def test_the_update_size_is_refused_once_an_arm_was_drawn():
    bandit = Peak(ARMS)
    bandit.pull()
    with pytest.raises(RuntimeError, match="before the first pull"):
        bandit.set_update_size(5.0)


def test_peak_takes_rounding_for_no_change_and_finds_the_noise_after_a_plateau():
    bandit, rng = Peak(ARMS), np.random.default_rng(0)
    for _ in range(10):
        bandit.observe(0.1 + 1e-17 * rng.standard_normal())
    assert (bandit.variance == 0).all()
    for _ in range(60):
        bandit.observe(0.1 + 5 * rng.standard_normal())
    assert 3 < math.sqrt(bandit.variance[0]) < 8


def test_prior_never_learns():
    learning, control = Peak(ARMS, seed=1), Prior(ARMS, seed=1)
    for bandit in (learning, control):
        draws(bandit, lambda n, rate: n if rate < 2e-4 else -n)
        bandit.progress, bandit.survived = 0.0, np.ones(5, bool)
    fresh = Peak(ARMS)
    fresh.survived = np.ones(5, bool)
    assert control.probabilities.tolist() == fresh.probabilities.tolist() != learning.probabilities.tolist()


def test_peak_finds_a_rate_that_is_a_decade_from_where_it_was_expected():
    for best in (1e-4, 1e-2):
        level, bandit = 0.0, Peak(np.geomspace(1e-6, 1, 25), seed=1)
        bandit.set_update_size(7.5)  # 1e-3 is expected
        rng, rounds_of, last = np.random.default_rng(0), Rounds({"agent": bandit}), []
        for n in range(300):
            if n and not rounds_of.is_open:
                rounds_of.begin()
                last.append(bandit.learning_rate)
            if n:
                level += 0.3 - 0.3 * math.log10(bandit.learning_rate / best) ** 2
            rounds_of.earn(level + rng.standard_normal(), 1)
            if rounds_of.is_over and n:
                rounds_of.close()
        assert abs(np.log10(last[-20:]).mean() - math.log10(best)) < 0.5


def test_peak_starts_where_it_expects_the_best_and_spreads_upwards_only_from_arms_that_did_no_harm():
    def possible(bandit):
        return [rate for rate, p in zip(bandit.arms, bandit.probabilities) if p > 0]

    def play_arm(bandit, arm, fails):
        bandit.pull()
        bandit.arm = arm
        for performance in (1.0, -20.0, -21.0) if fails else (1.0, 1.5, 1.2):
            bandit.observe(performance)
        bandit.fail(-43.0) if fails else bandit.update(1.2)

    rates = [3e-3, 1e-4, 3e-4, 3e-5, 1e-3]  # by rate, in whatever order they come
    bandit = Peak(rates, seed=1)
    bandit.observe(1.0)
    assert possible(bandit) == [3e-4]
    play_arm(bandit, 2, fails=False)
    assert set(possible(bandit)) <= {1e-4, 3e-4, 1e-3} and bandit.reachable.tolist() == [False, True, True, False, True]
    play_arm(bandit, 4, fails=True)  # 1e-3
    assert bandit.reachable.tolist() == [False, True, True, False, True]
    play_arm(bandit, 4, fails=False)
    assert bandit.reachable.tolist() == [True, True, True, False, True]

    many = Peak(np.geomspace(1e-5, 1e-2, 25), seed=1)
    play_arm(many, 12, fails=False)
    assert np.flatnonzero(many.reachable).tolist() == [*range(8, 17)]  # half a decade
    ruined = Peak(rates, seed=1)
    play_arm(ruined, 2, fails=True)  # the middle one
    assert ruined.reachable.tolist() == [False, True, True, False, False]


def test_a_state_of_peak_is_small_and_its_matrices_stay_covariances():
    bandit = Peak(np.geomspace(1e-5, 1e-2, 25), seed=1)
    rng = np.random.default_rng(0)
    draws(bandit, lambda n, rate: 1e6 * rng.standard_normal() if n % 100 == 0 else rng.standard_normal(), rounds=3000)
    assert np.linalg.eigvalsh(bandit.covariance).min() > -1e-9
    file = io.BytesIO()
    torch.save(capture(bandit), file)
    assert file.tell() < 200_000


# --- does it learn? ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "sac", "dqn"])
@pytest.mark.parametrize("scenario", simulator.HELD_OUT)
def test_peak_beats_uniform_lrrl_and_exp3_on_simulated_agents_by_more_than_chance(algorithm, scenario):
    calibration = json.loads(simulator.CALIBRATION.read_text())[algorithm]
    lives = 50 if algorithm == "ppo" else 150  # the others are short
    levels = {}
    for name in ("peak", "uniform", "lrrl", "exp3"):
        bandits = [make_bandit(name, simulator.ARMS, seed=seed) for seed in range(1000, 1000 + lives)]
        agents = [simulator.Agent(seed, calibration, scenario) for seed in range(1000, 1000 + lives)]
        levels[name] = np.array([simulator.live(bandit, agent)[0] for bandit, agent in zip(bandits, agents)])
    for name in ("uniform", "lrrl", "exp3"):
        difference = levels["peak"] - levels[name]
        if scenario != "cliff":
            assert difference.mean() > 3.5 * difference.std(ddof=1) / math.sqrt(lives), (name, difference.mean())
        elif name == "uniform":  # a parabola follows no cliff: no more than this holds there
            assert difference.mean() > 0


def test_the_calibration_is_that_of_the_published_runs():
    table = json.loads(simulator.CALIBRATION.read_text())
    results = simulator.CALIBRATION.parent.parent / "results"
    for name, source in simulator.SOURCES.items():
        assert table[name] == simulator.calibrate(results / source)
