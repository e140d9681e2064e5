"""A real browser for a test: Debian's Chromium, headless, driven through its own driver."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.integration.harness import wait_until

_SECONDS = 30.0
_LOADING_SECONDS = 60
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--no-proxy-server",
)  # fmt: skip


class Browser:
    """One window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, login: tuple[str, str] | None = None) -> None:
        """Load a page, with a login as a person's bookmark may hold it."""
        parts = urlsplit(url)
        place = parts.netloc if login is None else f"{':'.join(login)}@{parts.netloc}"
        self.driver.get(urlunsplit(parts._replace(netloc=place)))

    def js(self, script: str, *arguments: object) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, script: str, what: str = "", seconds: float = _SECONDS) -> Any:
        """The first truthy value that an expression has."""
        return wait_until(lambda: self.js(f"return {script}"), seconds, what or script)

    def find(self, selector: str) -> Any:
        """The element of a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What is to be read there; nothing where there is no such element."""
        return str(
            self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def click(self, selector: str) -> None:
        """Press a button; found anew each time, as a page that is brought up to date changes."""
        self.find(selector).click()

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """As on a window of that size, with that preference."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def command(self, name: str, **arguments: object) -> Any:
        """One of Chromium's own."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def complaints(self) -> list[str]:
        """What the console has said since it was last asked."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A window of a browser with nothing in it. The test is skipped where there is no browser;
    with SYNAPSE_BROWSER=required it fails.
    """
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        _no_browser("no browser: install Debian's packages chromium and chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = str(chromium)
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        window = webdriver.Chrome(options=options, service=Service(str(driver)))
        try:
            window.set_page_load_timeout(_LOADING_SECONDS)
            yield Browser(window)
        finally:
            window.quit()


def _no_browser(why: str) -> None:
    refuse: Callable[[str], None] = (
        pytest.fail if os.environ.get("SYNAPSE_BROWSER") == "required" else pytest.skip
    )
    refuse(why)
