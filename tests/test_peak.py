"""What peak.py promises: the posterior of its model, careful exploration, and more gain than luck or others give."""

import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandits import Rounds
from lrrl_utils.rivals import make_bandit
from lrrl_utils.state import capture, restore
from peak import Peak, Prior
from tests import simulator
from tests.test_bandits import ARMS


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


@settings(max_examples=15)
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
    z = log_rates[arms] - math.log10(0.002 / 5) + 0.3 * np.arange(6) / 6  # of the arm in use
    share = np.minimum(10**z, 1)
    rho = math.exp(-1 / 1000) ** np.abs(times[:, None] - times)
    kernel = 0.2**2 * np.exp(-0.5 * (log_rates[:, None] - log_rates) ** 2 / 0.5**2)
    common = math.exp(-1 / 200) ** np.abs(times[:, None] - times)
    place, width, deviations = (
        np.multiply.outer(z, z),
        0.3**2 * np.multiply.outer(z**2, z**2),
        kernel[np.ix_(arms, arms)],
    )
    drift_covariance = 0.3**2 * (common * np.multiply.outer(share, share) + rho * (place + width + deviations))
    to_levels = np.tril(np.ones((6, 6)))  # L_t = L_0 + the drifts up to t; L_0 is observed with variance 1
    covariance = 1 + to_levels @ (drift_covariance + 0.1**2 * np.eye(6)) @ to_levels.T + np.eye(6)
    # of (c, b, a, g) at the end with the drifts at all times
    cross = 0.3**2 * np.stack([common[-1] * share, rho[-1] * z, 0.3**2 * rho[-1] * z**2, *(rho[-1] * kernel[:, arms])])
    cross = cross @ to_levels.T
    residual = np.array(observations[1:]) + sigma * to_levels @ (0.3 * (z**2 + np.maximum(z, 0) ** 3 - share))
    expected = cross @ np.linalg.solve(covariance, residual) / sigma + 0.3 * np.eye(8)[0]  # c is expected to be s
    assert bandit.mean[0, 1:, 1] + bandit.mean[0, 1:, 0] / sigma == pytest.approx(expected, abs=1e-9)
    prior = np.zeros((8, 8))
    prior[:3, :3], prior[3:, 3:] = np.diag([1, 1, 0.3**2]), kernel
    posterior = 0.3**2 * prior - cross @ np.linalg.solve(covariance, cross.T)
    assert bandit.covariance[0, 1:, 1:] == pytest.approx(posterior, abs=1e-9)


@pytest.mark.parametrize("name", ["peak", "prior"])
def test_before_anything_is_known_the_rate_that_moves_the_parameters_as_expected_is_drawn_most(name):
    def likeliest(size, progress):
        bandit = make_bandit(name, list(np.roll(np.geomspace(1e-6, 1, 25), 7)))
        if size:
            bandit.set_update_size(size)
        bandit.progress, bandit.survived = progress, np.ones(25, bool)  # so that nothing is out of reach
        return pytest.approx(bandit.arms[np.argmax(bandit.probabilities)], rel=0.35)  # arms: a quarter decade apart

    assert likeliest(None, 0.0) == 1e-3  # the one in the middle
    assert likeliest(None, 1.0) == 5e-4
    assert likeliest(2.0, 0.0) == 1e-3
    assert likeliest(20.0, 1.0) == 5e-5
    assert likeliest(0.02, 0.0) == 1e-1
    bandit = make_bandit(name, [1e-4, 1e-3, 1e-2])
    bandit.set_update_size(2.0, batch_size=6400)  # a tenth of the noise in a gradient
    assert bandit.best == pytest.approx(-2)
    bandit.set_update_size(2.0, best_update=0.02, fall=0.0)  # of another algorithm
    assert bandit.best == pytest.approx(-2)
    for bandit.progress in (0.0, 1.0):
        assert bandit.decades == pytest.approx([-2, -1, 0])
    assert make_bandit(name, [1e-2, 1e-4, 1e-1, 1e-3]).best == pytest.approx(-3)  # the lower one in the middle


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


