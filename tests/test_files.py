"""What lrrl_utils/files.py promises: whole files, one writer at a time, and that a run folder may come from anyone."""

import json
import os
import stat
import sys

import pytest

import ppo_continuous_lrrl as ppo
from lrrl_utils.files import lock, open_regular, read_json, write_json, written_whole
from tests.conftest import contents, resume

KINDS = {
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_CREAT])
def test_what_is_no_regular_file_is_not_opened(kind, flags, tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    KINDS[kind](tmp_path / "file")
    with pytest.raises(OSError):
        open_regular(tmp_path / "file", flags)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "{} {}", "[" * 100_000, '{"a": ' * 100_000, '{"a": 1}' + " " * 2**20]
)
def test_what_is_no_json_file_of_a_run_is_a_value_error(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "config.json")


def test_bytes_that_are_no_text_are_a_value_error(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError):
        read_json(tmp_path / "config.json")


def test_json_comes_back_as_it_was_written(tmp_path):
    write_json(tmp_path / "config.json", {"λ": [1, 2.5, None, True, "x\n"]})
    assert read_json(tmp_path / "config.json") == {"λ": [1, 2.5, None, True, "x\n"]}


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_written_whole_or_not_at_all(there, tmp_path):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(b"half")
        file.flush()
        raise ZeroDivisionError
    assert contents(tmp_path) == ({"file": b"before"} if there else {})
    with written_whole(path) as file:
        file.write(b"all")
        assert contents(tmp_path).get("file") == (b"before" if there else None)
    assert contents(tmp_path) == {"file": b"all"}


