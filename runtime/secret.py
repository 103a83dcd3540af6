"""Values that must never be shown: a type that hides itself, and the list of what the log strikes out."""

from __future__ import annotations

import hmac
import json
from urllib.parse import quote, quote_plus

HIDDEN = "***"

# Striking out a very short value would blacken half of every line and so give it away.
_SHORTEST = 6
_known: set[str] = set()


def register(value: str) -> None:
    """Have the log strike out `value` wherever it appears, also as a URL, repr() or JSON writes it."""
    if len(value) >= _SHORTEST:
        _known.update({value, quote(value, safe=""), quote_plus(value), repr(value)[1:-1], json.dumps(value)[1:-1]})


def strike(text: str) -> str:
    """`text` with every registered value replaced."""
    for value in sorted(_known, key=len, reverse=True):
        if value in text:
            text = text.replace(value, HIDDEN)
    return text


class Secret:
    """A password, key or token. It shows as *** however it is formatted; only reveal() gives it out.

    A wrapper and not a str: a str that lies about its text would be sent as *** by whatever calls str() on it.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value
        register(value)

    def reveal(self) -> str:
        """The value itself, for the one who has to send or compare it."""
        return self._value

    def __repr__(self) -> str:
        return HIDDEN

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        """Constant-time comparison with another Secret; a plain string is never equal."""
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> str:
        raise TypeError("a secret is not to be pickled or copied out of the process")
