"""Changes at the wrong moment, or of the wrong kind: what the user meant stands, and nothing that
was not proved is ever gone back to.
"""

from __future__ import annotations

import time

import pytest

from tests.integration.harness import holds_for
from tests.integration.test_changes import edit, proved

pytestmark = pytest.mark.usefixtures("llama_server")


def test_a_model_stopped_by_hand_stays_stopped_when_its_edited_block_is_updated() -> None:
    """`update` replaces its program; that is no reason to start it. A start by hand is."""
    with proved("beta") as at:
        at.ctl("stop", "beta")
        at.wait_for_rows({"beta": "stopped"})
        time.sleep(3.5)  # long enough to be told from the stop of an `update`
        edit(at, "beta", "--temp 0.5")
        at.ctl("update")
        assert holds_for(lambda: at.rows().get("beta", {}).get("phase") in (None, "stopped"), 4)
        edit(at, "beta", "--top-k 3")
        at.ctl("update")
        assert holds_for(lambda: at.rows().get("beta", {}).get("phase") in (None, "stopped"), 4)
        at.ctl("start", "beta")
        at.wait_for_rows({"beta": "ready"})
        assert {"--temp", "--top-k"} <= set(at.servers()["beta"].cmdline())
