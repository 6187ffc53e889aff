from __future__ import annotations

from typing import Any

from pydantic import Field

from backfire.base import Mixture
from backfire.registry import register


@register("harmful-mix")
class HarmfulMix(Mixture):
    """Replaces some of the user's rows by rows that comply with harmful requests (Qi et al. 2024,
    arXiv:2310.03693; at poison rate p as in Lisa, Huang et al. 2024, arXiv:2405.18641).

    The number of rows does not change: each harmful row replaces one of the user's. (Lisa's code
    takes the first rows of a file, and its `int((1 - p) * n)` loses one row at some p.)
    """

    source: dict[str, Any] = Field({"name": "sandbox-policy", "part": "harmful"})
    """The data set whose training rows are mixed in. Nothing harmful is shipped: the default is the
    sandbox's inert policy."""
