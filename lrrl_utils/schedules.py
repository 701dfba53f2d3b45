"""Learning rates as functions of the timestep, and what the options for the bandit's arms mean."""

import math
from typing import Literal

import numpy as np

ARM_SETS = {  # the paper's subsets of its five Atari rates, as slices of five rates in ascending order
    "all5": slice(0, 5),
    "lowest3": slice(0, 3),
    "middle3": slice(1, 4),
    "highest3": slice(2, 5),
    "sparse3": slice(0, 5, 2),
}
ArmSet = Literal[tuple(ARM_SETS)]


def scheduled_rate(args, t):
    """The rate that `args.lr_control` sets after `t` timesteps; `args.learning_rate` where that is no schedule.

    linear and cosine end at 0 after `args.total_timesteps` (Loshchilov and Hutter, arXiv 1608.03983, eq. 5, for the
    latter); exponential is η exp(−d t); cyclic is the triangle of Smith, arXiv 1506.01186.
    """
    match args.lr_control:
        case "linear":
            return args.learning_rate * (1 - t / args.total_timesteps)
        case "cosine":
            return args.learning_rate * (1 + math.cos(math.pi * t / args.total_timesteps)) / 2
        case "exponential":
            return args.learning_rate * math.exp(-args.lr_decay_rate * t)
        case "cyclic":
            height = 1 - abs(1 - t / args.cyclic_half_period % 2)
            return args.cyclic_base_lr + (args.cyclic_max_lr - args.cyclic_base_lr) * height
    return args.learning_rate


def choose_arms(rates, lr_range, five):
    """The learning rates that the options mean, a tuple.

    Args:
        rates: what --learning-rates gives, rates or the name of a set of `five`.
        lr_range: what --lr-range gives instead: None or the ends of a range, for 25 rates in equal ratios.

    Raises:
        ValueError: the ends of the range are not positive, finite and in ascending order.
    """
    if lr_range:
        low, high = lr_range
        if not 0 < low < high < math.inf:
            raise ValueError(f"must be two positive rates in ascending order, not {low:g} {high:g}")
        return tuple(float(rate) for rate in np.geomspace(low, high, 25))
    return five[ARM_SETS[rates]] if isinstance(rates, str) else rates
