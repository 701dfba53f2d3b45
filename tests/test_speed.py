"""What lrrl_utils/speed.py promises: a row of rates for each script that is named."""

import pytest

from lrrl_utils import speed


def test_a_row_has_both_rates_and_their_ratio(monkeypatch, capsys):
    tiny = "--env-id Pendulum-v1 --num-steps 64 --num-minibatches 4 --total-timesteps 256"
    monkeypatch.setitem(speed.RUNS, "ppo", ("ppo_continuous_lrrl.py", tiny))
    speed.main(["ppo"])
    *_, row = capsys.readouterr().out.splitlines()
    script, *cells = [cell.strip().replace(",", "") for cell in row.strip("|").split("|")]
    plain, fast, ratio = map(float, cells)
    assert script == "ppo_continuous_lrrl.py" and plain > 0 and fast > 0
    assert ratio == pytest.approx(fast / plain, abs=0.02)


def test_a_name_that_is_no_script_is_refused_in_one_line(refused):
    assert "must be some of ppo sac dqn iqn" in refused(speed.main, ["ppo", "a2c"])
