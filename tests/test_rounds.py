"""What `Rounds` promises: when a round is over, what it earned, when it has ruined the agent, and what that costs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bandits import Bandit, ClosedRound, Rounds
from lrrl_utils.rivals import all_bandits, make_bandit
from lrrl_utils.state import capture, restore

ARMS = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
any_finite = st.floats(allow_nan=False, allow_infinity=False)
every_bandit = pytest.mark.parametrize("name", all_bandits())


def make_rounds(*before, name="uniform", **options):
    """Rounds of a bandit that has observed `before`."""
    rounds = Rounds({"agent": make_bandit(name, ARMS, seed=1)}, **options)
    observe(rounds, *before)
    return rounds


def observe(rounds, *performances):
    for performance in performances:
        rounds.earn(performance, 1)


def noisy_rounds(seed=0):
    """Rounds that have seen sixty observations with noise 1 around 0."""
    return make_rounds(*np.random.default_rng(seed).standard_normal(60), rollback=False)


# --- when a round is over ---------------------------------------------------------------------------------------------


def length(rounds, *performances):
    """How many observations it takes until a round is over."""
    rounds.begin()
    for n, performance in enumerate(performances, start=1):
        observe(rounds, performance)
        if rounds.is_over:
            return n
    return None


def test_a_round_of_a_given_interval_lasts_as_many_timesteps():
    rounds = make_rounds(interval=25)
    assert not rounds.is_over
    for _ in range(2):
        rounds.begin()
        for is_over in (False, False, True):  # after 10, 20, 30 timesteps
            rounds.earn(0.0, 10)
            assert rounds.is_over == is_over
        rounds.close()
        assert not rounds.is_over


@pytest.mark.parametrize(
    ("performances", "lengths"),
    [
        ([10.0, 20.0, 30.0], [2]),
        ([-10.0, -20.0, -30.0], [2]),
        ([0.5 * n for n in range(1, 9)], range(3, 8)),
        ([0.0, 0.1, 0.0, -0.1, 0.0, 0.1, 0.0, 0.0, 9.0], [8]),
    ],
)
def test_an_automatic_round_takes_2_to_8_observations_until_its_trend_stands_out_of_the_noise(performances, lengths):
    assert length(noisy_rounds(), *performances) in lengths


@pytest.mark.parametrize(("errors", "is_over"), [(1.99, False), (2.01, True), (-2.01, True)])
def test_a_trend_is_a_slope_of_more_than_two_standard_errors_the_observation_before_included(errors, is_over):
    rounds = make_rounds(0.0)
    rounds.changes.extend([0.6745 * math.sqrt(2)] * 49)  # a noise of 1, the median whatever comes
    rounds.begin()
    slope = errors / math.sqrt(1 + 0 + 1)  # of three observations, the first of them before the round
    for performance in (slope, 2 * slope):
        assert not rounds.is_over
        rounds.earn(performance, 1)
    assert rounds.is_over == is_over


def test_the_noise_is_that_of_an_observation_and_outliers_do_not_spoil_it():
    many = [noisy_rounds(seed) for seed in range(100)]
    noise = [rounds.noise(rounds.changes) for rounds in many]
    assert np.mean(noise) == pytest.approx(1, abs=0.1)  # standard error 0.02
    for rounds in many:
        observe(rounds, 1e3, 0.0, -1e3, 0.0)
    assert np.mean([rounds.noise(rounds.changes) for rounds in many]) == pytest.approx(1.1, abs=0.2)
    assert Rounds.noise([]) == 0


# --- what a round earned ----------------------------------------------------------------------------------------------


def test_the_performance_of_a_round_weighs_observations_by_timesteps():
    rounds = make_rounds(100.0)
    assert rounds.performance is None
    rounds.begin()
    rounds.earn(1.0 * 10, 10)
    rounds.earn(4.0 * 30, 30)
    assert rounds.performance == (1.0 * 10 + 4.0 * 30) / 40


def test_an_observation_is_the_mean_reward_of_a_whole_stretch():
    rounds = make_rounds(stretch=10)
    rounds.begin()
    rounds.earn(5.0, 4, returns=[100.0])
    assert rounds.performance is None
    rounds.earn(25.0, 8)
    assert rounds.observations == [30 / 12] and rounds.durations == [12]


def test_an_observation_of_returns_waits_for_the_end_of_an_episode():
    rounds = make_rounds(stretch=10, feedback="return")
    rounds.begin()
    rounds.earn(1.0, 6, returns=[3.0])
    rounds.earn(1.0, 6, returns=[4.0, 8.0])
    rounds.earn(1.0, 20)
    assert rounds.observations == [5.0]
    rounds.earn(1.0, 1, returns=[7.0])
    assert rounds.observations == [5.0, 7.0] and rounds.durations == [12, 21]


def test_what_was_earned_before_a_round_is_not_credited_to_it():
    rounds = make_rounds(stretch=10)
    rounds.earn(1000.0, 9, returns=[1000.0])
    rounds.begin()
    rounds.earn(10.0, 10)
    assert rounds.performance == 1.0


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, int, torch.tensor])
def test_numbers_of_any_kind_may_be_earned(number):
    for feedback in ("reward", "return"):
        rounds = make_rounds(feedback=feedback, interval=8)
        rounds.begin()
        rounds.earn(number(6), np.int64(4), [number(1), number(2)])
        rounds.earn(number(6), torch.tensor(4), np.array([1.5]))
        json.dumps(capture(rounds))  # plain numbers all
        (closed,) = rounds.close()
        assert closed.performance == 1.5 and type(closed.performance) is float


@pytest.mark.parametrize("timesteps", [0, -1, np.int64(0)])
def test_no_timesteps_are_refused(timesteps):
    rounds = make_rounds()
    with pytest.raises(ValueError, match="timesteps must be 1 or more"):
        rounds.earn(1.0, timesteps)
    observe(rounds, 1.0)
    assert list(rounds.before) == [1.0]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf)])
@pytest.mark.parametrize("feedback", ["reward", "return"])
def test_what_is_not_finite_is_refused_and_changes_nothing(wrong, feedback):
    rounds = make_rounds(1.0, feedback=feedback, stretch=10)
    rounds.begin()
    rounds.earn(1.0, 5, [2.0])
    before = capture(rounds)
    for earned in ((wrong, 5, [1.0]), (1.0, 5, [1.0, wrong])):
        with pytest.raises(ValueError, match="finite"):
            rounds.earn(*earned)
        assert capture(rounds) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"interval": "autoo"}, "interval"),
        ({"interval": "25"}, "interval"),
        ({"interval": 0}, "interval"),
        ({"interval": -1}, "interval"),
        ({"interval": math.nan}, "interval"),
        ({"feedback": "raw-reward"}, "feedback"),
        ({"feedback": None}, "feedback"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        make_rounds(**options)


def test_a_closed_round_tells_everything_of_its_bandit():
    rounds = make_rounds(0.0, name="lrrl")
    bandit = rounds._bandits["agent"]
    for count, performance in enumerate((1.0, 4.0), start=1):
        rounds.begin()
        arm, probabilities = bandit.arm, bandit.probabilities.tolist()
        observe(rounds, performance)
        feedback = (4.0 - (1.0 + 4.0) / 2) * (count == 2)
        assert rounds.close() == [ClosedRound(performance, "agent", arm, ARMS[arm], probabilities, feedback)]
        assert rounds.count == count and not rounds.is_open and bandit.arm is None


def test_bandits_see_the_same_rounds_and_draw_apart():
    bandits = {name: make_bandit("uniform", ARMS, seed=(1, i)) for i, name in enumerate(("critic", "actor"))}
    rounds, arms = Rounds(bandits), []
    for n in range(20):
        rounds.begin()
        observe(rounds, n)
        critic, actor = rounds.close()
        assert (critic.bandit, actor.bandit) == ("critic", "actor")
        assert critic.performance == actor.performance == n and critic.feedback == actor.feedback
        arms.append((critic.arm, actor.arm))
    assert any(critic != actor for critic, actor in arms) and rounds.count == 20


def test_without_a_bandit_rounds_have_performances_alone():
    rounds = Rounds({}, interval=2)
    observe(rounds, 9.0)
    rounds.begin()
    observe(rounds, 1.0, 2.0)
    assert rounds.is_over and rounds.close() == [ClosedRound(1.5)]


@pytest.mark.parametrize("end", ["close", "fail"])
def test_only_an_open_round_can_end(end):
    rounds = make_rounds(1.0)
    with pytest.raises(RuntimeError, match="begin"):
        getattr(rounds, end)()
    rounds.begin()
    observe(rounds, 1.0)
    getattr(rounds, end)()
    with pytest.raises(RuntimeError, match="begin"):
        getattr(rounds, end)()


def test_a_round_in_which_nothing_was_observed_cannot_be_closed_and_stays_open():
    rounds = make_rounds(1.0, stretch=10)
    rounds.begin()
    rounds.earn(1.0, 5)
    with pytest.raises(RuntimeError, match="nothing was observed"):
        rounds.close()
    rounds.earn(19.0, 5)
    assert rounds.close()[0].performance == 2.0


# --- what ruins an agent ----------------------------------------------------------------------------------------------


def collapsed(before, *performances, **options):
    rounds = make_rounds(*before, **options)
    rounds.begin()
    observe(rounds, *performances)
    return rounds.has_collapsed


def gained(gain):
    """Observations that have started at 0 and are `gain` now, with noise 1."""
    return [0.0, *(gain + np.random.default_rng(0).standard_normal(20))]


@pytest.mark.parametrize("performances", [(3.0, 2.0), (20.0, 3.0, 2.0), (-100.0, 2.0)])
def test_a_collapse_is_two_observations_far_below_all_before_and_below_half_of_what_was_gained(performances):
    assert collapsed(gained(20.0), *performances)
    assert not collapsed(gained(20.0), *performances, rollback=False)


@pytest.mark.parametrize(
    ("gain", "performances"),
    [
        (20.0, (3.0,)),  # one bad observation may be chance
        (20.0, (3.0, 20.0)),  # it has recovered
        (20.0, (3.0, 2.0, 20.0)),
        (20.0, (20.0, 3.0)),  # as yet, one
        (20.0, (13.0, 13.0)),  # far out of the noise, but less than half of what was gained
        (2.0, (0.0, 0.0)),  # all that was gained, but within the noise
    ],
)
def test_less_is_no_collapse(gain, performances):
    assert not collapsed(gained(gain), *performances)


@pytest.mark.parametrize("before", range(7))
def test_a_fall_does_not_end_a_round_before_the_next_observation(before):
    rounds = make_rounds(*gained(20.0))
    rounds.begin()
    observe(rounds, *[rounds.before[-1]] * before, 3.0)
    assert not rounds.is_over and not rounds.has_collapsed
    observe(rounds, 2.0)
    assert rounds.has_collapsed
    recovered = make_rounds(*gained(20.0))
    recovered.begin()
    observe(recovered, 3.0, 40.0)
    assert recovered.is_over and not recovered.has_collapsed


def test_a_collapse_is_measured_against_the_round_before():
    rounds = make_rounds(*gained(20.0))
    rounds.begin()
    observe(rounds, 40.0, 41.0, 40.0, 41.0, 40.0)
    rounds.close()
    rounds.begin()
    observe(rounds, 19.0, 18.0)
    assert rounds.has_collapsed and not collapsed(gained(20.0), 19.0, 18.0)


def test_a_fall_in_the_first_round_is_no_noise_to_itself():
    assert not collapsed([-123.0], -289.0, -290.0)  # two observations are too few to know the noise
    assert collapsed([-123.0], -289.0, -320.0, -348.0)
    assert not collapsed([-123.0], -289.0, -220.0, -348.0)
    assert collapsed([0.0, 30.0], -140.0, -150.0)
    assert not collapsed([], -289.0, -320.0, -348.0)  # nothing is known of before


def ruined(*signs, healthy=0.0, closed=()):
    """What each of `signs` in a round says, after a round for each list of signs in `closed`."""
    rounds = make_rounds(0.0)
    for of_round in closed:
        rounds.begin()
        assert not any(rounds.is_ruined_by(sign, healthy) for sign in of_round)
        observe(rounds, 1.0)
        rounds.close()
    rounds.begin()
    return [rounds.is_ruined_by(sign, healthy) for sign in signs]


def test_a_sign_is_ruinous_if_no_healthy_round_had_a_hundredth_of_it():
    assert ruined(99.0, 101.0, 1.0, closed=[[0.1, 1.0], [0.5]]) == [False, True, True]
    assert ruined(1e9, math.inf) == [False, True] and ruined(math.nan) == [True]  # nothing is known in the first round
    assert ruined(99.0, 101.0, healthy=1.0) == [False, True]
    assert ruined(199.0, 201.0, healthy=1.0, closed=[[2.0]]) == [False, True]


def test_rounds_that_were_undone_for_another_reason_do_not_lower_the_limit():
    rounds = make_rounds(0.0)
    for _ in range(2):
        rounds.begin()
        assert not rounds.is_ruined_by(0.5)
        rounds.fail()
    rounds.begin()
    assert not rounds.is_ruined_by(1e9)  # nothing is known of signs, as before
    assert rounds.is_ruined_by(math.inf)


def test_what_two_rounds_in_a_row_have_is_no_longer_ruinous():
    rounds = make_rounds(0.0)
    for sign in (1e3, 1e4):
        rounds.begin()
        assert rounds.is_ruined_by(sign, healthy=1.0)
        rounds.fail()
    rounds.begin()
    assert not rounds.is_ruined_by(1.9e3, healthy=1.0) and rounds.is_ruined_by(2.1e3, healthy=1.0)
    rounds.fail()
    rounds.begin()
    assert rounds.is_ruined_by(math.inf, healthy=1.0)  # always
    rounds.fail()
    alternating = make_rounds(0.0)
    for n in range(6):
        alternating.begin()
        assert alternating.is_ruined_by(1e3 * (n % 2), healthy=1.0) == (n % 2 == 1)
        observe(alternating, 1.0)
        alternating.fail() if n % 2 else alternating.close()


def test_a_ruinous_sign_is_forgotten_with_its_round_and_nothing_is_one_without_rollback():
    rounds = make_rounds(0.0)
    for _ in range(2):
        rounds.begin()
        assert rounds.is_ruined_by(1e3, healthy=1.0)
        rounds.fail()
        assert not rounds.is_ruined_by(1e3, healthy=1.0)  # no round is open
    without = Rounds({}, rollback=False)
    without.begin()
    assert not without.is_ruined_by(math.nan)


@every_bandit
def test_a_failed_arm_is_charged_and_later_ones_are_not_praised_for_being_better(name):
    rounds = make_rounds(0.0, name=name)
    bandit = rounds._bandits["agent"]
    for performance in (1.0, 2.0, 3.0):
        rounds.begin()
        observe(rounds, performance)
        rounds.close()
    rounds.begin()
    arm, before = bandit.arm, bandit.probabilities
    (failed,) = rounds.fail()
    assert failed.feedback == -3 - (1 + 2 + 3 - 3) / 4  # 0 − (3 − 0) is the charge
    assert failed.performance is None and failed.arm == arm
    assert bandit.arm is None and list(bandit.performances) == [1.0, 2.0, 3.0]
    if name in ("peak", "lrrl"):
        assert bandit.probabilities[arm] < before[arm]
    observe(rounds, 3.0)
    rounds.begin()
    observe(rounds, 3.0)
    (closed,) = rounds.close()
    assert closed.feedback == 3.0 - (1 + 2 + 3 + 3) / 4


@every_bandit
@pytest.mark.parametrize("observed", [[], [0.0], [-5.0], [3.0, 4.0]])
def test_a_failure_in_the_first_round_is_charged_too(name, observed):
    rounds = make_rounds(*observed, name=name)
    bandit = rounds._bandits["agent"]
    rounds.begin()
    arm, before = bandit.arm, bandit.probabilities
    (failed,) = rounds.fail()
    assert failed.feedback < 0 and not bandit.performances
    if name in ("peak", "lrrl", "moss", "ducb", "wucb"):
        assert bandit.probabilities[arm] < before[arm]


def test_after_a_failure_the_agent_starts_anew_from_what_is_observed_next():
    rounds = make_rounds(*gained(20.0))
    rounds.begin()
    observe(rounds, 3.0, 2.0)
    (failed,) = rounds.fail()
    assert failed.performance == 2.5 and not rounds.before and not rounds.has_collapsed
    observe(rounds, 19.0)
    assert list(rounds.before) == [19.0]


def test_a_ruin_that_was_undone_does_not_hide_the_next_one():
    rounds = make_rounds(*gained(20.0))
    rounds.begin()
    observe(rounds, -500.0, -500.0)
    rounds.fail()
    observe(rounds, *gained(20.0)[1:])
    rounds.begin()
    observe(rounds, 3.0, 2.0)
    assert rounds.has_collapsed


@every_bandit
@given(rounds_of=st.lists(st.tuples(st.booleans(), st.lists(any_finite, max_size=4)), max_size=8))
def test_any_finite_performances_leave_finite_probabilities_however_rounds_end(name, rounds_of):
    rounds = make_rounds(name=name)
    bandit = rounds._bandits["agent"]
    for fails, performances in rounds_of:
        rounds.begin()
        observe(rounds, *performances)
        assert rounds.is_over in (True, False) and rounds.has_collapsed in (True, False)
        (closed,) = rounds.fail() if fails or not performances else rounds.close()
        assert math.isfinite(closed.feedback)
        assert bandit.probabilities.sum() == pytest.approx(1) and (bandit.probabilities >= 0).all()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_rounds_that_were_restored_amid_one_go_on_alike():
    performances = np.random.default_rng(2).standard_normal(30).cumsum()

    def play(rounds, performances):
        closed = []
        for performance in performances:
            if not rounds.is_open:
                rounds.begin()
            rounds.earn(3 * performance, 3, [performance])
            if rounds.has_collapsed or rounds.is_over:
                closed += rounds.fail() if rounds.has_collapsed else rounds.close()
        return closed

    original, restored = (make_rounds(name="peak", stretch=5) for _ in range(2))
    play(original, performances[:13])
    assert original.is_open and original.timesteps
    for x, saved in ((restored, capture(original)), (restored._bandits, capture(original._bandits))):
        restore(x, saved)
    closed = play(original, performances[13:])
    assert play(restored, performances[13:]) == closed != [] and restored.count == original.count


def test_a_bandit_of_ones_own_plays_rounds_with_probabilities_in_a_list():
    class Mine(Bandit):
        probabilities = [0.0, 1.0, 0.0, 0.0, 0.0]
        seen = 0.0

        def learn(self, feedback):
            self.seen += feedback

    mine = Mine(ARMS)
    rounds = Rounds({"mine": mine})
    for performance in (1.0, 2.0):
        rounds.begin()
        observe(rounds, performance)
        (closed,) = rounds.close()
    assert (closed.arm, closed.probabilities, closed.feedback) == (1, [0.0, 1.0, 0.0, 0.0, 0.0], 0.5)
    assert mine.seen == 0.5


@pytest.mark.parametrize("missing", ["learn", "probabilities"])
def test_a_bandit_without_what_it_needs_says_so_in_a_line(missing):
    has = {"learn": lambda self, feedback: None, "probabilities": [0.2] * 5}
    del has[missing]
    rounds = Rounds({"mine": type("Mine", (Bandit,), has)(ARMS)})
    with pytest.raises(NotImplementedError, match=rf"^Mine must define (the property )?{missing}[^\n]*$"):
        rounds.begin()
        observe(rounds, 1.0)
        rounds.close()
