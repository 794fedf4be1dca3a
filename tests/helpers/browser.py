"""A real Chromium without a window, for the pages: it says what a user would see, and what the console would.

Debian: `apt-get install chromium chromium-driver`. Without them the tests that need a browser are skipped with that
advice; where CI is set in the environment they fail instead.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--no-default-browser-check", "--force-device-scale-factor=1",
)  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)
ADVICE = "Chromium and its driver are needed (Debian: apt-get install chromium chromium-driver)"


@contextmanager
def browser(folder: Path, *, dark: bool = False) -> Iterator[Any]:
    """A selenium driver with a fresh profile under `folder`; it logs console and network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(ADVICE)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=chromedriver))
    driver.set_script_timeout(240)  # axe takes minutes where others load the machine
    try:
        prefer(driver, dark=dark)
        yield driver
    finally:
        driver.quit()


def prefer(driver: Any, *, dark: bool) -> None:
    """Make the system's colour scheme dark or light."""
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def open_page(driver: Any, path: Path, size: tuple[int, int] = DESKTOP, fragment: str = "") -> None:
    """Open a file in a viewport of `size` CSS pixels, from a blank page, so that its scripts start anew."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get("about:blank")
    driver.get(path.absolute().as_uri() + (f"#{fragment}" if fragment else ""))


def console(driver: Any) -> list[str]:
    """What the console said since the last call: errors, warnings, refused scripts."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Every address that was asked for since the last call, but for files, data, and what the page's policy stopped."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    stopped = {event["params"]["requestId"] for event in events if event["params"].get("blockedReason") == "csp"}
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [params["request"]["url"] for params in sent if params["requestId"] not in stopped]
    return [url for url in urls if not url.startswith(("data:", "file:", "about:", "blob:", "chrome"))]


def scrolls_sideways(driver: Any) -> bool:
    """Whether the page is wider than the window."""
    root = "document.documentElement"
    return bool(driver.execute_script(f"return {root}.scrollWidth > {root}.clientWidth"))


def accessibility_problems(driver: Any) -> list[str]:
    """Violations that axe-core finds of WCAG 2.1 A and AA and of its best practices: rule, target, what is wrong."""
    script = (resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    # By the protocol: the page's own policy would refuse a script that is put into it.
    driver.execute_cdp_cmd("Runtime.evaluate", {"expression": script})
    found = driver.execute_async_script("axe.run(document).then(arguments[0], e => arguments[0]({error: String(e)}))")
    assert "error" not in found, found
    return [
        f"{violation['id']}: {node['target']}: {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def screenshot(driver: Any, path: Path, *, whole: bool = False) -> None:
    """Write what is seen, or the whole page, as PNG."""
    options = {"format": "png", "captureBeyondViewport": whole}
    if whole:
        size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000), "scale": 1}
    path.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))
