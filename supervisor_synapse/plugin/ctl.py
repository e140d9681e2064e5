"""`[ctlplugin:synapse]`, inside supervisorctl: the commands that are about models."""

from __future__ import annotations

import json
import sys
import xmlrpc.client
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from xml.parsers.expat import ExpatError

from supervisor.supervisorctl import ControllerPluginBase, LSBInitExitStatuses
from supervisor.xmlrpc import Faults

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.failures import printable
from supervisor_synapse.errors import TransientError

_STALE_SECONDS = 15.0  # the listener reports every 5 s
_LOOK = "Look at `status synapse` and var/log/synapse.log."

_Say = Callable[[str], None]


class SynapseControllerPlugin(ControllerPluginBase):  # type: ignore[misc]  # untyped base
    """Adds `models` to supervisorctl."""

    name = "synapse"

    def __init__(self, controller: Any, **config: Any) -> None:
        self.ctl = controller

    def do_models(self, arg: str) -> None:
        names = arg.split()
        as_json = "--json" in names
        wanted = [name for name in names if name != "--json"]
        unknown_flags = [name for name in wanted if name.startswith("-")]
        if unknown_flags:
            self.ctl.output(f"Error: models does not know {printable(unknown_flags[0])}")
            self.help_models()
            self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS
            return
        say = _on_stderr if as_json else self.ctl.output
        text = self._ask("models", say)
        if text is not None:
            self._show(text, wanted, say, as_json=as_json)

    def help_models(self) -> None:
        self.ctl.output("models [NAME ...]\t\tShow the models and why they are as they are.")
        self.ctl.output("models --json [NAME ...]\tThe same for programs.")

    def _show(self, text: str, wanted: list[str], say: _Say, *, as_json: bool) -> None:
        try:
            rows = snapshots.load(text).models if text else ()
        except TransientError as error:
            self._fail(str(error), say)
            return
        known = {row.name for row in rows}
        missing = [name for name in wanted if name not in known]
        chosen = [row for row in rows if not wanted or row.name in wanted]
        if as_json:
            self.ctl.output(json.dumps(snapshots.public(chosen), indent=2))
        elif chosen:
            from supervisor_synapse import report

            self.ctl.output(report.models_table(chosen))
        elif text and not rows:
            self.ctl.output("No models. `synapse discover` looks for some.")
        for name in missing if text else ():
            self._fail(f"{name}: ERROR (no such model)", say)
        self._tell_age(text, say)
        if wanted and not text:
            self.ctl.exitstatus = LSBInitExitStatuses.GENERIC

    def _tell_age(self, text: str, say: _Say) -> None:
        """Say so where there is no snapshot, or an old one."""
        age = snapshots.age_seconds(text) if text else None
        if not text:
            say(f"The listener has not reported yet. {_LOOK}")
        elif age is not None and age > _STALE_SECONDS:
            say(f"The listener last reported {age:.0f} s ago: this may be outdated. {_LOOK}")

    def _ask(self, method: str, say: _Say) -> str | None:
        """What a method of our namespace answers; None where it failed, which was said."""
        url = self.ctl.options.serverurl
        try:
            with self.ctl.get_server_proxy() as proxy:
                return str(getattr(proxy.synapse, method)())
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.UNKNOWN_METHOD:
                self._fail("supervisord runs without [rpcinterface:synapse]", say)
            else:
                self._fail(str(fault.faultString), say)
        except xmlrpc.client.ProtocolError as error:
            if error.errcode == HTTPStatus.UNAUTHORIZED:
                raise  # supervisorctl asks for the password
            self._fail(f"cannot reach supervisord at {url}: HTTP status {error.errcode}", say)
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
            self._fail(f"cannot reach supervisord at {url}: {why}; does it run?", say)
        except (xmlrpc.client.Error, HTTPException, ExpatError) as error:
            self._fail(f"cannot read the answer of {url}: {error}", say)
        return None

    def _fail(self, message: str, say: _Say) -> None:
        say(printable(message))
        self.ctl.exitstatus = LSBInitExitStatuses.GENERIC


def _on_stderr(message: str) -> None:
    """Beside JSON on stdout, which must stay JSON."""
    print(message, file=sys.stderr)


def make_controllerplugin(controller: Any, **config: Any) -> SynapseControllerPlugin:
    """Called by supervisorctl."""
    return SynapseControllerPlugin(controller, **config)
