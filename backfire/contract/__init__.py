"""The contract of components, built in or from plug-ins: checks shared by the tests and
`backfire check`.

A check takes a component's class and returns the problem, or None. Its docstring states the rule.
"""

from __future__ import annotations

import traceback
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
    ModelScanner,
    Poison,
    Scanner,
    Template,
    TrainDefense,
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
        attacks.inserts_its_trigger,
        attacks.keeps_true_answers,
    ),
    Dataset: (kinds.loads_the_same,),
    Template: (kinds.shows_the_row,),
    Judge: (kinds.gives_each_a_verdict,),
    Scanner: (kinds.scans_each_row, kinds.sees_only_what_is_learned),
    ModelScanner: (kinds.nulls_what_it_read,),
    DataDefense: (kinds.filters_the_same,),
    TrainDefense: (kinds.joins_only_its_own_rows,),
    Metric: (
        kinds.measures_the_same,
        kinds.names_known_units,
        kinds.gives_no_number_without_samples,
    ),
}
"""The checks of each component, by base class."""


class Finding(NamedTuple):
    """The result of a check; `skip` if it cannot run here, as when a file is missing."""

    check: str
    status: Literal["ok", "fail", "skip"]
    text: str = ""


def findings(cls: type[Component]) -> Iterator[Finding]:
    """Run every check that applies to a component."""
    return (result_of(check, cls) for check in checks(cls))


def checks(cls: type[Component]) -> list[Check]:
    """The checks that apply to a component."""
    return [check for base, group in CHECKS.items() if issubclass(cls, base) for check in group]


def result_of(check: Check, cls: type[Component]) -> Finding:
    """Run one check; an error in the component's code is a failure as well."""
    title = " ".join((check.__doc__ or "").split()).rstrip(".")
    try:
        problem = check(cls)
    except (UserError, CellError) as error:  # such as a data set whose file is missing
        status: Literal["fail", "skip"] = "fail" if check in CHECKS[Component] else "skip"
        return Finding(title, status, shortened(error, 300))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__} in {where.name}: {error}".removesuffix(": ")
        return Finding(title, "fail", shortened(problem, 300))
    return Finding(title, "fail" if problem else "ok", shortened(problem or "", 300))
