"""The page in a real browser, on a real supervisord with real servers, behind a password."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import os
import re
import signal
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from supervisor_synapse.core.model import (
    DeviceRow,
    Failure,
    FailureClass,
    Holding,
    ListenerRow,
    Phase,
    Snapshot,
)
from tests.integration import harness
from tests.integration.bare_supervisord import LOGIN, BareSupervisord, bare_supervisord
from tests.integration.browser import Browser, browser
from tests.integration.harness import Deployment, deployed, holds_for, wait_until
from tests.unit.builders import GIB, MIB, row

_ALPHA, _BETA = "alpha", "beta"
# A model that failed stays so for longer than the page takes to look again.
_SETTINGS = """enable = all
[probe]
period_seconds = 1
[restart]
backoff_initial_seconds = 4
"""
_LONGEST_NAME = "m" + "-0123456789" * 5 + "-q4_k_m"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def fleet(window: Browser) -> Iterator[Deployment]:
    """Two models that are ready, and the page."""
    with deployed(_SETTINGS) as place:
        place.add("alpha", "beta")
        place.synapse("init")
        _open_web_server(place)
        place.synapse("up", "--detach")
        place.wait_for_rows({_ALPHA: "ready", _BETA: "ready"})
        yield place


@pytest.fixture(scope="module")
def bare(window: Browser) -> Iterator[BareSupervisord]:
    with bare_supervisord([_LONGEST_NAME, "hostile"]) as host:
        yield host


@pytest.fixture(autouse=True)
def _nothing_was_complained_of(window: Browser) -> Iterator[None]:
    """No page ever makes the browser complain, least of all of what its policy forbids."""
    window.look()
    yield
    assert window.complaints() == []


def _open_web_server(place: Deployment) -> None:
    place.web = place.open_web_server()  # type: ignore[attr-defined]
    user, password = LOGIN
    with (place.etc / "supervisord.conf").open("a") as main_file:
        main_file.write(f"username={user}\npassword={password}\n")


def _show(window: Browser, place: Any, page: str = "synapse.html") -> None:
    url = place.web if isinstance(place, Deployment) else place.url
    window.open(f"{url}/{page}", LOGIN)


def _phase(name: str) -> str:
    return f"document.getElementById('m-{name}')?.dataset.phase"


# --- who may see it ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["synapse.html", "synapse.css", "synapse.js"])
def test_without_the_password_nothing_is_shown(fleet: Any, page: str) -> None:
    assert harness.http(f"{fleet.web}/{page}")[0] == 401
    assert harness.http(f"{fleet.web}/{page}", {})[0] == 401
    assert harness.http(f"{fleet.web}/{page}", login=LOGIN)[0] == 200


def test_the_stock_page_and_ours_lead_to_each_other(fleet: Any, window: Browser) -> None:
    _show(window, fleet, "index.html")
    window.click("#buttons a[href='synapse.html']")
    window.wait_for(f"{_phase(_ALPHA)} === 'ready'")
    window.click("nav a[href='index.html']")
    window.wait_for(
        "document.getElementById('statusmessage') || document.title.includes('Supervisor')"
    )


# --- up to date, in place ------------------------------------------------------------------------


def test_a_server_is_seen_to_die_and_heal_and_ones_place_is_kept(
    fleet: Any, window: Browser
) -> None:
    _show(window, fleet)
    window.wait_for(f"{_phase(_ALPHA)} === 'ready'")
    window.look(height=400)
    window.js(
        """
        const row = document.getElementById('m-alpha');
        window.seen = [];
        new MutationObserver(() => window.seen.push(row.dataset.phase))
            .observe(row, {attributes: true});
        const typed = document.querySelector('input[name=generation]');
        typed.value = '7';
        document.querySelector('select[name=old]').selectedIndex = 2;
        typed.scrollIntoView({block: 'center'});
        typed.focus({preventScroll: true});
        """
    )
    place = "document.activeElement.getBoundingClientRect().top"
    at = window.js(f"return {place}")
    os.kill(fleet.rows()[_ALPHA]["pid"], signal.SIGKILL)
    window.wait_for("window.seen.length > 1 && window.seen.at(-1) === 'ready'", "seen to heal")
    assert set(window.js("return window.seen")) - {"ready"}
    assert "restart" in window.text(f"#m-{_ALPHA} td:nth-of-type(4)")
    assert "killed" in window.text(f"#why-{_ALPHA}") or "last failure" in window.text(
        f"#why-{_ALPHA}"
    )
    assert window.js("return document.activeElement.name") == "generation"
    assert window.js("return document.activeElement.value") == "7"
    assert window.js("return document.querySelector('select[name=old]').selectedIndex") == 2
    assert window.js(f"return {place}") == pytest.approx(at, abs=1)
    assert "alpha: " in window.js("return document.getElementById('announcer').textContent")


def test_what_was_opened_stays_open_and_what_was_closed_stays_closed(
    fleet: Any, window: Browser
) -> None:
    _show(window, fleet)
    window.wait_for(f"document.getElementById('why-{_ALPHA}') !== null", "a failure to show")
    window.click(f"#why-{_ALPHA} summary")
    opened = window.js(f"return document.getElementById('why-{_ALPHA}').open")
    _wait_for_turns(window, 1)
    assert window.js(f"return document.getElementById('why-{_ALPHA}').open") == opened


def _wait_for_turns(window: Browser, count: int) -> None:
    """Until the page has asked so many times more."""
    asked = (
        "performance.getEntriesByType('resource').filter(e => e.initiatorType === 'fetch').length"
    )
    before = window.js(f"return {asked}")
    window.wait_for(f"{asked} >= {before + count}", "the page asks again")


# --- acting --------------------------------------------------------------------------------------


def test_a_model_is_disabled_and_enabled_by_its_buttons(fleet: Any, window: Browser) -> None:
    _show(window, fleet)
    window.click(f"button[value='disable {_BETA}']")
    window.wait_for(f"{_phase(_BETA)} === 'disabled'")
    said = "document.getElementById('wishes').innerText"
    window.wait_for(f"/done disable {_BETA}/.test({said})", "what came of it")
    window.click(f"button[value='enable {_BETA}']")
    window.wait_for(f"{_phase(_BETA)} === 'ready'")


def test_a_restart_stops_and_starts_without_anybody_waiting(fleet: Any, window: Browser) -> None:
    before = fleet.rows()[_BETA]["pid"]
    _show(window, fleet)
    window.click(f"button[value='restart {_BETA}']")
    wait_until(
        lambda: fleet.rows().get(_BETA, {}).get("phase") == "ready"
        and fleet.rows()[_BETA]["pid"] != before, 30, "another process of it is ready",
    )  # fmt: skip
    window.wait_for("/started it again/.test(document.getElementById('wishes').innerText)")


def test_without_scripts_forms_act_as_well(fleet: Any, window: Browser) -> None:
    window.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        _show(window, fleet)
        window.click(f"button[value='stop {_BETA}']")
        wait_until(lambda: fleet.rows()[_BETA]["phase"] == "stopped", 30, "it was stopped")
        assert f"stop {_BETA}" in window.find("#wishes").text
    finally:
        window.command("Emulation.setScriptExecutionDisabled", value=False)
    _show(window, fleet)
    window.click(f"button[value='start {_BETA}']")
    window.wait_for(f"{_phase(_BETA)} === 'ready'")


def test_a_get_does_nothing(fleet: Any, window: Browser) -> None:
    _show(window, fleet)
    token = window.js("return document.querySelector('input[name=token]').value")
    query = urllib.parse.urlencode({"token": token, "do": f"stop {_ALPHA}"})
    before, wishes = fleet.rows()[_ALPHA]["pid"], window.text("#wishes")
    _show(window, fleet, f"synapse.html?{query}")
    window.wait_for(f"{_phase(_ALPHA)} === 'ready'")
    assert holds_for(lambda: fleet.rows()[_ALPHA]["pid"] == before, 1.5)
    assert window.text("#wishes") == wishes


# --- what other sites would like to do -----------------------------------------------------------

_ATTACK = """<!doctype html><link rel="icon" href="data:,"><title>other</title>
<form id="page" method="post" action="{url}/synapse.html">
<input name="do" value="stop {name}"><input name="token" value="x"></form>
<form id="stock" action="{url}/index.html">
<input name="processname" value="{name}"><input name="action" value="stop"></form>
<form id="rpc" method="post" action="{url}/RPC2" enctype="text/plain"><input name="<!--" value="-->
<methodCall><methodName>supervisor.stopProcess</methodName><params><param><value><string>{name}
</string></value></param></params></methodCall>"></form>"""


