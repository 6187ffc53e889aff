"""All rows, in the order of the table."""

import tests.torture.cluster
import tests.torture.damage
import tests.torture.disk
import tests.torture.file_system
import tests.torture.fuzz
import tests.torture.kills
import tests.torture.mutations
import tests.torture.names
import tests.torture.offline
import tests.torture.outputs
import tests.torture.planted
import tests.torture.repeat  # noqa: F401
from tests.torture.row import FOUND

_ORDER = (
    *("cell-kills", "matrix-kills", "checkpoint-damage", "disk-full", "same-again"),
    *("two-schedulers", "lost-node", "clocks-apart", "file-system-gone", "read-only-cache"),
    *("fuzzed-recipes", "fuzzed-data-files", "hostile-names", "hostile-outputs"),
    *("canary-secrets", "planted-code", "suite-without-network", "fast-start"),
    "mutations",
)
ROWS = {name: FOUND[name] for name in _ORDER}
