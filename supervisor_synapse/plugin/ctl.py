"""`[ctlplugin:synapse]`, inside supervisorctl: the commands that are about models."""

from __future__ import annotations

import json
import xmlrpc.client
from typing import Any

from supervisor.supervisorctl import ControllerPluginBase, LSBInitExitStatuses
from supervisor.xmlrpc import Faults

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.errors import TransientError


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
            self.ctl.output(f"Error: models does not know {unknown_flags[0]}")
            self.help_models()
            self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS
            return
        if not self.ctl.upcheck():
            return
        text = self._ask("models")
        if text is None:
            return
        self._show(text, wanted, as_json=as_json)

    def help_models(self) -> None:
        self.ctl.output("models [NAME ...]\t\tShow the models and why they are as they are.")
        self.ctl.output("models --json [NAME ...]\tThe same for programs.")

    def _show(self, text: str, wanted: list[str], *, as_json: bool) -> None:
        try:
            rows = snapshots.load(text).models if text else ()
        except TransientError as error:
            self._fail(str(error))
            return
        known = {row.name for row in rows}
        for name in wanted:
            if name not in known:
                self._fail(f"{name}: ERROR (no such model)")
        chosen = [row for row in rows if not wanted or row.name in wanted]
        if as_json:
            self.ctl.output(json.dumps(snapshots.public(chosen), indent=2))
        elif not text:
            self.ctl.output("The listener has not reported yet.")
        elif not rows:
            self.ctl.output("No models. `synapse discover` looks for some.")
        else:
            from supervisor_synapse import report

            self.ctl.output(report.models_table(chosen))

    def _ask(self, method: str) -> str | None:
        """What a method of our namespace answers; None where it failed, which was shown."""
        try:
            namespace = self.ctl.get_server_proxy().synapse
            return str(getattr(namespace, method)())
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.UNKNOWN_METHOD:
                self._fail("supervisord runs without [rpcinterface:synapse]")
            else:
                self._fail(str(fault.faultString))
        except (OSError, xmlrpc.client.Error) as error:
            self._fail(f"cannot reach supervisord: {error}")
        return None

    def _fail(self, message: str) -> None:
        self.ctl.output(message)
        self.ctl.exitstatus = LSBInitExitStatuses.GENERIC


def make_controllerplugin(controller: Any, **config: Any) -> SynapseControllerPlugin:
    """Called by supervisorctl."""
    return SynapseControllerPlugin(controller, **config)
