"""What tracking.py promises: the numbers of summary.json, one-line errors, folders of their own."""

import json
import math
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

import ppo_continuous_lrrl
import tracking
from tests.conftest import only_folder


def test_the_final_return_takes_the_last_tenth_of_timesteps():
    episodes = [(step, float(step)) for step in range(10, 1001, 10)]
    last_tenth = [(step, 1000.0) for step in range(901, 1001, 5)]
    assert tracking.final_return([*episodes, *last_tenth[1:]][:100], 1000) == pytest.approx(955.0)  # 910, 920, …, 1000
    assert tracking.final_return(last_tenth, 1000) == 1000.0


def test_the_final_return_takes_at_least_ten_episodes():
    episodes = [(100 * n, float(n)) for n in range(1, 21)]
    assert tracking.final_return(episodes, 2000) == pytest.approx(15.5)  # 11, …, 20; two ended in the last tenth
    assert tracking.final_return(episodes[:3], 2000) == pytest.approx(2.0)
    assert tracking.final_return([], 2000) is None


def test_the_area_under_the_curve_weighs_returns_by_timesteps_and_not_by_episodes():
    assert tracking.area_under_curve([(10, 1.0), (20, 5.0), (90, 7.0)], 100) == pytest.approx(
        (10 * 1.0 + 70 * 5.0 + 10 * 7.0) / 90
    )
    assert tracking.area_under_curve([(10, 1.0), (10, 3.0), (20, 9.0)], 30) == pytest.approx(5.5)
    assert tracking.area_under_curve([(10, 4.0)], 10) == 4.0
    assert tracking.area_under_curve([], 10) is None


def test_entropy_is_in_nats():
    assert tracking.entropy([1.0, 0.0]) == 0.0
    assert tracking.entropy([0.2] * 5) == pytest.approx(math.log(5))


def test_two_runs_started_in_the_same_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.time, "time", lambda: 1e9)
    folders = [new_run(tmp_path).folder for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


def new_run(tmp_path, **options):
    args = ppo_continuous_lrrl.Args(run_dir=str(tmp_path / "runs"), cuda=False, total_timesteps=1000, **options)
    return tracking.Run(args, arms=None, device="cpu", rollouts_per_round=1)


def test_a_run_dir_that_is_a_dangling_link_is_an_error_and_no_endless_loop(tmp_path, capsys):
    (tmp_path / "runs").symlink_to(tmp_path / "no-such-disk" / "runs")
    with pytest.raises(SystemExit) as end:
        new_run(tmp_path)
    assert end.value.code == 2 and "--run-dir" in capsys.readouterr().err


def test_without_git_the_commit_is_unknown(monkeypatch):
    assert tracking.git_commit() is None or len(tracking.git_commit()) >= 40
    monkeypatch.setenv("PATH", "")
    assert tracking.git_commit() is None


def test_steps_per_second_do_not_count_what_comes_after_training(tmp_path):
    with new_run(tmp_path) as run:
        run.progress(100, 1e-3)
        run.progress(600, 1e-3)
        trained = run.sps
        time.sleep(0.2)
        assert run.sps == trained > 0


def test_a_figure_that_cannot_be_drawn_changes_neither_the_exit_code_nor_the_summary(tmp_path, monkeypatch, capsys):
    def fail(folder):
        raise MemoryError("no room to draw")

    monkeypatch.setattr(tracking, "plot_curves", fail)
    with pytest.raises(SystemExit) as end, new_run(tmp_path) as run:
        raise FloatingPointError("learning rate 7 was too much")
    error = capsys.readouterr().err
    assert end.value.code == 3 and "no room to draw" in error and "learning rate 7" in error
    assert json.loads((run.folder / "summary.json").read_text())["status"] == "diverged"


def test_an_interrupt_while_the_logs_are_opened_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.Run, "_start_wandb", lambda self: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end, new_run(tmp_path, track=True):
        raise AssertionError("the block must not be entered")
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert end.value.code == 130 and json.loads(summary.read_text())["status"] == "interrupted"


def test_csv_files_read_back_with_empty_fields_as_nan(tmp_path):
    path = Path(tmp_path, "rounds.csv")
    path.write_text("a,b\n")
    assert {name: column.tolist() for name, column in tracking.read_csv(path).items()} == {"a": [], "b": []}
    path.write_text("a,b\n1,\n2,0.5\n")
    columns = tracking.read_csv(path)
    assert columns["a"].tolist() == [1.0, 2.0] and math.isnan(columns["b"][0]) and columns["b"][1] == 0.5


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


def track(start, port):
    environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    options = "--env-id Pendulum-v1 --num-steps 64 --num-minibatches 4 --update-epochs 1 --total-timesteps 12800"
    return start(
        f"ppo_continuous_lrrl.py {options} --track", **environment, WANDB_INIT_TIMEOUT="2", WANDB_FINISH_TIMEOUT="1"
    )


def finished(process, tmp_path):
    output, error = process.communicate(timeout=100)
    run = only_folder(tmp_path / "runs")
    assert process.returncode == 0 and run.summary["status"] == "finished", error
    assert len(run.episodes["global_step"]) == 64
    return run, output, error


def test_a_run_goes_on_offline_if_wandb_cannot_be_reached(start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # of nobody, once this block has ended
    run, _, error = finished(track(start, port), tmp_path)
    assert "tracking offline" in error and [*run.path.glob("wandb/offline-run-*/*.wandb")]


@pytest.mark.parametrize("trouble", ["its server goes away", "its process dies"])
def test_a_run_goes_on_if_wandb_is_lost_on_the_way(trouble, start, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever).start()
    try:
        process = track(start, server.server_port)
        while not any(path.read_text().count("\n") > 1 for path in tmp_path.glob("runs/*/episodes.csv")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
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
