"""A headless Chromium that opens pages from files, and what it complained of."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

__all__ = ["complaints", "open_browser", "open_page"]

# A machine's browser looks for updates and more by itself; a test's does nothing but open the file.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def open_browser(width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator[Chrome]:
    """A browser with a profile of its own, closed at the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(
        prefix="twotower-browser-", ignore_cleanup_errors=True
    ) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        # Both paths are named, so that selenium does not go and fetch a driver.
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride", size
            )  # headless windows have a least width
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


def complaints(driver: Chrome) -> list[str]:
    """What the console said since the last call: errors, warnings and refusals."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]


def open_page(driver: Chrome, folder: Path, page: str, at: str = "") -> Any:
    """A page as a file, opened without a complaint."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    driver.get("about:blank")
    driver.get(file.as_uri() + at)
    assert not complaints(driver)
    return driver
