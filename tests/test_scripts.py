"""What programs that start training scripts rely on: a script ends with them, and with a checkpoint of its own."""

import os
import subprocess
import sys
import time

from tests.conftest import ROOT, wait_for

TRAIN = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {{2}}); from lrrl_utils.scripts import train; {call}"
SCRIPT = """
import os, signal, time
def save(*_):
    print("saved", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, save)
print(os.environ["OMP_NUM_THREADS"], signal.pthread_sigmask(signal.SIG_BLOCK, []), os.getsid(0), flush=True)
time.sleep(60)
"""


def start(tmp_path, call):
    (tmp_path / "script.py").write_text(SCRIPT)  # an absolute path: ROOT / script is script
    call = call.format(script=repr(str(tmp_path / "script.py")))
    command = [sys.executable, "-c", TRAIN.format(call=call)]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"), process)
    return process, log


def assert_saved(log):
    end = time.monotonic() + 60
    while not log.read_text().endswith("saved\n"):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def test_a_script_saves_when_its_parent_is_killed(tmp_path):
    process, log = start(tmp_path, "train({script}, [], 'log')")
    threads, signals, session = log.read_text().split()
    assert (threads, signals, int(session)) == ("1", "set()", os.getsid(0))
    process.kill()
    process.wait()
    assert_saved(log)


def test_a_script_saves_when_a_signal_ends_its_parent(tmp_path):
    stop = "signal.signal(signal.SIGTERM, lambda *_: exit(1)); "  # as Ray's workers do
    process, log = start(tmp_path, stop + "train({script}, [], 'log', own_session=True)")
    assert int(log.read_text().split()[2]) != os.getsid(0)
    process.terminate()
    assert process.wait() == 1
    assert_saved(log)
