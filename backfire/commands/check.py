"""`backfire check`: run the contract tests of components over a plug-in."""

from __future__ import annotations

from backfire import plugins
from backfire.contract import findings
from backfire.registry import use
from backfire.text import line


def check(plugin: str) -> int:
    """Print a line for each check of each component of a plug-in (a file or an installed package);
    returns the number of failed checks.

    Raises:
        UserError: the plug-in cannot be loaded, or a name in it is already in use.
    """
    loaded = plugins.load(plugin)
    use(loaded)
    results = [(cls, finding) for cls in loaded.components for finding in findings(cls)]
    for cls, finding in results:
        reason = f" ({line(finding.text)})" if finding.text else ""
        print(f"{finding.status:4}  {cls.label()}: {finding.check}{reason}")  # noqa: T201
    failed = sum(finding.status == "fail" for _, finding in results)
    print(f"{len(results)} checks, {failed or 'none'} failed.")  # noqa: T201
    return failed
