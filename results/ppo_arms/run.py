"""Runs the published comparison of `peak` with rivals, over five sets of arms; stopped, it goes on when started again.

    python results/ppo_arms/run.py

A run is skipped if this folder holds it already, finished. 285 runs of 300,000 timesteps, two at a time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from grid import run_grid

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (21, 22, 23, 24, 25)
FIVE = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
SETS = [
    {"learning_rates": FIVE},
    {"lr_range": [1e-6, 1.0]},
    {"learning_rates": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]},
    {"learning_rates": [3e-6, 1e-5, 3e-5, 1e-4, 3e-4]},
    {"learning_rates": [*FIVE, 0.1, 1.0]},
]
VARIANTS = [
    {"lr_control": "constant"},
    *({"bandit": "peak"} | arms for arms in SETS),
    {"lr_control": "kl"},
    {"lr_control": "exponential", "learning_rate": 1e-3, "lr_decay_rate": 7.675e-6},
    {"lr_control": "linear", "learning_rate": 1e-3},
    *({"bandit": "uniform"} | arms for arms in SETS),
    *({"bandit": "prior"} | arms for arms in SETS),
]

grid = [{"env_id": task, "seed": seed} | variant for variant in VARIANTS for seed in SEEDS for task in TASKS]
run_grid(Path(__file__).parent, grid, {"lr_control": "bandit", "learning_rate": 3e-4, "lr_range": None})
