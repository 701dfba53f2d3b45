"""What lrrl_utils/schedules.py promises: the rates of torch's schedulers at every timestep, the arms that are meant."""

import math
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from lrrl_utils.schedules import ARM_SETS, ArmSet, choose_arms, scheduled_rate

ARMS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
N, RATE, DECAY, LOW, HIGH, HALF = 1000, 3e-4, 2e-3, 3e-5, 3e-3, 70


def rates_of(control):
    options = {"learning_rate": RATE, "total_timesteps": N, "lr_decay_rate": DECAY, "lr_control": control}
    options |= {"cyclic_base_lr": LOW, "cyclic_max_lr": HIGH, "cyclic_half_period": HALF}
    return [scheduled_rate(SimpleNamespace(**options), t) for t in range(N + 1)]


@pytest.mark.parametrize(
    ("control", "scheduler", "options"),
    [
        ("linear", lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": 0.0, "total_iters": N}),
        ("exponential", lr_scheduler.ExponentialLR, {"gamma": math.exp(-DECAY)}),
        ("cosine", lr_scheduler.CosineAnnealingLR, {"T_max": N}),
        ("cyclic", lr_scheduler.CyclicLR, {"base_lr": LOW, "max_lr": HIGH, "step_size_up": HALF}),
    ],
)
def test_a_schedule_has_the_rates_of_torchs(control, scheduler, options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE, momentum=0.9)
    reference, rates = scheduler(optimizer, **options), []
    for _ in range(N + 1):
        rates.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    # torch multiplies rates step by step, so that its rounding errors add up: near 0 they are all there is
    assert rates_of(control) == pytest.approx(rates, rel=1e-12, abs=1e-12 * RATE)


def test_schedules_start_and_end_where_they_should():
    assert {control: rates_of(control)[0] for control in ("linear", "exponential", "cosine")} == dict.fromkeys(
        ("linear", "exponential", "cosine"), RATE
    )
    assert rates_of("linear")[-1] == rates_of("cosine")[-1] == 0
    assert min(rates_of("linear")) == min(rates_of("cosine")) == 0  # never less
    cyclic = rates_of("cyclic")
    assert cyclic[0] == cyclic[2 * HALF] == LOW and cyclic[HALF] == cyclic[3 * HALF] == HIGH
    assert min(cyclic) == LOW and max(cyclic) == HIGH


@pytest.mark.parametrize("control", ["constant", "kl", "bandit"])
def test_without_a_schedule_the_rate_stays(control):
    assert set(rates_of(control)) == {RATE}


def test_arm_sets_are_the_papers():
    sets = {"all5": ARMS, "lowest3": ARMS[:3], "middle3": ARMS[1:4], "highest3": ARMS[2:], "sparse3": ARMS[::2]}
    assert {name: choose_arms(name, None, ARMS) for name in ARM_SETS} == sets and get_args(ArmSet) == tuple(sets)


def test_rates_of_ones_own_are_the_arms():
    assert choose_arms((1.0,), None, ARMS) == (1.0,)


def test_a_range_becomes_25_rates_in_equal_ratios():
    arms = choose_arms("all5", (1e-5, 1e-2), ARMS)
    assert len(arms) == 25 and arms[0] == pytest.approx(1e-5) and arms[-1] == pytest.approx(1e-2)
    assert np.diff(np.log10(arms)) == pytest.approx(3 / 24) and {type(rate) for rate in arms} == {float}


@pytest.mark.parametrize("wrong", [(1e-2, 1e-5), (1e-3, 1e-3), (0.0, 1e-3), (1e-3, math.inf), (math.nan, 1e-3)])
def test_a_range_that_does_not_ascend_is_refused(wrong):
    with pytest.raises(ValueError, match="ascending"):
        choose_arms("all5", wrong, ARMS)
