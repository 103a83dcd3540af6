"""What is kept about a person beyond their logins: the language that they read last, for mails."""

from __future__ import annotations

from sqlalchemy import select

from deskfleet.portal import tables
from deskfleet.portal.store import Store, upsert


class People:
    """Remembers people by their canonical id."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def reads(self, user: str, language: str) -> None:
        """Remember the language that somebody reads."""
        with self._store.writing() as connection:
            new = upsert(connection, tables.person).values(user=user, language=language)
            connection.execute(new.on_conflict_do_update(index_elements=["user"], set_={"language": language}))

    def language(self, user: str) -> str | None:
        """The language that somebody read last; None when it is not known."""
        query = select(tables.person.c.language).where(tables.person.c.user == user)
        with self._store.reading() as connection:
            found: str | None = connection.execute(query).scalar()
        return found
