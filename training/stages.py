"""Stages whose products stay on disk and are made again only when something they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .settings import Settings

Progress = Callable[[str, int, int], None]  # stage, done, total

_RECORD = "stages.json"


@dataclass(frozen=True)
class Workplace:
    """A folder of products, the settings they are made with and the sha256 of the base model's weights."""

    out: Path
    settings: Settings
    weights: str
    progress: Progress = lambda stage, done, total: None

    def stage(
        self,
        name: str,
        depends: Sequence[str],
        sources: Sequence[str],
        products: Sequence[str],
        make: Callable[[Callable[[int, int], None]], None],
    ) -> None:
        """Calls `make(report)` unless all products are there and were made from these very inputs.

        Inputs are the settings named in `depends`, the bytes of the files `sources` and the base model. `report(done,
        total)` passes progress on. A stage that fails leaves no record, so that it runs again.
        """
        inputs = self._digest(depends, sources)
        record = self._record()
        if record.get(name) != inputs or not all((self.out / product).is_file() for product in products):
            self._write({key: value for key, value in record.items() if key != name})
            make(lambda done, total: self.progress(name, done, total))
            self._write({**self._record(), name: inputs})
        self.progress(name, 1, 1)

    def _digest(self, depends: Sequence[str], sources: Sequence[str]) -> str:
        inputs = {
            "settings": {key: getattr(self.settings, key) for key in depends},
            "sources": {source: file_sha256(self.out / source) for source in sources},
            "weights": self.weights,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _record(self) -> dict:
        path = self.out / _RECORD
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write(self, record: dict) -> None:
        (self.out / _RECORD).write_text(json.dumps(record, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
