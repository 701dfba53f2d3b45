"""Runs the published comparison of bandits with arms in other places; stopped, it goes on when started again.

    python results/ppo_arms/run.py

A run is skipped if this folder holds it already, finished. Runs of 300,000 timesteps, two at a time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from grid import run_grid

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (21, 22, 23, 24, 25)
FIVE = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
FIVE_ARMS = {"learning_rates": FIVE}
ELSEWHERE = [
    {"lr_range": [1e-6, 1.0]},
    {"learning_rates": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]},  # the best constant rate is the lowest
    {"learning_rates": [3e-6, 1e-5, 3e-5, 1e-4, 3e-4]},  # … the highest
    {"learning_rates": [*FIVE, 0.1, 1.0]},  # two rates wreck the policy
]
OTHERS = [
    *({"lr_control": "constant", "learning_rate": rate} for rate in (3e-4, 1e-4, 1e-3)),
    {"lr_control": "kl"},
    {"lr_control": "exponential", "learning_rate": 1e-3, "lr_decay_rate": 7.675e-6},  # 1e-3 to 1e-4
]
BANDITS = ("peak", "prior", "uniform")
VARIANTS = [
    FIVE_ARMS | {"bandit": "peak"},
    OTHERS[0],
    *(FIVE_ARMS | {"bandit": name} for name in BANDITS[1:]),
    *OTHERS[1:],
]
VARIANTS += [arms | {"bandit": bandit} for arms in ELSEWHERE for bandit in BANDITS]

grid = [{"env_id": task, "seed": seed} | variant for variant in VARIANTS for seed in SEEDS for task in TASKS]
run_grid(Path(__file__).parent, grid, {"lr_control": "bandit", "learning_rate": 3e-4, "lr_range": None})