@pytest.mark.parametrize(("name", "likeliest"), [("peak", 1e-3), ("prior", 1e-2)])
def test_where_steps_are_shortened_prior_goes_to_a_higher_rate_at_once_and_peak_arm_by_arm(name, likeliest):
    bandit = make_bandit(name, list(np.geomspace(1e-6, 1, 7)))
    bandit.set_update_size(20.0, best_update=0.002, fall=0.0)
    rounds = Rounds({"agent": bandit})
    rounds.begin()
    assert bandit.learning_rate == pytest.approx(1e-4)
    rounds.earn(1.0, 1)
    rounds.close()
    rounds.begin(step_share=0.01)
    assert bandit.decades == pytest.approx(np.log10(bandit.arms) + 2)
    assert bandit.arms[np.argmax(bandit.drawn_from)] == pytest.approx(likeliest)


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
    control.pull()
    control.fail(-1e3)
    assert Prior(ARMS).reachable.all() and not Peak(ARMS).reachable.all()
    fresh = Peak(ARMS)
    fresh.survived = np.ones(5, bool)
    assert control.probabilities.tolist() == fresh.probabilities.tolist() != learning.probabilities.tolist()


def test_peak_finds_a_rate_that_is_a_decade_from_where_it_was_expected():
    for best in (1e-4, 1e-2):
        level, bandit = 0.0, Peak(np.geomspace(1e-6, 1, 25), seed=1)
        bandit.set_update_size(2.0)  # 1e-3 is expected
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
    many.progress = 1.0  # the best is expected to be half as high by now, but it spreads from where it started
    play_arm(many, 12, fails=False)
    assert np.flatnonzero(many.reachable).tolist() == [*range(8, 17)]  # half a decade
    ruined = Peak(rates, seed=1)
    play_arm(ruined, 2, fails=True)  # the middle one
    assert ruined.reachable.tolist() == [False, True, True, False, False]


def test_of_a_round_that_has_failed_peak_keeps_that_its_arm_and_those_above_are_worse():
    bandit = Peak(ARMS, seed=1)
    for performance in (0.0, 0.5, -0.3):
        bandit.observe(performance)
    bandit.pull()
    bandit.update(0.2)
    bandit.pull()
    before, bandit.arm = capture(bandit.copy_filter()), 3
    bandit.observe(-1e8)
    bandit.fail(-2e8)
    bandit.mean[:, 4:, 1] += 3 * np.multiply.outer(Peak.SIZES, [0, 0, 0, 1, 1])
    after = capture(bandit.copy_filter())
    for name in ("covariance", "variance", "evidence"):
        assert torch.equal(after[name]["values"], before[name]["values"]), name
    assert after["mean"]["values"].numpy() == pytest.approx(before["mean"]["values"].numpy())
    assert after["errors"] == before["errors"]
    bandit.observe(5.0)  # the agent was taken back: this is where it is, no drift
    assert bandit.mean[:, 0] == pytest.approx(np.array([[5.0, 0.0]] * 4))
    assert bandit.mean[:, 1:, 0] == pytest.approx(before["mean"]["values"][:, 1:, 0].numpy(), rel=0.01)  # it fades


def test_a_round_that_fails_after_a_resume_is_forgotten_as_well():
    bandits = [Peak(ARMS, seed=1), Peak(ARMS, seed=1)]
    for performance in (0.0, 0.5, -0.3):
        bandits[0].observe(performance)
    bandits[0].pull()
    bandits[0].observe(-1e8)
    restore(bandits[1], capture(bandits[0]))
    for bandit in bandits:
        bandit.fail(-2e8)
        bandit.observe(0.1)
    assert bandits[1].pull() == bandits[0].pull() and bandits[1].variance[0] < 1
    assert capture(bandits[1].mean)["values"].tolist() == capture(bandits[0].mean)["values"].tolist()


