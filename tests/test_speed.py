"""What lrrl_utils/speed.py promises: a row of rates for each script that is named."""

from lrrl_utils import speed


def test_the_rate_of_a_run_is_measured():
    tiny = "--env-id Pendulum-v1 --num-steps 64 --num-minibatches 4 --total-timesteps 256"
    assert speed.measure("ppo_continuous_lrrl.py", *tiny.split()) > 0


def test_a_row_has_both_rates_and_their_ratio(monkeypatch, capsys):
    monkeypatch.setattr(speed, "measure", lambda script, *options: 1500.0 if "--compile" in options else 1000.0)
    speed.main([])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| ppo_continuous_lrrl.py | 1,000 | 1,500 | 1.50 |" and len(rows) == 5


def test_a_name_that_is_no_script_is_refused_in_one_line(refused):
    assert "must be some of ppo sac dqn iqn" in refused(speed.main, ["ppo", "a2c"])
