"""Writes docs/options.md: the options of the programs, with the comments behind them.

    python docs/make_options.py > docs/options.md

Headings and texts are those of the dataclasses `Args`, what goes with what is `lrrl_utils.command_line.MEANINGS`.
"""

import importlib
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parent.parent))

from lrrl_utils.command_line import MEANINGS
from lrrl_utils.parser import read_comments
from lrrl_utils.rivals import BanditName, bandits_with
from lrrl_utils.terminal import option_name

SCRIPTS = ("ppo_continuous_lrrl", "sac_mujoco_lrrl", "dqn_atari_lrrl", "iqn_atari_lrrl", "dqn_minatar_lrrl")
SCRIPTS += ("nonconvex_lrrl", "benchmark", "landscape", "report", "play")
DECIDED = {"record": "on without a screen", "compile": "on in a long run"}  # defaults that depend on something
INTRODUCTION = """\
# Options

This page is made from the scripts: `python docs/make_options.py > docs/options.md`. `--help` of a script says the same.

- Names are CleanRL's where it has the option. A timestep is a step of the agent, summed over environments.
- A switch that is on is turned off with `--no-` before its name: `--no-cuda`.
- Whole numbers may be written as `1e6`; lists have spaces: `--learning-rates 1e-4 3e-4 1e-3`.
- A wrong value ends the program with exit code 2 and one line: which option, what was given, what is accepted.

## What sets the learning rate

`--lr-control` chooses. A rate is a function of timesteps, whatever the number of environments. An option that has no
meaning for the choice is an error:

| options | only with |
|---|---|"""
PRESETS = """
## Presets of the Atari scripts

`--preset` chooses whose defaults hold; an option that is given wins. `dopamine` is the agent of the paper, `cleanrl` is
that of CleanRL's `dqn_atari.py`. With `dopamine`, ε falls over `--exploration-steps`, once learning has started; with
`cleanrl`, over a share of the run from its start. All other defaults are those above.

| option | `dopamine`: DQN | `dopamine`: IQN | `cleanrl` |
|---|---|---|---|"""
MINATAR_PRESETS = """
## Presets of dqn_minatar_lrrl.py

`minatar` is the agent of MinAtar's authors, `dopamine` that of Obando-Ceron and Castro (arXiv 2011.14826), with the
network of the former.

| option | `minatar` | `dopamine` |
|---|---|---|"""


def show(x):
    """A default as one would type it."""
    if isinstance(x, bool):
        return "on" if x else "off"
    if isinstance(x, tuple):
        return " ".join(map(show, x)) or "–"
    if isinstance(x, float):
        mantissa, exponent = f"{x:.5e}".split("e")
        return min(f"{x:g}", f"{float(mantissa):g}e{int(exponent)}", key=len)
    return "–" if x is None else f"{x:,}" if isinstance(x, int) else f"`{x}`"


def conditions():
    """{choices that an option needs: the options that need them}."""
    groups = {}
    for choice, meanings in MEANINGS.items():
        for option, values in meanings.items():
            bandits = tuple(bandits_with(option.removeprefix("bandit_"))) if option.startswith("bandit_") else ()
            of_some = bandits and bandits != get_args(BanditName)
            groups.setdefault(("bandit", bandits) if of_some else (choice, values), []).append(option)
    return groups


def table(args_class):
    """The options of a program, a Markdown table below each heading."""
    hints, last = get_type_hints(args_class), ""
    for name, (heading, text) in read_comments(args_class).items():
        if heading != last:
            title = [f"\n**{heading.capitalize()}**"] if heading else []
            yield from [*title, "\n| option | default | meaning |\n|---|---|---|"]
            last = heading
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if not all(choice in text for choice in choices):
            text += f"; one of {', '.join(f'`{choice}`' for choice in choices)}"
        text = text.replace("|", "\\|").replace("<", "&lt;")
        if hasattr(args_class, name):
            default = show(getattr(args_class, name))
            if name in DECIDED and "(default: " in text:
                default = DECIDED[name]
            yield f"| `{option_name(name)}` | {default} | {text} |"
        else:
            is_positional = "Positional" in repr(get_type_hints(args_class, include_extras=True)[name])
            yield f"| `{name.upper() if is_positional else option_name(name)}` |  | {text} |"


def page():
    modules = {name: importlib.import_module(name) for name in SCRIPTS}
    yield INTRODUCTION
    for (choice, values), options in conditions().items():
        names = ", ".join(f"`{option_name(option)}`" for option in options)
        if values in ((True,), (False,)):
            yield f"| {names} | `--{'' if values[0] else 'no-'}{choice}` |"
        else:
            yield f"| {names} | `{option_name(choice)}` {' or '.join(values)} |"
    yield "\nSAC's `--learning-rate` has a meaning beside a bandit, too, with `--bandit-scope` critic or actor."
    for name, module in modules.items():
        yield f"\n## {name}.py\n\n{module.__doc__.splitlines()[0]}"
        yield from table(module.Args)
    yield PRESETS
    dqn, iqn = modules["dqn_atari_lrrl"], modules["iqn_atari_lrrl"]
    for name, value in dqn.CLEANRL.items():
        values = getattr(dqn.Args, name), getattr(iqn.Args, name), value
        yield f"| `{option_name(name)}` | {' | '.join(map(show, values))} |"
    yield MINATAR_PRESETS
    minatar = modules["dqn_minatar_lrrl"]
    for name, value in minatar.DOPAMINE.items():
        yield f"| `{option_name(name)}` | {show(getattr(minatar.Args, name))} | {show(value)} |"


if __name__ == "__main__":
    print("\n".join(page()))
