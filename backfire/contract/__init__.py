"""What holds for every component, ours or a plug-in's: checks that the tests and `backfire check`
share.

A check is a function of a component's class that returns what is wrong, or None. Its docstring says
what it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from backfire.base import (
    Attack,
    Backdoor,
    Component,
    DataDefense,
    Dataset,
    Judge,
    Metric,
    Poison,
    Template,
)
from backfire.contract import attacks, components, kinds
from backfire.errors import CellError, UserError, shortened

Check = Callable[[Any], str | None]

CHECKS: dict[type[Component], tuple[Check, ...]] = {
    Component: (
        components.is_named,
        components.is_described,
        components.describes_its_knobs,
        components.has_valid_defaults,
        components.has_an_identity,
        components.knows_misspelled_knobs,
    ),
    Attack: (attacks.names_its_source,),
    Poison: (
        attacks.poisons_its_rate,
        attacks.is_deterministic,
        attacks.leaves_its_rows,
        attacks.grows_with_its_rate,
    ),
    Backdoor: (
        attacks.ignores_the_order,
        attacks.puts_its_trigger_in,
        attacks.keeps_true_answers,
    ),
    Dataset: (kinds.loads_the_same,),
    Template: (kinds.shows_the_row,),
    Judge: (kinds.gives_each_a_verdict,),
    DataDefense: (kinds.filters_the_same,),
    Metric: (kinds.measures_the_same, kinds.tells_nothing_of_nothing),
}
"""Base class -> what is asked of each component that derives from it."""


class Finding(NamedTuple):
    """What a check found. A `skip` could not be checked here, such as a file that is not there."""

    check: str
    status: Literal["ok", "fail", "skip"]
    text: str = ""


def findings(cls: type[Component]) -> Iterator[Finding]:
    """Every check that applies to a component."""
    return (result_of(check, cls) for check in checks(cls))


def checks(cls: type[Component]) -> list[Check]:
    """The checks of every component and of those of its kind."""
    return [check for base, group in CHECKS.items() if issubclass(cls, base) for check in group]


def result_of(check: Check, cls: type[Component]) -> Finding:
    """What one check finds; an error in the component's own code is a failure too."""
    title = " ".join((check.__doc__ or "").split()).rstrip(".")
    try:
        problem = check(cls)
    except (UserError, CellError) as error:  # such as a data set whose file is not there
        status: Literal["fail", "skip"] = "fail" if check in CHECKS[Component] else "skip"
        return Finding(title, status, shortened(error, 300))
    except Exception as error:
        return Finding(title, "fail", shortened(f"{type(error).__name__}: {error}", 300))
    return Finding(title, "fail" if problem else "ok", shortened(problem or "", 300))
