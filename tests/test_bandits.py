"""What bandits.py promises of its bandits: the rules to the letter, finite probabilities, seeded draws, whole state,
and that those learn that claim to."""

import copy
import inspect
import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandits import LRRL, Bandit, Uniform
from lrrl_utils.rivals import BanditName, all_bandits, make_bandit
from lrrl_utils.state import capture, restore
from tests.test_state import plain, through_a_file

ARMS = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
any_finite = st.floats(allow_nan=False, allow_infinity=False)
every_bandit = pytest.mark.parametrize("name", all_bandits())


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
    assert get_args(BanditName) == tuple(all_bandits())
    with pytest.raises(ValueError, match="peak, lrrl, uniform, prior, exp3"):
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
