"""`backfire check`: the contract of every component, over those of a plug-in."""

from __future__ import annotations

from backfire import plugins
from backfire.contract import findings
from backfire.registry import use
from backfire.text import line


def check(plugin: str) -> int:
    """Print a line for each check of each component of a plug-in, a file or an installed package;
    returns how many failed.

    Raises:
        UserError: it cannot be loaded, or a name in it is taken.
    """
    loaded = plugins.load(plugin)
    use(loaded)
    found = [(cls, finding) for cls in loaded.components for finding in findings(cls)]
    for cls, finding in found:
        why = f" ({line(finding.text)})" if finding.text else ""
        print(f"{finding.status:4}  {cls.label()}: {finding.check}{why}")  # noqa: T201
    failed = sum(finding.status == "fail" for _, finding in found)
    print(f"{len(found)} checks, {failed or 'none'} failed.")  # noqa: T201
    return failed
