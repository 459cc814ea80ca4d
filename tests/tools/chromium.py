"""A real Chromium without a window, for tests of the dashboard; where there is none, these are skipped and say so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 60.0

CONTRAST = """
const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
const pen = canvas.getContext('2d', {willReadFrequently: true});
function rgba(colour) { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data]; }
function over(a, b) { const s = a[3] / 255; return [0, 1, 2].map(i => a[i] * s + b[i] * (1 - s)).concat(255); }
function lum(c) { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; }
function back(e) { let c = [0, 0, 0, 0]; for (; e; e = e.parentElement) { const own = rgba(getComputedStyle(e).backgroundColor); c = c[3] ? over(c, own[3] ? own : c) : own; if (c[3] === 255) return c; } return [255, 255, 255, 255]; }
const poor = [];
for (const e of document.querySelectorAll('body *')) {
  const svg = e.namespaceURI.includes('svg');
  if (svg && e.tagName !== 'text') continue;
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  if (!box.width || box.width <= 1 || style.visibility === 'hidden' || e.closest('[hidden], dialog:not([open]), noscript, .sr, .skip')) continue;
  const behind = svg ? rgba(getComputedStyle(e.parentElement.querySelector('rect') || document.querySelector('.panel'))[e.parentElement.querySelector('rect') ? 'fill' : 'backgroundColor']) : back(e);
  const ground = behind[3] === 255 ? behind : over(behind, back(document.querySelector('.panel')));
  const ink = over(rgba(svg ? style.fill : style.color), ground);
  const [a, b] = [lum(ink), lum(ground)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) poor.push(`${e.tagName}.${e.getAttribute('class')} "${e.textContent.trim().slice(0, 30)}" ${ratio.toFixed(2)}`);
}
return poor;
"""  # noqa: E501
"""Texts of less contrast with what is behind them than WCAG AA asks for."""


class Browser:
    """A page. `errors` is what its console said."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, code: str, *arguments: Any) -> Any:
        """Wait, in the page, until the expression is true; its value."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05).until(lambda _: self.js(f"return ({code})", *arguments))
        except TimeoutException:
            text = self.js("return document.body.innerText")
            raise AssertionError(f"never came true: {code}\nthe page says:\n{text}\nthe console: {self.errors()}") from None

    def keys(self, *keys: str) -> None:
        """Pressed, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def emulate(self, *, width: int = 1280, height: int = 900, dark: bool = False, still: bool = False, phone: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def errors(self) -> list[str]:
        """Of the console since the last call; a refused connection is what a lost gateway looks like."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def chromium() -> Iterator[Browser]:
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver_binary = shutil.which("chromedriver")
    if binary is None or driver_binary is None:
        pytest.skip("no Chromium and chromedriver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_binary))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
