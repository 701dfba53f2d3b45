"""Runs the published comparison of `peak` with the best constant rate; stopped, it goes on when started again.

    python results/ppo_arms/run.py

A run is skipped if this folder holds it already, finished. 45 runs of 300,000 timesteps, two at a time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from grid import run_grid

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (21, 22, 23, 24, 25)
VARIANTS = [
    {"lr_control": "constant", "learning_rate": 3e-4},
    {"bandit": "peak", "learning_rates": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]},
    {"bandit": "peak", "lr_range": [1e-6, 1.0]},
]

grid = [{"env_id": task, "seed": seed} | variant for variant in VARIANTS for seed in SEEDS for task in TASKS]
run_grid(Path(__file__).parent, grid, {"lr_control": "bandit", "learning_rate": 3e-4, "lr_range": None})