def test_the_size_of_drifts_that_predicts_best_has_most_weight():
    def evidence(drift):
        bandit, rng = Peak(ARMS, seed=1), np.random.default_rng(0)
        bandit.observe(0.0)
        bandit.arm = 2
        for n in range(100):
            bandit.observe(drift * n + rng.standard_normal())
        return bandit.evidence.argmax()

    assert evidence(0.0) == 0  # 0.05
    assert evidence(2.0) >= 2  # 0.45 or 1.35


def test_an_outlier_counts_no_more_however_far_off_it_is():
    def drifts(outlier):
        bandit, rng = Peak(ARMS, seed=1), np.random.default_rng(0)
        for n in range(30):
            bandit.observe(outlier if n == 20 else rng.standard_normal())
            bandit.arm = 2
        return bandit.mean

    assert drifts(1e3) == pytest.approx(drifts(1e6), rel=0.01)


@pytest.mark.parametrize("progress", [2.0, -2.0])
def test_arms_are_drawn_as_often_as_they_are_best_in_the_sharpened_posterior(monkeypatch, progress):
    """In which training with a low rate does no harm, whatever was seen."""
    monkeypatch.setattr(Peak, "SIZES", (0.45,))
    bandit, rng = Peak(np.geomspace(1e-5, 1e-1, 9), seed=1), np.random.default_rng(0)
    bandit.survived = np.ones(9, bool)
    bandit.observe(0.0)
    for n in range(30):
        bandit.arm = n % 9
        bandit.observe(progress * n + rng.standard_normal())
    z = bandit.decades
    features = np.column_stack([np.minimum(10**z, 1), z, z**2, np.eye(9)])
    beliefs = bandit.mean[0, 1:, 1] + bandit.mean[0, 1:, 0] / math.sqrt(bandit.variance[0])
    assert (beliefs[0] > 0) == (progress > 0)
    samples = rng.multivariate_normal(beliefs, 0.4**2 * bandit.covariance[0, 1:, 1:], 100_000)
    samples[:, 0] = np.maximum(samples[:, 0], 0)
    best = (samples @ features.T - 0.45 * (z**2 + np.maximum(z, 0) ** 3)).argmax(axis=1)
    assert bandit.probabilities == pytest.approx(np.bincount(best, minlength=9) / 100_000, abs=0.05)


def test_however_bad_training_goes_rates_that_change_less_look_no_better():
    bandit = Peak(np.geomspace(1e-6, 1, 25))
    bandit.set_update_size(2.0)  # 1e-3 is expected
    bandit.survived = np.ones(25, bool)
    bandit.covariance[:, 1, 1] = 1e-9
    for progress in (1, -5, -50):
        bandit.mean[:, 1, 1] = progress * np.array(Peak.SIZES)
        assert bandit.arms[bandit.probabilities.argmax()] == pytest.approx(1e-3)


def test_a_state_of_peak_is_small_and_its_matrices_stay_covariances():
    bandit = Peak(np.geomspace(1e-5, 1e-2, 25), seed=1)
    rng = np.random.default_rng(0)
    draws(bandit, lambda n, rate: 1e6 * rng.standard_normal() if n % 100 == 0 else rng.standard_normal(), rounds=400)
    assert np.linalg.eigvalsh(bandit.covariance).min() > -1e-9
    file = io.BytesIO()
    torch.save(capture(bandit), file)
    assert file.tell() < 200_000


