"""What lrrl_utils/logs.py and measures.py promise: the numbers of summary.json, and logs that nothing can end."""

import errno
import json
import math
import os
import resource
import shutil
import socket
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch

import ppo_continuous_lrrl as ppo
from bandits import Rounds
from lrrl_utils import logs
from lrrl_utils.logs import Logs
from lrrl_utils.measures import area_under_curve, entropy, final_return, read_csv, shown_rate
from tests.conftest import PENDULUM, assert_equal_to_the_bit, only_folder, resume, scalars, wait_for

# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_final_return_takes_the_last_tenth_of_timesteps():
    episodes = [(step, float(step)) for step in range(10, 1001, 10)]
    last_tenth = [(step, 1000.0) for step in range(901, 1001, 5)]
    assert final_return([*episodes, *last_tenth[1:]][:100], 1000) == pytest.approx(955.0)  # 910, 920, …, 1000
    assert final_return(last_tenth, 1000) == 1000.0


def test_the_final_return_takes_at_least_ten_episodes():
    episodes = [(100 * n, float(n)) for n in range(1, 21)]
    assert final_return(episodes, 2000) == pytest.approx(15.5)  # 11, …, 20; two ended in the last tenth
    assert final_return(episodes[:3], 2000) == pytest.approx(2.0)
    assert final_return([], 2000) is None


def test_the_area_under_the_curve_weighs_returns_by_timesteps_and_not_by_episodes():
    assert area_under_curve([(10, 1.0), (20, 5.0), (90, 7.0)], 100) == pytest.approx((10 + 70 * 5 + 10 * 7) / 90)
    assert area_under_curve([(10, 1.0), (10, 3.0), (20, 9.0)], 30) == pytest.approx(5.5)
    assert area_under_curve([(10, 4.0)], 10) == 4.0
    assert area_under_curve([], 10) is None


def test_entropy_is_in_nats():
    assert entropy([1.0, 0.0]) == 0.0
    assert entropy([0.2] * 5) == pytest.approx(math.log(5))


def test_a_rate_is_shown_as_it_was_given_and_not_as_a_float32_has_it():
    for rate in (3e-5, 1e-4, 3e-4, 1e-3, 6.25e-5, 1.5625e-5, 0.1, 1e30):
        assert shown_rate(torch.tensor(rate)) == rate


def test_csv_files_read_back_with_empty_fields_as_nan(tmp_path):
    path = tmp_path / "rounds.csv"
    path.write_text("a,b\n")
    assert {name: column.tolist() for name, column in read_csv(path).items()} == {"a": [], "b": []}
    path.write_text("a,controller\n1,critic\n,actor\n")
    columns = read_csv(path)
    assert columns["a"][0] == 1 and math.isnan(columns["a"][1])
    assert columns["controller"].tolist() == ["critic", "actor"]


# --- TensorBoard ------------------------------------------------------------------------------------------------------

CONTROLS = ["bandit", "constant", "linear", "cosine", "exponential", "cyclic", "kl"]


@pytest.mark.parametrize("control", CONTROLS)
def test_every_iteration_of_ppo_has_a_point_of_the_learning_rate_whatever_sets_it(control, train):
    run = train(ppo.main, f"{PENDULUM} --total-timesteps 640 --lr-control {control}")
    points = scalars(run.path, "charts/learning_rate")
    assert [step for step, _ in points] == [*range(64, 641, 64)]
    used = dict(points)  # the first rollout counts for no round: a round's row follows the update with its rate
    for step, rate in zip(run.rounds["global_step"], run.rounds["learning_rate"]):
        assert control == "kl" or used[step - 64] == pytest.approx(rate)


def test_so_has_an_iteration_whose_round_is_undone(train, monkeypatch):
    monkeypatch.setattr(Rounds, "has_collapsed", property(lambda self: self.count == 3 and bool(self.observations)))
    run = train(ppo.main, f"{PENDULUM} --total-timesteps 640 --bandit-feedback reward")
    assert run.summary["rollbacks"] == 1
    assert [step for step, _ in scalars(run.path, "charts/learning_rate")] == [*range(64, 641, 64)]


def test_what_a_round_shows_is_what_its_row_says(train):
    run = train(ppo.main, f"{PENDULUM} --total-timesteps 640 --bandit lrrl")
    steps = run.rounds["global_step"].tolist()
    for name, column in (("performance", "performance"), ("feedback", "feedback"), ("arm", "arm")):
        points = scalars(run.path, f"lrrl/{name}")
        assert [step for step, _ in points] == steps
        assert [value for _, value in points] == pytest.approx(run.rounds[column].tolist(), rel=1e-6)
    for arm, rate in enumerate(ppo.Args.learning_rates):
        probabilities = [value for _, value in scalars(run.path, f"lrrl/probability/{rate:g}")]
        assert probabilities == pytest.approx(run.rounds[f"p_{arm}"].tolist(), rel=1e-6)
    assert scalars(run.path, "lrrl/entropy")[0][1] == pytest.approx(math.log(5))
    assert scalars(run.path, "lrrl/pull_entropy")[0][1] == 0


