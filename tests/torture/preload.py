"""Imported once by the fork server, on top of what workers of backfire import."""

import backfire.commands.run
import backfire.launch.environment
import backfire.launch.job  # noqa: F401
