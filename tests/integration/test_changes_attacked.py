"""Changes at the wrong moment, or of the wrong kind: what the user meant stands, and nothing that
was not proved is ever gone back to.
"""

from __future__ import annotations

import re
import time

import pytest

from tests.integration.harness import holds_for, promised, wait_until
from tests.integration.test_changes import BACK_SECONDS, _are_proved, block, edit, proved

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


def test_a_block_that_supervisord_does_not_hold_is_not_proved_by_what_it_does() -> None:
    """Its environment was edited at rest and not updated: what runs then is still the old one. Once
    updated it fails, and there is a way back.
    """
    with proved("beta") as at:
        former = block(at, "beta").read_text()
        at.ctl("stop", "beta")
        at.wait_for_rows({"beta": "stopped"})
        bad = re.sub(
            r"^(environment=.*)$", r'\1,LLAMA_ARG_N_PREDICT="many"', former, flags=re.MULTILINE
        )
        assert bad != former
        block(at, "beta").write_text(bad)
        time.sleep(4)  # the listener has looked, and has tried again
        at.ctl("start", "beta")
        at.wait_for_rows({"beta": "ready"})
        known = len(at.synapse("generations", "beta", "--json").json())
        assert holds_for(lambda: at.rows()["beta"]["phase"] == "ready", 4)
        at.ctl("update")
        wait_until(
            lambda: block(at, "beta").read_text() == former and _are_proved(at, ("beta",)),
            promised(BACK_SECONDS), f"{at.rows()}",
        )  # fmt: skip
        assert known == 1
