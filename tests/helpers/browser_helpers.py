"""The browser that tests of pages share: one headless Chromium of the session (the fixture `browser`)."""

import importlib.util
import shutil
from pathlib import Path

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1300,1000",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # pages must do without the network
)  # fmt: skip
MISSING = [name for name, path in (("chromium", CHROMIUM), ("chromium-driver", DRIVER)) if path is None]
MISSING += ["selenium"] if importlib.util.find_spec("selenium") is None else []
REASON = f"not here: {', '.join(MISSING)} (pip, or apt-get as root, brings them)"
needs_browser = pytest.mark.skipif(bool(MISSING), reason=REASON)


def start_browser(profile: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def show(browser, page: Path, width: int, height: int = 900, is_dark: bool = False) -> None:
    """Opens a file in a viewport of this size."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())


def seen_by_probe(browser) -> str:
    """What the probe of a page has left in its body."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda driver: driver.execute_script("return document.body.dataset.seen"))