def test_a_writer_that_hangs_at_the_end_is_left_behind(train, monkeypatch, capsys):
    monkeypatch.setattr(logs, "CLOSING_SECONDS", 0.1)
    monkeypatch.setattr(logs.SummaryWriter, "close", lambda self: time.sleep(60))
    start = time.monotonic()
    assert train(ppo.main, f"{PENDULUM} --total-timesteps 64").summary["status"] == "finished"
    assert time.monotonic() - start < 30 and "TensorBoard's events (its writer hangs)" in capsys.readouterr().err


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def some_logs(tmp_path):
    some_logs = Logs(tmp_path, {})
    some_logs.open_tables()
    return some_logs


@pytest.fixture
def disk(monkeypatch):
    """A full disk is one with `disk.room` 0 bytes left."""

    class Disk:
        room = 10**9

        def write(self, descriptor, data, write=os.write):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = write(descriptor, data[: self.room])
            self.room -= written
            return written

    disk = Disk()
    monkeypatch.setattr("lrrl_utils.logs.os", type("os", (), vars(os) | {"write": disk.write}))
    return disk


@pytest.mark.parametrize("room", [0, 1, 5, 12])
@pytest.mark.parametrize("freed", ["before the last row", "before the end"])
def test_rows_that_meet_a_full_disk_are_all_there_once_it_has_room(freed, room, disk, some_logs, tmp_path, capsys):
    some_logs.log_episode(1, 1.0, 1)
    disk.room = room  # a row may be torn
    for n in (2, 3, 4):
        some_logs.log_episode(n, float(n), 1)
    assert capsys.readouterr().err.count("episodes.csv cannot be written: No space left on device") == 1
    if freed == "before the last row":
        disk.room = 10**9
    some_logs.log_episode(5, 5.0, 1)
    disk.room = 10**9
    some_logs.close()
    rows = [f"{n},{n}.0,1\n" for n in range(1, 6)]
    assert (tmp_path / "episodes.csv").read_text() == "global_step,episodic_return,episodic_length\n" + "".join(rows)
    assert not some_logs.problems


def test_rows_that_never_find_room_are_reported(disk, some_logs):
    disk.room = 3
    some_logs.log_episode(1, 1.0, 1)
    some_logs.close()
    assert some_logs.problems == {"episodes.csv": "No space left on device"}


def test_a_file_that_is_written_after_all_is_no_problem_any_more(some_logs, tmp_path):
    (tmp_path / "summary.json").mkdir()
    some_logs.write_json("summary.json", {})
    assert some_logs.problems == {"summary.json": "Is a directory"}
    (tmp_path / "summary.json").rmdir()
    some_logs.write_json("summary.json", {})
    assert not some_logs.problems


def test_rows_that_have_found_no_room_by_a_checkpoint_are_written_when_the_run_goes_on(stop, train, monkeypatch, disk):
    open_tables = Logs.open_tables

    def fill(self, *sizes):
        open_tables(self, *sizes)
        disk.room = 50

    options = f"{PENDULUM} --total-timesteps 1024 --save-model"
    with monkeypatch.context() as patch:
        patch.setattr(Logs, "open_tables", fill)
        folder = stop(ppo.main, options, 3)
    assert len((folder / "rounds.csv").read_text().splitlines()) < 4
    disk.room = 10**9
    assert_equal_to_the_bit(resume(ppo.main, folder).path, train(ppo.main, options).path)


def test_a_disk_that_is_full_for_a_while_costs_no_row(start, train, tmp_path):
    options = f"{PENDULUM} --total-timesteps 12800 --checkpoint-interval 0"
    process = start(f"ppo_continuous_lrrl.py {options}", limit=4000)
    while "rounds.csv cannot be written" not in (line := process.stderr.readline()):
        assert line and process.poll() is None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    output, error = process.communicate()
    assert process.returncode == 0 and "Traceback" not in error and "rounds.csv (" not in error
    run, whole = only_folder(tmp_path / "runs"), train(ppo.main, options)
    for name in ("episodes.csv", "rounds.csv"):
        assert run.bytes(name) == whole.bytes(name), name


