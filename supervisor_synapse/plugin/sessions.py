"""Who may act on the page, and what came of it: sessions and their tokens, in memory, bounded.

A browser gets a session in a cookie, signed with a secret of this process; each form carries a
token made of the session with the same secret. So another site, which can have a browser send the
cookie but cannot read the page, has no token; and a token is of no use in another session. Only
sessions that have asked for something take room.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict, deque
from dataclasses import dataclass

_MOST_SESSIONS = 64  # whose wishes are kept
_MOST_WISHES = 8  # kept of each
_LONGEST_COOKIES = 8192


@dataclass(slots=True)
class Wish:
    """Something that was asked for on the page, and what became of it."""

    text: str  # "stop tiny-q4_k_m"
    ok: bool | None = None  # None while it is under way
    message: str = ""
    command: str = ""  # its id in the mailbox, where it is there
    program: str = ""  # of supervisord's, where the wish is that it runs once
    deadline: float = 0.0  # monotonic: for what waits for neither

    def end(self, ok: bool, message: str) -> None:
        """It came to this."""
        self.ok, self.message = ok, message


class Sessions:
    """One in each process that supervisord is."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secret or secrets.token_bytes(32)
        self._wishes: OrderedDict[str, deque[Wish]] = OrderedDict()

    def new(self) -> str:
        """A session that was not there before; takes no room yet."""
        name = secrets.token_urlsafe(18)
        return f"{name}.{self._sign('session', name)}"

    def is_ours(self, session: str) -> bool:
        """Whether this process gave it out."""
        name, _, signature = session.partition(".")
        return _same(signature, self._sign("session", name))

    def token(self, session: str) -> str:
        """What the forms of a session carry."""
        return self._sign("token", session)

    def allows(self, session: str, token: str) -> bool:
        """Whether a form with this token came from a page of this session."""
        return self.is_ours(session) and _same(token, self.token(session))

    def note(self, session: str, wish: Wish) -> None:
        """Something was asked for; of too many the oldest are forgotten."""
        kept = self._wishes.pop(session, None) or deque(maxlen=_MOST_WISHES)
        kept.append(wish)
        self._wishes[session] = kept
        while len(self._wishes) > _MOST_SESSIONS:
            self._wishes.popitem(last=False)

    def wishes(self, session: str) -> list[Wish]:
        """Newest first."""
        return list(reversed(self._wishes.get(session, ())))

    def _sign(self, use: str, text: str) -> str:
        message = f"{use}:{text}".encode("utf-8", "replace")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def cookie(name: str, header: str) -> str:
    """The value of a cookie in a request's header; empty where there is none.

    Other servers of this host set cookies too, and not every parser takes theirs.
    """
    for part in header[:_LONGEST_COOKIES].split(";"):
        key, _, value = part.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


def set_cookie(name: str, value: str) -> str:
    """For a reply's header: no script reads it, and no other site's request carries it."""
    return f"{name}={value}; Path=/; HttpOnly; SameSite=Strict"
