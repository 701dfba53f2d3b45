"""Where a run comes from: versions, device, commit and code, for its config.json."""

import contextlib
import hashlib
import platform
import subprocess
from importlib.metadata import version

PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "mujoco", "tyro", "wandb", "tensorboard")


def describe_origin(files, device):
    """Versions, device, git commit and, of the code in `files`, SHA-256 sums by file name."""
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": str(device),
        "git_commit": git_commit(files[0].parent),
        "code": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


def git_commit(folder):
    """The commit of the code in `folder`, "-dirty" behind it if it was changed since; None if git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # there is no git, or it hangs
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=False)
        return process.stdout.strip() or None
