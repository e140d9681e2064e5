"""What a back end in a container does with a supervisord on the host: which models are ready, and
what one of them answers. Standard library only; an example to start from.

Where: SYNAPSE_URL, SYNAPSE_USER, SYNAPSE_PASSWORD_FILE; SYNAPSE_MODELS_HOST, where the models
answer as seen from here.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.request
import xmlrpc.client
from pathlib import Path
from typing import Any

_SECONDS = 120.0


class Login(xmlrpc.client.Transport):
    """HTTP with a password, which thus stands in no URL and in no message of an error."""

    def __init__(self, user: str, password: str) -> None:
        super().__init__()
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._authorization = ("Authorization", f"Basic {token}")

    def send_headers(self, connection: Any, headers: list[tuple[str, str]]) -> None:
        super().send_headers(connection, [*headers, self._authorization])


def ready_models(url: str, login: Login) -> list[dict[str, Any]]:
    """The models that answer, as `models --json` shows them."""
    with xmlrpc.client.ServerProxy(f"{url}/RPC2", transport=login) as server:
        told = str(server.synapse.models())
    models = json.loads(told)["models"] if told else []  # empty: the listener has not spoken yet
    return [model for model in models if model["phase"] == "ready"]


def answer(host: str, model: dict[str, Any], words: str) -> str:
    """What a model says."""
    question = {
        "model": model["alias"], "max_tokens": 32,
        "messages": [{"role": "user", "content": words}],
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://{host}:{model['port']}/v1/chat/completions",
        json.dumps(question).encode(), {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=_SECONDS) as reply:  # noqa: S310
        return str(json.load(reply)["choices"][0]["message"]["content"])


def main() -> int:
    """Ask the first model that is ready."""
    password = Path(os.environ["SYNAPSE_PASSWORD_FILE"]).read_text().strip()
    login = Login(os.environ.get("SYNAPSE_USER", "synapse"), password)
    ready = ready_models(os.environ["SYNAPSE_URL"], login)
    for model in ready:
        print(f"{model['name']}: {model['tier']}, port {model['port']}")
    if not ready:
        print("no model is ready")
        return 1
    print(answer(os.environ.get("SYNAPSE_MODELS_HOST", "127.0.0.1"), ready[0], "Hello"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
