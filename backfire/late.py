"""numpy, imported at its first use: commands that only read recipes and results start without it.

Use `from backfire.late import np` in modules that such commands import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["np"]

if TYPE_CHECKING:
    import numpy as np
else:

    class _Numpy:
        def __getattr__(self, name):
            import numpy

            value = getattr(numpy, name)
            setattr(self, name, value)  # the next use does not come here
            return value

    np = _Numpy()
