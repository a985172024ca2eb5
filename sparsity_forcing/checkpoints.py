"""Checkpoints of a long stage: whole or absent, verified when read, tied to what they belong to.

`directory/<fingerprint>/step-000050/` holds what the stage wrote and `manifest.json` with the sha256 of every file. The
fingerprint names everything that decides the stage's result: another configuration never resumes from it, and is told
how it differs (from `made_of.json`). Beside them `best-000045/` holds weights that the stage
chose at a step; those that a kept checkpoint may name stay.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsity_forcing.files import replace_directory, write_json_atomic
from sparsity_forcing.lineage import file_digest

_log = logging.getLogger(__name__)
_MANIFEST, _MADE_OF = "manifest.json", "made_of.json"
_DIGEST = 64  # characters of a SHA-256


def fingerprint(values: object, files: tuple[Path, ...] = ()) -> str:
    """16 hexadecimal digits that change when ``values`` (JSON) or the content of ``files`` changes."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for file in sorted(files):
        digest.update(file_digest(file, "sha256").encode())
    return digest.hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one configuration.

    Args:
        directory: shared by all configurations of a stage.
        fingerprint: of this configuration.
        keep: how many of the newest stay; at least 2, so that a corrupted one has one before it.
        made_of: what of the configuration another one is told, as JSON; stored with the checkpoints, for `refused`.
    """

    def __init__(self, directory: Path, fingerprint: str, keep: int = 2, made_of: dict | None = None) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}: the newest may turn out corrupted")
        self.directory, self.keep = Path(directory) / fingerprint, keep
        self.made_of = json.loads(json.dumps(made_of, default=str))  # as it is read again
        self._told_refused = False

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Lets ``write`` fill a temporary directory, seals it with a manifest and renames it; drops the oldest."""
        path = self._save("step", step, write)
        for old in self._all("step")[: -self.keep]:
            shutil.rmtree(old)
        oldest = _step(self._all("step")[0])
        for superseded in [best for best in self._all("best") if _step(best) <= oldest][:-1]:
            shutil.rmtree(superseded)
        return path

    def save_best(self, step: int, write: Callable[[Path], None]) -> Path:
        """As `save`, for the weights that the stage chose at ``step``."""
        return self._save("best", step, write)

    def latest(self) -> tuple[int, Path] | None:
        """Step and directory of the newest whole checkpoint."""
        return next(((_step(path), path) for path in self.whole()), None)

    def whole(self) -> Iterator[Path]:
        """The whole checkpoints, newest first. A corrupted one is named in the log and passed over; where there is
        none, so are those of other configurations, once."""
        if not self._all("step") and not self._told_refused:
            self._told_refused = True
            for line in self.refused():
                _log.warning("not resumed: %s; it is removed when this run has its result", line)
        for path in reversed(self._all("step")):
            fault = _fault(path)
            if fault is None:
                yield path
            else:
                _log.warning("checkpoint %s is corrupted (%s); falling back to the one before", path, fault)

    def best(self, step: int) -> Path | None:
        """The directory that `save_best` wrote at ``step``; None, and why in the log, if it is missing or not whole."""
        path = self.directory / f"best-{step:06d}"
        fault = _fault(path)
        if fault is None:
            return path
        _log.warning("the chosen weights %s are corrupted (%s)", path, fault)
        return None

    def refused(self) -> list[str]:
        """A line for every other configuration that has checkpoints here: where they are, and what differs."""
        lines = []
        for other in sorted(self.directory.parent.glob("*")):
            steps = [_step(path) for path in other.glob("step-*")]
            if other != self.directory and steps:
                differences = "; ".join(_differences(_made_of(other), self.made_of)) if self.made_of else ""
                lines.append(
                    f"{other} (step {max(steps)}) is of another configuration{differences and ': '}{differences}"
                )
        return lines

    def clear(self) -> None:
        """Removes all checkpoints of the stage, those of other configurations too: the stage has its result."""
        shutil.rmtree(self.directory.parent, ignore_errors=True)

    def _save(self, kind: str, step: int, write: Callable[[Path], None]) -> Path:
        path = self.directory / f"{kind}-{step:06d}"
        if self.made_of is not None and not (self.directory / _MADE_OF).exists():
            write_json_atomic(self.directory / _MADE_OF, self.made_of)
        with replace_directory(path) as temporary:
            write(temporary)
            sums = {
                str(f.relative_to(temporary)): file_digest(f, "sha256")
                for f in sorted(temporary.rglob("*"))
                if f.is_file()
            }
            write_json_atomic(temporary / _MANIFEST, {"step": step, "sha256": sums})
        return path

    def _all(self, kind: str) -> list[Path]:
        return sorted((path for path in self.directory.glob(f"{kind}-*") if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _made_of(directory: Path) -> dict:
    try:
        found = json.loads((directory / _MADE_OF).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _differences(there: dict, here: dict) -> list[str]:
    """What two configurations differ in, by dotted name; nothing where the first is not known."""
    old, new = _flat(there), _flat(here)
    changed = sorted(name for name in old.keys() | new.keys() if there and old.get(name) != new.get(name))
    return [_told(name, old.get(name), new.get(name)) for name in changed]


def _told(name: str, before: object, now: object) -> str:
    digests = all(isinstance(value, str) and len(value) == _DIGEST for value in (before, now))
    return f"{name} has changed" if digests else f"{name} was {before}, is {now}"


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested values by dotted name."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    try:
        sums = dict(json.loads((path / _MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST}: {error}"
    for name, expected in sums.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file_digest(file, "sha256") != expected:
            return f"{name} has another checksum than {_MANIFEST} says"
    return None