def test_a_file_gets_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    with written_whole(tmp_path / "file"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    write_json(tmp_path / "file", {})
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert stat.S_ISREG(os.lstat(tmp_path / "file").st_mode)


def test_a_folder_is_locked_by_one_at_a_time_until_the_descriptor_is_closed(tmp_path):
    descriptor = lock(tmp_path)
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    os.close(descriptor)
    os.close(lock(tmp_path))
    with pytest.raises(OSError):
        lock(tmp_path / "no such folder")


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", fail)
    os.close(lock(tmp_path))


# --- a run folder from a stranger -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("kind", [*KINDS, "a list", "nested", "huge", "binary", "empty"])
def test_json_files_that_no_run_has_written_are_one_line_with_code_2(kind, name, stopped, refused):
    path = stopped / name
    content = path.read_text()
    path.unlink()
    if kind in KINDS:
        (stopped / "elsewhere").write_text(content)
        KINDS[kind](path)
    else:
        junk = {"a list": "[1, 2]", "nested": '{"a": ' * 100_000, "huge": content + " " * 2**20, "binary": "\xff\x00"}
        path.write_text(junk.get(kind, ""), encoding="latin-1")
    before = contents(stopped) if kind != "a pipe" else None
    assert "--resume" in refused(ppo.main, ["--resume", stopped])
    assert kind == "a pipe" or contents(stopped) == before


def set_command_line(folder, change):
    config = json.loads((folder / "config.json").read_text())
    config["command_line"] = change(config["command_line"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "words",
    [
        ["--tyro-write-completion", "bash", "FILE"],
        ["--tyro-print-completion", "bash"],
        ["--tyro-print-completion=bash"],
        ["--help"],
        ["-h"],
        ["stray"],
        ["--seed", 7],
        [7],
        [None],
        [["--seed", "7"]],
        ["--seed"],
        ["--seed", "x"],
        ["--no-such-option", "3"],
        ["--no-such-option\n--seed"],
        ["--resume", "elsewhere", "--run-dir"],
        ["--env-id", "NoSuchTask-v0"],
        "--seed 7",
        {"--seed": 7},
        7,
        None,
    ],
    ids=str,
)
def test_command_lines_that_no_run_has_had_are_one_line_with_code_2(words, stopped, refused, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    set_command_line(stopped, lambda before: words)
    before = contents(stopped)
    assert "--" in refused(ppo.main, ["--resume", stopped])
    assert contents(stopped) == before and not [*(tmp_path / "here").iterdir()]


def test_a_task_that_is_code_is_not_imported_unless_it_is_asked_for(stopped, refused, tmp_path, monkeypatch):
    (tmp_path / "a_strangers_module.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--env-id", "a_strangers_module:Env-v0"]
    set_command_line(stopped, lambda words: [*words, *own])
    assert "if you trust it, add --env-id a_strangers" in refused(ppo.main, ["--resume", stopped])
    set_command_line(stopped, lambda words: [*words[:-2], f"--env-id={own[1]}"])
    assert "if you trust it, add --env-id a_strangers" in refused(ppo.main, ["--resume", stopped, "--seed", 7])
    assert not (tmp_path / "owned").exists() and own[1].split(":")[0] not in sys.modules
    refused(ppo.main, ["--resume", stopped, *own])  # this imports it; its checkpoint is that of another task


@pytest.mark.parametrize("argument", ['--resume ""', "--resume="])
def test_an_empty_folder_name_is_refused_even_in_a_run_folder(argument, stopped, refused, tmp_path, monkeypatch):
    for here in (tmp_path, stopped):
        monkeypatch.chdir(here)
        before = {path.name for path in here.iterdir()}
        assert "--resume" in refused(ppo.main, argument.replace('""', "").split(" "))
        assert {path.name for path in here.iterdir()} == before


@pytest.mark.parametrize("name", ["episodes.csv", "rounds.csv", "checkpoint.pt", "checkpoint.prev.pt"])
def test_a_link_in_a_run_folder_is_not_written_through(name, stopped, tmp_path, capsys):
    content = (stopped / name).read_bytes()
    elsewhere = tmp_path / ("long" * 50) / ("long" * 50)  # so that the link itself is long enough to hold the rows
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(content)
    (stopped / name).unlink()
    (stopped / name).symlink_to(elsewhere)
    capsys.readouterr()
    if name.endswith(".csv"):
        with pytest.raises(SystemExit) as end:
            resume(ppo.main, stopped)
        assert end.value.code == 2 and name in capsys.readouterr().err
    else:
        assert resume(ppo.main, stopped).summary["status"] == "finished"
    assert elsewhere.read_bytes() == content


@pytest.mark.parametrize("name", ["curves.png", "model.pt", ".summary.json.new", ".checkpoint.pt.new"])
def test_links_where_a_run_will_write_are_replaced(name, stopped, tmp_path, figures):
    (tmp_path / "precious").write_text("precious")
    (stopped / name).unlink(missing_ok=True)
    (stopped / name).symlink_to(tmp_path / "precious")
    assert resume(ppo.main, stopped, "--save-model").summary["status"] == "finished"
    assert (tmp_path / "precious").read_text() == "precious" and not (stopped / name).is_symlink()


def test_a_pipe_where_a_run_will_write_does_not_stop_it(stopped, figures):
    for name in ("curves.png", "model.pt"):
        (stopped / name).unlink(missing_ok=True)
        os.mkfifo(stopped / name)
    run = resume(ppo.main, stopped, "--save-model")
    assert run.summary["status"] == "finished" and (run.path / "model.pt").stat().st_size > 1000


def test_a_folder_name_with_line_breaks_is_still_one_line(refused, tmp_path):
    refused(ppo.main, ["--resume", f"{tmp_path}/a\nb\x1b[31m"])


@pytest.mark.parametrize("name", ["videos", "wandb"])
def test_a_link_in_place_of_a_folder_is_refused_and_the_folder_let_go(name, stopped, refused, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (stopped / name).symlink_to(tmp_path / "elsewhere")
    for _ in range(2):  # else the second time, this process were still writing there
        assert f"{name} is a link, it must be a folder" in refused(ppo.main, ["--resume", stopped])
    (stopped / name).unlink()
    assert resume(ppo.main, stopped).summary["status"] == "finished"