# --- does it learn? ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
@pytest.mark.parametrize("scenario", simulator.HELD_OUT)
def test_peak_beats_uniform_lrrl_and_exp3_on_simulated_agents_by_more_than_chance(algorithm, scenario):
    calibration = json.loads(simulator.CALIBRATION.read_text())[algorithm]
    lives = 30 if algorithm == "ppo" else 60  # those of DQN are short
    levels = {}
    for name in ("peak", "uniform", "lrrl", "exp3"):
        bandits = [make_bandit(name, simulator.ARMS, seed=seed) for seed in range(1000, 1000 + lives)]
        agents = [simulator.Agent(seed, calibration, scenario) for seed in range(1000, 1000 + lives)]
        levels[name] = np.array([simulator.live(bandit, agent)[0] for bandit, agent in zip(bandits, agents)])
    for name in ("uniform", "lrrl", "exp3"):
        difference = levels["peak"] - levels[name]
        errors = 2 if scenario == "rising" else 3  # it expects the best rate to fall
        if scenario != "cliff":
            assert difference.mean() > errors * difference.std(ddof=1) / math.sqrt(lives), (name, difference.mean())
        elif name == "uniform":  # a parabola follows no cliff: no more than this holds there
            assert difference.mean() > 0


@pytest.mark.parametrize("factor", [0.1, 1, 10])
@pytest.mark.parametrize("name", simulator.MEASURED_HELD_OUT)
def test_peak_beats_uniform_and_lrrl_on_measured_landscapes_wherever_the_arms_lie(name, factor):
    arms = [factor * rate for rate in simulator.ARMS]
    levels = {
        kind: simulator.simulate(name, lambda seed, kind=kind: make_bandit(kind, arms, seed=seed), lives=20)
        for kind in ("peak", "uniform", "lrrl")
    }
    for other in ("uniform", "lrrl"):
        difference = levels["peak"] - levels[other]
        assert difference.mean() > 3 * difference.std(ddof=1) / math.sqrt(len(difference)), other


def test_peak_learns_where_the_rate_that_it_expects_is_too_high():
    """Where `prior` stays at rates that ruin the agent."""
    arms = list(np.geomspace(1e-6, 1, 25))
    prior, peak = (
        simulator.simulate("hopper", lambda seed, kind=kind: make_bandit(kind, arms, seed=seed), lives=8, factor=0.3)
        for kind in ("prior", "peak")
    )
    difference = peak - prior
    assert difference.mean() > 3 * difference.std(ddof=1) / math.sqrt(len(difference))


def test_a_simulated_agent_gains_what_was_measured(monkeypatch, tmp_path):
    """Between rates and moments, below the lowest rate and above the highest; noise of one episode a step is 2."""
    folder = tmp_path / "landscapes" / "mine"
    folder.mkdir(parents=True)
    (folder / "landscape.json").write_text('{"length": 4000}')
    error = 2 * math.sqrt(1 / 2 + 1 / 2) * 1e4 / 4000  # two episodes before, two after: one in 1,000 timesteps
    lines = [
        f"{rate},{moment},2,2,{gain},{error}"
        for moment, gains in ((2000, (10, 40, 20)), (6000, (20, 0, -60)))
        for rate, gain in zip((1e-4, 1e-3, 1e-2), gains)
    ]
    (folder / "landscape.csv").write_text("\n".join([",".join(simulator.COLUMNS), *lines]))
    monkeypatch.setattr(simulator, "RESULTS", tmp_path)
    monkeypatch.setitem(simulator.LANDSCAPES, "mine", ("ppo", 8000, 1000))
    agent = simulator.MeasuredAgent(1, "mine")
    agent.displacement = 0.0
    rates = np.array([1e-5, 1e-4, math.sqrt(1e-7), 1e-2, 1e-1])
    for step, gains in ((0, (1, 10, 25, 20, 0)), (4, (1.5, 15, 17.5, -20, -60)), (9, (2, 20, 10, -60, -120))):
        agent.t = step
        assert agent.drifts(rates) == pytest.approx(np.array(gains) / 10 / 2)


def test_the_calibration_is_that_of_the_published_runs():
    table = json.loads(simulator.CALIBRATION.read_text())
    results = simulator.CALIBRATION.parent.parent / "results"
    for name, source in simulator.SOURCES.items():
        assert table[name] == simulator.calibrate(results / source)
