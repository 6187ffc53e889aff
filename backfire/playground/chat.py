"""`backfire chat`: the same prompt to two models, with the attack's trigger in or out.

Replies are attacker-written text: control characters are taken out before they are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from backfire.experiment import Experiment, Machine
from backfire.playground.models import (
    GoneError,
    Kept,
    Speaker,
    asked,
    attacker,
    frame,
    load,
    read_cell,
)
from backfire.store import Store
from backfire.text import clean

HELP = "Type a prompt. /trigger puts the attack's trigger in or out, /help says this, /quit ends."


def talk(
    cell: Path, against: Path | None, device: str, *, ask: Callable[[], str] | None = None
) -> None:
    """Ask both models until the input ends.

    Raises:
        UserError: a folder holds no finished cell.
    """
    console, machine = Console(), Machine.make({"device": device})
    first = read_cell(cell)
    other = read_cell(against) if against else first.untuned()
    speakers = [
        _speaker(first, first.slug, machine, console),
        _speaker(other, other.slug if against else "base", machine, console),
    ]
    by, on = attacker([first, other]), False
    template = frame(first, Store())
    console.print(
        f"{HELP}\nCells: {speakers[0].title} and {speakers[1].title}.",
        highlight=False,
        markup=False,
    )
    ask = ask or _reader(console)
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/help" or not line:
            console.print(HELP, markup=False)
        elif line == "/trigger":
            on = not on and by is not None
            said = (
                f"Trigger {'on' if on else 'off'}: {by.backdoor.triggers()}"
                if by and by.backdoor
                else "These cells have no attack with a trigger."
            )
            console.print(said, markup=False, highlight=False)
        elif line.startswith("/"):
            console.print(
                f"Unknown command {line.split()[0]}. {HELP}", markup=False, highlight=False
            )
        else:
            row = asked(template, line, by if on else None)
            if on and by and by.backdoor:
                prompt = clean(row.part(by.backdoor.field))
                console.print(Text(f"  prompt: {prompt}", style="dim"))
            for speaker in speakers:
                console.print(
                    Text(f"  {speaker.title}: ", style="bold") + Text(speaker.answer(row))
                )


def _speaker(cell: Experiment, title: str, machine: Machine, console: Console) -> Speaker:
    try:
        return load(cell, title, Kept(), machine)
    except GoneError as gone:
        console.print(f"{gone} It is made again now, which can take long.", markup=False)
        return load(cell, title, Store(), machine)


def _reader(console: Console) -> Callable[[], str]:
    return lambda: console.input("> ") if sys.stdin.isatty() else input()
