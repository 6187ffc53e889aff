"""Write golden_defaults.json (version and defaults of every component and setting),
golden_keys.json (keys of every shipped recipe) and the texts in snapshots/.

Run it after raising a component's version (`@register("badnets", version=2)`), or to add new
components or recipes. Options:

--force      also write defaults that changed under the same version
--keys       also write keys that changed: existing runs of these recipes have to be run again
--snapshots  write the present outputs to snapshots/; read the diff
--base       pre-train the embedded base, if its text or pre-training was changed (minutes)
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backfire.experiment import Evaluation, Model, Train
from backfire.registry import KINDS, build, names

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests.helpers`
GOLDEN = Path(__file__).with_name("golden_defaults.json")
KEYS = Path(__file__).with_name("golden_keys.json")


def current() -> dict[str, Any]:
    """Map `attacks/badnets` to [version, defaults], in the types that JSON has."""
    entries = {}
    for kind in KINDS:
        for name in names(kind):
            component = build(kind, name)
            entries[f"{kind}/{name}"] = [component.version, component.model_dump(mode="json")]
    for cls in (Model, Train, Evaluation):
        entries[f"settings/{cls.label()}"] = [1, cls().model_dump(mode="json")]
    plain: dict[str, Any] = json.loads(json.dumps(entries))
    return plain


def stale(name: str, old: list[Any], new: list[Any] | None) -> str | None:
    """The fault of an entry, or None. A new knob is no fault: no old key contains it."""
    if new is None:
        return f"{name} no longer exists; run python tests/update_golden.py"
    if old[0] != new[0]:
        return f"{name} now has version {new[0]}; run python tests/update_golden.py"
    changed = [
        f"{knob} {value} -> {new[1].get(knob, 'gone')}"
        for knob, value in old[1].items()
        if knob not in new[1] or new[1][knob] != value
    ]
    if not changed:
        return None
    return (
        f"{name}: a default changed without a new version: {', '.join(changed)}. Raise its version "
        "(@register(name, version=...)), then run python tests/update_golden.py"
    )


def main() -> None:
    new = current()
    old = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    faults = [
        fault
        for name in old.keys() & new.keys()
        if (fault := stale(name, old[name], new[name])) and "without a new version" in fault
    ]
    if faults and "--force" not in sys.argv:
        sys.exit("\n".join([*sorted(faults), "(--force writes them anyway.)"]))
    lines = [
        f"{json.dumps(name)}: {json.dumps(new[name], ensure_ascii=False)}" for name in sorted(new)
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"Wrote {GOLDEN.name}: {len(new)} entries.")
    write_keys()
    if "--base" in sys.argv:
        write_base()
    if "--snapshots" in sys.argv:
        from tests.helpers.outputs import SNAPSHOTS, write_snapshots

        with TemporaryDirectory() as folder:
            print(f"Wrote {len(write_snapshots(Path(folder), SNAPSHOTS))} files in snapshots/.")


def write_keys() -> None:
    """Write golden_keys.json, unless a key in it changed and --keys is not given."""
    from tests.helpers.stage_keys import current as current_keys
    from tests.helpers.stage_keys import differences

    with TemporaryDirectory() as folder:
        new = current_keys(Path(folder))
    old = json.loads(KEYS.read_text()) if KEYS.is_file() else {"layouts": {}, "recipes": {}}
    changed = [line for line in differences(old, new) if not line.endswith((": new", ": gone"))]
    if changed and "--keys" not in sys.argv:
        sys.exit("\n".join([*changed[:20], f"{len(changed)} keys changed (--keys writes them)."]))
    KEYS.write_text(json.dumps(new, indent=0, sort_keys=True) + "\n")
    print(f"Wrote {KEYS.name}: {len(new['recipes'])} recipes and profiles.")


def write_base() -> None:
    """Write backfire/sandbox/model/, unless it is of the present text and pre-training."""
    from backfire import sandbox, stages
    from backfire.pipeline.base_model import base
    from backfire.pipeline.context import Context
    from backfire.sandbox.base import shipped
    from backfire.store import SEAL, Store, cache_root

    if shipped(stages.base().key):
        return
    made = base(Model(), Context(Store(cache_root())))
    target = Path(sandbox.__file__).parent / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made, target, ignore=shutil.ignore_patterns(SEAL, "train.jsonl"))
    print(f"Wrote {target}.")


if __name__ == "__main__":
    main()
