"""What `prepare` decided, as a value that prints as a table."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """One operation: `name` is its path, `reason` says why it stays float (empty if it does not)."""

    name: str
    kind: str
    integer: bool
    reason: str = ""


@dataclass(frozen=True)
class PrepareReport:
    """What becomes integer, what stays float, and why."""

    rows: tuple[Decision, ...] = ()

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.rows)

    @property
    def integer(self) -> tuple[Decision, ...]:
        return tuple(row for row in self.rows if row.integer)

    @property
    def stayed_float(self) -> tuple[Decision, ...]:
        return tuple(row for row in self.rows if not row.integer)

    def __str__(self) -> str:
        lines = [f"{len(self.integer)} of {len(self.rows)} operations are integer"]
        if self.stayed_float:
            width = max(len(row.name) for row in self.stayed_float)
            kinds = max(len(row.kind) for row in self.stayed_float)
            lines.append("float:")
            lines += [f"  {row.name:<{width}}  {row.kind:<{kinds}}  {row.reason}" for row in self.stayed_float]
        return "\n".join(lines)