@contextlib.contextmanager
def _other_site(page: str) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("form", ["page", "stock", "rpc"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_another_sites_page_stops_nothing(
    fleet: Any, window: Browser, host: str, form: str
) -> None:
    """Though the browser sends the password: from another port of this host, and another host."""
    _show(window, fleet)
    before = fleet.rows()[_ALPHA]["pid"]
    with _other_site(_ATTACK.format(url=fleet.web, name=_ALPHA)) as port:
        window.open(f"http://{host}:{port}/")
        window.js(f"document.getElementById('{form}').submit()")
        window.wait_for(f"location.port !== '{port}' && document.readyState === 'complete'")
    assert re.search("403|Refused", window.text("body"))
    assert fleet.rows()[_ALPHA]["pid"] == before
    assert [said for said in window.complaints() if not re.search("403|favicon", said)] == []


def test_programs_without_a_browsers_headers_are_served_as_ever(fleet: Any) -> None:
    body = b"<methodCall><methodName>supervisor.getState</methodName></methodCall>"
    assert _post(fleet, {}, body)[0] == 200
    assert _post(fleet, {"Origin": fleet.web}, body)[0] == 200
    assert _post(fleet, {"Origin": "http://elsewhere.example"}, body)[0] == 403
    assert _post(fleet, {"Sec-Fetch-Site": "cross-site"}, body)[0] == 403


def _post(place: Any, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(place.web.rpartition(":")[2]), timeout=30
    )
    token = base64.b64encode(":".join(LOGIN).encode()).decode()
    try:
        connection.request("POST", "/RPC2", body, {"Authorization": f"Basic {token}", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# --- what comes from outside ---------------------------------------------------------------------

_SCRIPT = (
    "</td><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
)
_TURNED = "\u202eevil\x1b[31m\x00\u2066 {{ 7*7 }} end"


def _hostile_snapshot() -> Snapshot:
    failure = Failure(FailureClass.CRASHED, _SCRIPT + _TURNED, time.time())
    hostile = row(
        name="hostile", repo=_SCRIPT, file=_SCRIPT, reason=_SCRIPT + _TURNED, phase=Phase.FAILED,
        device=_SCRIPT, estimate_source=_SCRIPT, last_failure=failure, next_retry_seconds=60.0,
        url="javascript:document.title='pwned'", failures=((_SCRIPT, 3),),
    )  # fmt: skip
    named = row(name="<img src=x onerror=document.title='pwned'>")
    long = row(name=_LONGEST_NAME, repo="r" * 200, reason="x" * 390, device="D" * 60)
    holdings = (Holding(_LONGEST_NAME, GIB, GIB), Holding(_SCRIPT, None, GIB))
    device = DeviceRow(
        _SCRIPT, _SCRIPT, 8 * GIB, 5 * GIB, 512 * MIB, 4 * GIB, GIB, holdings, _SCRIPT
    )
    listener = ListenerRow(1, _SCRIPT[:40], time.time(), 0.0, 0.0)
    return Snapshot(time.time(), (hostile, named, long), (device,), listener)


def _hostile_line() -> dict[str, Any]:
    return {
        "when": time.time(), "model": _SCRIPT, "from": _SCRIPT, "to": _SCRIPT, "reason": _SCRIPT,
        "class": _SCRIPT, "evidence": _SCRIPT + _TURNED,
    }  # fmt: skip


def test_what_comes_from_outside_is_text_and_nothing_else(
    bare: BareSupervisord, window: Browser
) -> None:
    bare.publish(_hostile_snapshot(), [_hostile_line()])
    _show(window, bare)
    _wait_for_turns(window, 1)
    assert "pwned" not in window.js("return document.title")
    assert window.js("return document.querySelectorAll('script, img').length") == 1
    assert _SCRIPT in window.text("#why-hostile .evidence")
    assert "{{ 7*7 }} end" in window.text("#why-hostile .evidence")
    shown = window.js("return document.documentElement.textContent")
    assert not set("\u202e\u2066\x1b\x00") & set(shown)
    links = window.js("return [...document.querySelectorAll('#m-hostile a')].map(a => a.href)")
    assert links == []


_CONTRASTS = """
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parse = text => text.match(/[\\d.]+/g).map(Number);
const ground = element => {
    for (let e = element; e; e = e.parentElement) {
        const colour = parse(getComputedStyle(e).backgroundColor);
        if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
};
const bad = [];
for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.closest('svg')) continue;
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
}
return bad;
"""


@pytest.mark.parametrize(("width", "dark"), [(340, False), (390, True), (800, False), (1280, True)])
def test_nothing_overflows_and_all_can_be_read(
    bare: BareSupervisord, window: Browser, width: int, dark: bool
) -> None:
    """With the longest names and reasons that there are."""
    bare.publish(_hostile_snapshot(), [_hostile_line()])
    window.look(width=width, height=844, dark=dark)
    _show(window, bare)
    widest = window.js("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert widest[0] <= widest[1] == width
    assert window.js(_CONTRASTS) == []


def test_each_thing_that_can_be_pressed_or_filled_in_has_a_name(
    bare: BareSupervisord, window: Browser
) -> None:
    bare.publish(_hostile_snapshot())
    _show(window, bare)
    nodes = window.command("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "link", "combobox", "spinbutton", "main", "table", "region")
    found = [node for node in nodes if node.get("role", {}).get("value") in roles]
    unnamed = [
        node["role"]["value"] for node in found
        if node["role"]["value"] not in ("main", "table") and not node["name"]["value"]
    ]  # fmt: skip
    assert {node["role"]["value"] for node in found} >= {"button", "link", "main", "table"}
    assert unnamed == []


def test_without_a_listener_the_page_says_so(window: Browser) -> None:
    with bare_supervisord() as host:
        _show(window, host)
        assert "has not spoken yet" in window.text("#warning")
        host.publish(Snapshot(time.time(), (), (), None))
        window.wait_for("/No models yet/.test(document.getElementById('models').innerText)")


def test_an_open_page_works_on_after_supervisord_was_reloaded(window: Browser) -> None:
    with bare_supervisord(["tiny"]) as host:
        host.publish(Snapshot(time.time(), (row(name="tiny"),), (), None))
        _show(window, host)
        window.wait_for(f"{_phase('tiny')} === 'ready'")
        with host.rpc() as server:
            server.supervisor.restart()
        window.wait_for("/has not spoken yet/.test(document.querySelector('main').innerText)")
        host.publish(Snapshot(time.time(), (row(name="tiny"),), (), None))
        window.wait_for(f"{_phase('tiny')} === 'ready'")
        window.click("button[value='disable tiny']")
        window.wait_for("/under way disable tiny/.test(document.querySelector('main').innerText)")
        window.complaints()  # of the moment in which nobody answered
