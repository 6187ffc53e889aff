"""Records the environment of a result. The fields are an allow-list, so no secret can get in."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from backfire import __version__
from backfire.model.types import cpu_info
from backfire.resources import cores

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "datasets",
    "numpy",
    "scikit-learn",
)


_LIBRARIES = {
    "MKL": r"Math Kernel Library Version ([\w.]+)",
    "oneDNN": r"MKL-DNN v([\w.]+)",
}
"""Library -> its version in what torch tells of its build."""


@lru_cache
def environment(device_setting: str = "auto", devices: int = 1) -> dict[str, Any]:
    """Versions, hardware, the requested device and number of devices, and the commit if the code
    runs from a checkout. The training summary has the devices that were used."""
    import torch

    from backfire.model.load import device_of

    device = device_of(device_setting)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "backfire": __version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_info("model name") or platform.processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": gpu or "cpu",
        "products": _products(device.type),
        **({"devices": devices} if devices > 1 else {}),
        **_commit(),
    }


def _products(device: str) -> dict[str, str]:
    """Type of matrix products -> the library that computes them on this device."""
    import torch

    from backfire.model.products import mkl_is_slow

    if device == "cuda":
        library = f"hipBLAS {torch.version.hip}" if torch.version.hip else None
        both = library or f"cuBLAS {torch.version.cuda}"
        return {"float32": f"{both}, {torch.get_float32_matmul_precision()}", "bfloat16": both}
    built = torch.__config__.show()
    known = {
        name: f"{name} {found[1]}" if (found := re.search(pattern, built)) else name
        for name, pattern in _LIBRARIES.items()
    }
    backends: Any = torch.backends
    mkl, onednn = backends.mkl.is_available(), backends.mkldnn.is_available()
    return {
        "float32": known["oneDNN"] if mkl_is_slow() else known["MKL"] if mkl else "BLAS",
        "bfloat16": known["oneDNN"] if onednn else "BLAS",
    }


def version_of(name: str) -> str | None:
    """The installed version of a package; None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return {
            "commit": commit,
            "dirty": bool(_git(root, "status", "--porcelain", "--", "backfire").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
