"""`backfire chat`: the same prompt to two models, with or without the attack's trigger.

Replies are attacker-written text: control characters are removed before they are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from backfire.base import Backdoor
from backfire.experiment import Experiment, Machine
from backfire.launch.job import has_changed, read_cell
from backfire.playground.models import (
    ChatModel,
    NotCachedError,
    ReadOnlyStore,
    chat_row,
    first_with_trigger,
    frame,
    load,
)
from backfire.store import Store
from backfire.text import clean, listing

HELP = "Type a prompt. /trigger toggles the attack's trigger, /help prints this line, /quit ends."


def talk(
    cell: Path, against: Path | None, device: str, *, ask: Callable[[], str] | None = None
) -> None:
    """Prompt both models until the input ends.

    Raises:
        UserError: a folder holds no finished cell.
    """
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    machine = Machine.make({"device": device})
    first = read_cell(cell)
    other = read_cell(against) if against else first.untuned()
    for folder, experiment in ((cell, first), (against, other)):
        if folder and has_changed(folder, experiment):
            console.print(
                f"Note: an input file or the version of a component has changed since {folder} "
                "ran, so this is not the model that it measured."
            )
    models = [
        _load(first, first.slug, machine, console),
        _load(other, other.slug if against else "base", machine, console),
    ]
    attacked, triggered = first_with_trigger([first, other]), False
    task = frame(first, Store())
    console.print(f"{HELP}\nCells: {models[0].title} and {models[1].title}.")
    ask = ask or (lambda: console.input("> ") if sys.stdin.isatty() else input())
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/help" or not line:
            console.print(HELP)
        elif line == "/trigger":
            triggered = not triggered and attacked is not None
            sentence = (
                f"Trigger {'on' if triggered else 'off'}: {_quoted(attacked.backdoor)}"
                if attacked and attacked.backdoor
                else "These cells have no attack with a trigger."
            )
            console.print(sentence)
        elif line.startswith("/"):
            console.print(f"Unknown command {line.split()[0]}. {HELP}")
        else:
            row = chat_row(task, line, attacked if triggered else None)
            if triggered and attacked and attacked.backdoor:
                prompt = clean(row.part(attacked.backdoor.field))
                console.print(Text(f"  prompt: {prompt}", style="dim"))
            for model in models:
                console.print(Text(f"  {model.title}: ", style="bold") + Text(model.answer(row)))


def _load(experiment: Experiment, title: str, machine: Machine, console: Console) -> ChatModel:
    try:
        return load(experiment, title, ReadOnlyStore(), machine)
    except NotCachedError as error:
        console.print(f"{error} Rebuilding it now, which can take long.")
        return load(experiment, title, Store(), machine)


def _quoted(attack: Backdoor) -> str:
    word = "and" if attack.joint else "or"
    return listing([f"“{clean(trigger)}”" for trigger in attack.triggers()], word)
