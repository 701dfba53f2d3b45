"""How many timesteps per second the scripts take on this machine, after start-up, with and without --compile:

    OMP_NUM_THREADS=1 python -m lrrl_utils.speed            # all scripts, some ten minutes
    OMP_NUM_THREADS=1 python -m lrrl_utils.speed ppo sac

Leave the machine alone meanwhile.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from lrrl_utils.files import read_json
from lrrl_utils.terminal import reject

HERE = Path(__file__).parent.parent
ATARI = "--total-timesteps 4000 --learning-starts 1000 --buffer-size 20000 --bandit-interval 200"
RUNS = {  # what is measured of each script: enough steps for a rate
    "ppo": ("ppo_continuous_lrrl.py", "--total-timesteps 61440"),
    "sac": ("sac_mujoco_lrrl.py", "--total-timesteps 4000 --learning-starts 1000"),
    "dqn": ("dqn_atari_lrrl.py", f"--preset cleanrl {ATARI}"),
    "iqn": ("iqn_atari_lrrl.py", f"--padding valid {ATARI}".replace("4000", "1600")),
    "minatar": ("dqn_minatar_lrrl.py", ATARI.replace("4000", "11000")),
}


def measure(script, *options):
    """Timesteps per second of a run, without set-up, compilation and warm-up. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE / script, *options, "--run-dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (summary,) = Path(folder).glob("*/summary.json")
        return read_json(summary)["sps"]


def main(names):
    if unknown := set(names) - RUNS.keys():
        reject(f"{' '.join(sorted(unknown))}: must be some of {' '.join(RUNS)}")
    print("| script | timesteps per second | with --compile | ratio |\n|-|-|-|-|", flush=True)
    for name in names or RUNS:
        script, options = RUNS[name]
        plain, fast = (measure(script, *options.split(), option) for option in ("--no-compile", "--compile"))
        print(f"| {script} | {plain:,.0f} | {fast:,.0f} | {fast / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