def test_a_disk_that_is_full_from_the_start_does_not_end_the_training(start):
    process = start(f"ppo_continuous_lrrl.py {PENDULUM} --total-timesteps 256", limit=1)
    output, error = process.communicate()
    assert process.returncode == 0 and "finished" in output and "Traceback" not in error, error
    for name in ("config.json", "rounds.csv", "checkpoint.pt", "TensorBoard's events"):
        assert f"{name} cannot be written" in error


def test_a_run_folder_that_goes_away_does_not_end_the_training(start, tmp_path):
    process = start(f"ppo_continuous_lrrl.py {PENDULUM} --total-timesteps 12800")
    wait_for(lambda: [*(tmp_path / "runs").glob("*/checkpoint.pt")], process)
    (tmp_path / "runs").rename(tmp_path / "gone")  # at once, for a file may be written just now
    shutil.rmtree(tmp_path / "gone")
    output, error = process.communicate()
    assert process.returncode == 0 and "finished" in output, error
    assert "checkpoint.pt cannot be written" in error and "is not complete" in error and "Traceback" not in error


@pytest.mark.parametrize("where", ["the run folder", "nowhere"])
def test_a_model_that_finds_no_room_in_the_run_folder_is_saved_elsewhere(where, train, tmp_path, monkeypatch, capsys):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    written_whole = logs.written_whole

    def fail(path):
        if path.name == "model.pt" or where == "nowhere":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written_whole(path)

    monkeypatch.setattr(logs, "written_whole", fail)
    run = train(ppo.main, f"{PENDULUM} --total-timesteps 64 --save-model")
    error = capsys.readouterr().err
    assert run.summary["status"] == "finished" and "model.pt (No space left on device" in error
    saved = tmp_path / "tmp" / f"{run.path.name}-model.pt"
    assert (f"it is {saved}" in error) == (where == "the run folder") == saved.exists()
    assert where == "nowhere" or "agent" in torch.load(saved, weights_only=True)


def test_a_return_that_is_not_finite_ends_the_run(some_logs):
    with pytest.raises(FloatingPointError):
        some_logs.log_episode(1, math.nan, 1)
    assert not some_logs.episodes


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class WandbServer(BaseHTTPRequestHandler):
    """As much of a W&B server as a client needs to start a run; `WandbServer.posts` has what was sent."""

    ENTITY = {"id": "e", "name": "e"}
    BUCKET = {"id": "b", "name": "n", "displayName": "n", "config": "{}", "project": {"name": "lrrl", "entity": ENTITY}}
    ANSWERS = {
        "Viewer": {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}},
        "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    }
    posts = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.posts.append((self.path, body))
        answer = json.dumps({"data": self.ANSWERS.get(body.get("operationName"), {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def track(start, port, timesteps, seconds):
    """A tracked run, which gives up after some seconds if its server does not answer."""
    environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    options = f"--env-id Pendulum-v1 --num-steps 64 --num-minibatches 4 --update-epochs 1 --total-timesteps {timesteps}"
    environment |= {"WANDB_INIT_TIMEOUT": str(seconds), "WANDB_FINISH_TIMEOUT": "1"}
    return start(f"ppo_continuous_lrrl.py {options} --track", fresh=True, **environment)


def finished(process, tmp_path):
    output, error = process.communicate(timeout=100)
    run = only_folder(tmp_path / "runs")
    assert process.returncode == 0 and run.summary["status"] == "finished", error
    assert len(run.episodes["global_step"]) == run.summary["global_step"] // 200
    return run, output, error


def test_a_run_goes_on_offline_if_wandb_cannot_be_reached(start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # of nobody, once this block has ended
    run, _, error = finished(track(start, port, 1280, seconds=2), tmp_path)
    assert "tracking offline" in error and [*run.path.glob("wandb/offline-run-*/*.wandb")]


@pytest.mark.parametrize("trouble", ["its server goes away", "its process dies"])
def test_a_run_goes_on_if_wandb_is_lost_on_the_way(trouble, start, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever).start()
    WandbServer.posts.clear()
    try:
        process = track(start, server.server_port, 12800, seconds=60)
        wait_for(
            lambda: any(path.read_text().count("\n") > 1 for path in tmp_path.glob("runs/*/episodes.csv")), process
        )
        if trouble == "its process dies":
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
    finally:
        server.shutdown()
        server.server_close()
    run, output, error = finished(process, tmp_path)
    assert "online" not in error and any(path == "/graphql" for path, _ in WandbServer.posts)
    if trouble == "its process dies":
        assert f"{run.path} is not complete: W&B's log" in error
    else:
        assert "wandb sync" in output + error
