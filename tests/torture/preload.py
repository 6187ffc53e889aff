"""Imported once by the fork server, on top of what workers of backfire import."""

# ruff: noqa: F401

import backfire.commands.run
import backfire.launch.environment
import backfire.launch.job
import backfire.launch.work
import tests.torture.command
import tests.torture.mounts
import tests.torture.nodes
