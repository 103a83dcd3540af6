"""The right to decide: one scheduler at a time, by one row of the ledger.

Who leads holds an epoch, its fencing token: each of its transactions begins by proving it, so that one that was
paused and wakes up too late changes nothing. Nobody compares clocks: whoever stands by watches, by its own monotonic
clock, whether the row still changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Engine, select, update

from deskfleet.ledger.tables import leader
from deskfleet.schemas.errors import DeskfleetError


class Demoted(DeskfleetError):
    """Raised when somebody else leads. Nothing of the transaction is kept."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The row as it is: two that are equal mean that the leader did nothing in between. No owner: it is free."""

    epoch: int
    beat: int
    owner: str


class Lease:
    """One process's claim to lead; `owner` names it for people."""

    def __init__(self, engine: Engine, owner: str) -> None:
        self._engine = engine
        self._owner = owner
        self._epoch: int | None = None

    def look(self) -> Standing:
        """Who leads."""
        with self._engine.connect() as connection:
            row = connection.execute(select(leader.c.epoch, leader.c.beat, leader.c.owner)).one()
            return Standing(row.epoch, row.beat, row.owner)

    def take(self, seen: Standing) -> bool:
        """Begin to lead under a new epoch, if the row is still as it was seen."""
        query = (
            update(leader)
            .where(leader.c.epoch == seen.epoch, leader.c.beat == seen.beat, leader.c.owner == seen.owner)
            .values(epoch=seen.epoch + 1, beat=0, owner=self._owner)
        )
        with self._engine.begin() as connection:
            taken = connection.execute(query).rowcount == 1
        if taken:
            self._epoch = seen.epoch + 1
        return taken

    def prove(self, connection: Connection) -> None:
        """Prove within a transaction that we lead. It locks the row: nobody takes over before the transaction ends.

        Raises:
            Demoted: somebody else leads.
        """
        query = update(leader).where(leader.c.epoch == self._epoch).values(beat=leader.c.beat + 1)
        if connection.execute(query).rowcount != 1:
            raise Demoted(f"epoch {self._epoch} is over")

    def renew(self) -> None:
        """Show that we live. Raises Demoted."""
        with self._engine.begin() as connection:
            self.prove(connection)

    def release(self) -> None:
        """Stop leading; whoever stands by may begin at once. Does nothing when somebody else leads already."""
        query = update(leader).where(leader.c.epoch == self._epoch).values(owner="", beat=leader.c.beat + 1)
        with self._engine.begin() as connection:
            connection.execute(query)
        self._epoch = None
