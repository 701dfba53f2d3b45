"""Runs the published comparison of bandits and fixed rates; stopped at any moment, it goes on when started again.

    python results/ppo_bandits/run.py

A run is skipped if this folder holds it already, finished. 150 runs of 300,000 timesteps, two at a time. Those of
`drift` need its commit, which results/README.md names.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from grid import run_grid

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (1, 2, 3, 4, 5)
ARMS = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
VARIANTS = [  # what differs from the defaults
    *({"lr_control": "constant", "learning_rate": rate} for rate in (3e-4, 1e-3, 1e-4, 3e-3, 3e-5)),
    {"lr_control": "linear"},
    *({"bandit": bandit} for bandit in ("drift", "uniform", "lrrl")),
    {"bandit": "drift", "learning_rates": [*ARMS, 0.1, 1.0]},  # two rates that wreck the policy
]

grid = [{"env_id": task, "seed": seed} | variant for variant in VARIANTS for seed in SEEDS for task in TASKS]
run_grid(Path(__file__).parent, grid, {"lr_control": "bandit", "learning_rate": 3e-4, "learning_rates": ARMS})
