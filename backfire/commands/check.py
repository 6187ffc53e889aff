"""`backfire check`: the contract of every component, over those of a plug-in."""

from __future__ import annotations

from backfire import plugins
from backfire.contract import findings
from backfire.registry import use
from backfire.text import line


def lines(plugin: str) -> tuple[list[str], int]:
    """A line a check of each component of a plug-in, a file or an installed package; and how many
    checks failed.

    Raises:
        UserError: it cannot be loaded, or a name in it is taken.
    """
    loaded = plugins.load(plugin)
    use(loaded)
    out, failed = [], 0
    for cls in loaded.components:
        for check, status, text in findings(cls):
            out.append(
                f"{status:4}  {cls.label()}: {check}" + (f" -- {line(text)}" if text else "")
            )
            failed += status == "fail"
    count = len(out)
    out.append(f"{count} checks, {failed} failed." if failed else f"{count} checks, none failed.")
    return out, failed
