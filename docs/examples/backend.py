#!/usr/bin/env python3
"""A back end that drives the models of a supervisord on another machine, or on the host of its
container. Python's standard library alone.

    SYNAPSE_URL            where supervisord answers (http://host.docker.internal:9001/RPC2)
    SYNAPSE_USER           as in [inet_http_server] (synapse)
    SYNAPSE_PASSWORD_FILE  a file with the password (/run/secrets/synapse_password)

    backend.py models                 what there is
    backend.py ask NAME QUESTION      brings a model up where need be, and asks it
    backend.py swap OLD NEW           has one take the place of the other
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import sys
import time
import urllib.parse
import uuid
import xmlrpc.client
from pathlib import Path
from typing import Any

BAD_NAME = 10
CALL_SECONDS = 10.0
POLL_SECONDS = 0.2


class Transport(xmlrpc.client.Transport):
    """With a password, and without waiting for ever."""

    def __init__(self, user: str, password: str) -> None:
        token = base64.b64encode(f"{user}:{password}".encode()).decode("ascii")
        super().__init__(headers=[("Authorization", f"Basic {token}")])

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = CALL_SECONDS
        return connection


class Refused(Exception):
    """A command was not carried out, in the listener's words."""


class Fleet:
    """The models of one supervisord."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._url, self._user, self._password = url, user, password

    def call(self, method: str, *arguments: object) -> Any:
        """One call on a connection of its own: one that failed could not be used again."""
        transport = Transport(self._user, self._password)
        with xmlrpc.client.ServerProxy(self._url, transport=transport) as server:
            return getattr(server.synapse, method)(*arguments)

    def command(self, verb: str, *arguments: object, seconds: float = 600.0) -> str:
        """Have something done, and wait until it is; what was reached, in a line.

        With its key a command is one command, however often it is asked for: so whatever is lost
        on the way is asked for again.
        """
        key, deadline = uuid.uuid4().hex, time.monotonic() + seconds
        while True:
            try:
                return self._answer(self.call(verb, *arguments, key), deadline)
            except (OSError, http.client.HTTPException, Forgotten):
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def _answer(self, command: str, deadline: float) -> str:
        while not (text := self._result(command)):
            if time.monotonic() > deadline:
                raise TimeoutError("it still waits; see `supervisorctl models`")
            time.sleep(POLL_SECONDS)
        answer = json.loads(text)
        if not answer["ok"]:
            raise Refused(answer["message"])
        return str(answer["message"])

    def _result(self, command: str) -> str:
        try:
            return str(self.call("result", command))
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == BAD_NAME:
                raise Forgotten from None
            raise

    def models(self) -> dict[str, dict[str, Any]]:
        """Each model, by name; none before the listener has reported."""
        text = self.call("models")
        found = json.loads(text)["models"] if text else []
        return {model["name"]: model for model in found}

    def ready(self, name: str, seconds: float = 600.0) -> dict[str, Any]:
        """A model, brought up where need be."""
        if self.models().get(name, {}).get("phase") != "ready":
            self.command("enable", name)
        deadline = time.monotonic() + seconds
        while (model := self.models().get(name, {})).get("phase") != "ready":
            if model.get("phase") == "failed" or time.monotonic() > deadline:
                raise Refused(f"{name} is not ready: {model.get('reason')}")
            time.sleep(POLL_SECONDS)
        return model

    def ask(self, name: str, question: str) -> str:
        """What a model says."""
        model = self.ready(name)
        body = {"model": model["alias"], "messages": [{"role": "user", "content": question}],
                "max_tokens": 64}  # fmt: skip
        connection = http.client.HTTPConnection(self._host_of(model["url"]), timeout=300)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return str(answer["choices"][0]["message"]["content"])

    def _host_of(self, url: str) -> str:
        """Seen from here, a model on the loopback of supervisord's machine is on that machine."""
        model, supervisord = urllib.parse.urlsplit(url), urllib.parse.urlsplit(self._url)
        is_local = model.hostname in ("127.0.0.1", "::1")
        host = supervisord.hostname if is_local else model.hostname
        return f"[{host}]:{model.port}" if ":" in str(host) else f"{host}:{model.port}"


class Forgotten(Exception):
    """supervisord was restarted, and knows nothing of the command."""


def from_environment() -> Fleet:
    url = os.environ.get("SYNAPSE_URL", "http://host.docker.internal:9001/RPC2")
    user = os.environ.get("SYNAPSE_USER", "synapse")
    path = os.environ.get("SYNAPSE_PASSWORD_FILE", "/run/secrets/synapse_password")
    return Fleet(url, user, Path(path).read_text("utf-8").strip())


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["models"]:
                for name, model in from_environment().models().items():
                    print(name, model["phase"], model["url"])
            case ["ask", name, question]:
                print(from_environment().ask(name, question))
            case ["swap", old, new]:
                print(from_environment().command("swap", old, new))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (Refused, OSError, xmlrpc.client.Error) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
