"""What the bandits of others promise: their papers' equations, their bounds, and that those forget that claim to."""

import math

import numpy as np
import pytest

from bandits import Uniform
from lrrl_utils.rivals import DUCB, MOSS, RIVALS, WUCB, Exp3, find_bandit

ARMS = [1e-4, 1e-3]


def test_every_rival_is_found_by_its_name():
    assert {name: find_bandit(name) for name in RIVALS} == {"exp3": Exp3, "moss": MOSS, "ducb": DUCB, "wucb": WUCB}


def test_exp3_follows_its_equations_worked_out_by_hand():
    bandit = Exp3(ARMS, decay=0.5, exploration=0.2)
    assert bandit.probabilities.tolist() == [0.5, 0.5]
    bandit.arm = 0
    bandit.learn(1.0)  # alone, its range is empty: reward 0
    bandit.arm = 0
    bandit.learn(3.0)  # the best so far: reward 1
    assert bandit.gains == pytest.approx([1 / 0.5, 0])
    p = 0.8 * math.exp(0.1 * 2) / (math.exp(0.1 * 2) + 1) + 0.1
    assert bandit.probabilities[0] == pytest.approx(p)
    bandit.arm = 1
    bandit.learn(2.0)  # in the middle: reward 0.5
    assert bandit.gains == pytest.approx([0.5 * 2, 0.5 / (1 - p)])


@pytest.mark.parametrize("kind", RIVALS.values())
def test_a_charge_does_not_widen_the_range_in_which_others_are_compared(kind):
    bandit, rewards = kind([1e-4, 1e-3, 1e-2]), [0.0, 10.0, 4.0]
    for arm, reward in enumerate(rewards):
        bandit.arm = arm
        bandit.learn(reward)
    bandit.arm = 0
    assert bandit.fail(-1000.0, before=[5.0]) < -500
    assert (bandit.worst, bandit.best) == (0, 10) and bandit.scale(4.0) == 0.4
    assert np.isfinite(bandit.probabilities).all() and bandit.probabilities.argmax() > 0
    first = kind(ARMS)
    first.arm = 0
    assert first.fail(-1000.0, before=[5.0]) < -500
    assert first.scale(0.0) == 0 and np.isfinite(first.probabilities).all()  # before any range is known


@pytest.mark.parametrize(
    ("bandit", "bonus"),
    [
        (MOSS(ARMS), lambda n: math.sqrt(1.175 * max(0, math.log(4 / (2 * n))) / n)),
        (DUCB(ARMS, decay=1.0), lambda n: 2 * math.sqrt(0.5 * math.log(4) / n)),
        (WUCB(ARMS, memory=9), lambda n: math.sqrt(math.log(4) / n)),
    ],
    ids=["moss", "ducb", "wucb"],
)
def test_index_bandits_pull_the_largest_mean_plus_bonus_worked_out_by_hand(bandit, bonus):
    bandit.arm = 0
    bandit.learn(0.0)
    assert bandit.probabilities.tolist() == [0, 1]  # an arm that is new comes first
    for arm, reward in ((1, 10.0), (0, 5.0), (0, 4.0)):
        bandit.arm = arm
        bandit.learn(reward)
    assert bandit.bonus(bandit.pulls) == pytest.approx([bonus(3), bonus(1)])
    indices = [0.3 + bonus(3), 1.0 + bonus(1)]  # means 3 and 10, of rewards between 0 and 10
    assert bandit.probabilities.argmax() == np.argmax(indices)


def test_discounted_and_windowed_bandits_forget_at_their_rates():
    ducb, wucb = DUCB(ARMS, decay=0.5), WUCB(ARMS, memory=2)
    for arm, reward in ((0, 1.0), (1, 3.0), (1, 4.0)):
        for bandit in (ducb, wucb):
            bandit.arm = arm
            bandit.learn(reward)
    assert ducb.pulls == pytest.approx([0.25, 1.5]) and ducb.totals == pytest.approx([0.25, 5.5])
    wucb.learn(9.0)
    assert wucb.pulls.tolist() == [1, 3] and wucb.means.tolist() == [1.0, 6.5]


def regret(bandit, means, seed=0):
    """Pseudo-regret after each round of Bernoulli rewards; `means` (rounds, K)."""
    uniforms = np.random.default_rng(seed).random(len(means))
    lost = []
    for mean, u in zip(means, uniforms):
        arm = bandit.pull()
        bandit.learn(float(u < mean[arm]))
        lost.append(mean.max() - mean[arm])
    return np.sum(lost)


def test_moss_and_ucb_stay_within_their_published_bounds_where_uniform_does_not():
    means = np.tile([0.95, 0.05], (30_000, 1))
    rounds, gap = len(means), 0.9
    moss_bound = 49 * math.sqrt(2 * rounds)  # Audibert and Bubeck 2009, theorem 5
    ucb_bound = 8 * math.log(rounds) / gap + (1 + math.pi**2 / 3) * gap  # Auer, Cesa-Bianchi and Fischer 2002
    assert regret(MOSS(ARMS), means) < min(moss_bound, 100)
    assert regret(DUCB(ARMS, decay=1.0), means) < ucb_bound
    assert regret(Uniform(ARMS), means) > max(moss_bound, ucb_bound)


@pytest.mark.parametrize(
    ("forgetting", "itself", "rounds"),
    [
        (lambda: DUCB(ARMS, decay=0.999), lambda: DUCB(ARMS, decay=1.0), 5000),
        (lambda: WUCB(ARMS), lambda: WUCB(ARMS, memory=10**9), 1000),
        (lambda: Exp3(ARMS, decay=0.999), lambda: Exp3(ARMS, decay=1.0), 5000),
    ],
    ids=["ducb", "wucb", "exp3"],
)
def test_where_the_best_arm_becomes_the_worst_those_that_forget_beat_themselves_without(forgetting, itself, rounds):
    means = np.repeat([[0.9, 0.5], [0.1, 0.5]], rounds, axis=0)
    losses = [[regret(make(), means, seed) for seed in range(2)] for make in (forgetting, itself)]
    assert max(losses[0]) < min(losses[1]) / 2


@pytest.mark.parametrize(
    ("bandit", "options"),
    [(Exp3, {"decay": 0.0}), (Exp3, {"exploration": 1.1}), (DUCB, {"decay": math.nan}), (WUCB, {"memory": 0})],
)
def test_options_out_of_range_are_refused_by_name(bandit, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bandit(ARMS, **options)
