"""What supervisorctl's commands ask supervisord, and what is said where that fails.

Whatever answers, or does not, becomes a line for a person. Only a password that is missing is left
to supervisorctl, which asks for one.
"""

from __future__ import annotations

import xmlrpc.client
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPException
from typing import Any, TypeVar
from xml.parsers.expat import ExpatError

from supervisor.xmlrpc import Faults

_T = TypeVar("_T")


class Failed(Exception):
    """A command failed; the line that says why."""


class Link:
    """supervisord, as the options of supervisorctl name it."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    def ask(
        self, method: str, *arguments: str | int, about: str = "", missing: str = "no such model"
    ) -> str:
        """What a method of our namespace answers.

        Raises:
            Failed: as `asked` does.
        """
        return self.asked(
            lambda proxy: str(getattr(proxy.synapse, method)(*arguments)),
            about=about,
            missing=missing,
        )

    def asked(self, ask: Callable[[Any], _T], *, about: str = "", missing: str = "") -> _T:
        """What `ask` gets from supervisord. `about`: what was named, `missing`: that it is not.

        Raises:
            Failed: supervisord does not answer, or with a fault.
        """
        url = self._controller.options.serverurl
        try:
            with self._controller.get_server_proxy() as proxy:
                return ask(proxy)
        except xmlrpc.client.Fault as fault:
            raise Failed(_said_by(fault, about, missing)) from None
        except xmlrpc.client.ProtocolError as error:
            if error.errcode == HTTPStatus.UNAUTHORIZED:
                self._require_a_person()
                raise
            raise Failed(
                f"cannot reach supervisord at {url}: HTTP status {error.errcode}"
            ) from None
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
            raise Failed(f"cannot reach supervisord at {url}: {why}; does it run?") from None
        except (xmlrpc.client.Error, HTTPException, ExpatError) as error:
            raise Failed(f"cannot read the answer of {url}: {error}") from None

    def _require_a_person(self) -> None:
        """supervisorctl asks them for the password; else it would try again in vain, and fail."""
        if not self._controller.options.interactive:
            raise Failed("Server requires authentication") from None


def _said_by(fault: xmlrpc.client.Fault, about: str, missing: str) -> str:
    if fault.faultCode == Faults.UNKNOWN_METHOD:
        return "supervisord runs without [rpcinterface:synapse], or with an older one: restart it"
    if fault.faultCode == Faults.BAD_NAME and about:
        return f"{about}: ERROR ({missing})"
    return str(fault.faultString)
