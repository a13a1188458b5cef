"""The one error a user's mistake turns into: a single line that says where and what."""

from __future__ import annotations

from pathlib import Path


class ConfigError(Exception):
    """A wrong or missing input, named so that one line is enough to mend it.

    Args:
        source: The file (or ``parameter``, ``topic``, ``message``) the value came from.
        key: The key, tensor or name inside the source; empty when the source itself is wrong.
        found: What was found there.
        expected: What would have been accepted.
    """

    def __init__(self, source: str | Path, key: str, found: object, expected: str) -> None:
        self.source = str(source)
        self.key = key
        self.found = str(found)
        self.expected = expected
        where = f"{self.source}: {key}" if key else self.source
        line = f"{where}: found {self.found}, expected {expected}"
        super().__init__(" ".join(line.split()))
