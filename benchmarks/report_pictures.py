"""Take the pictures of docs/report.md anew from reports/report.html, by Chromium.

Command python -m benchmarks.report_pictures    (after `make report`)
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

REPORT = Path("reports/report.html")
PICTURES = Path("docs/images")
# Name: color scheme, width, the part it begins with, height at most. Sizes in pixels.
TAKEN = {
    "light": ("light", 1280, "header", 1250),
    "dark": ("dark", 1280, "#metrics", 1250),
    "narrow": ("light", 400, "header", 1400),
}


def main() -> None:
    with chromium() as browser:
        for name in TAKEN:
            file = PICTURES / f"report-{name}.png"
            take(browser, name, file)
            print(f"{file}: {file.stat().st_size / 1e3:.0f} KB")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window, and the directory for what it takes."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


def take(browser: Any, name: str, file: Path) -> None:
    scheme, width, first, most = TAKEN[name]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # milliseconds
    page.goto(REPORT.resolve().as_uri())
    page.wait_for_selector(".plot .main-svg")
    top = page.locator(first).bounding_box()["y"]
    left = page.evaluate("document.documentElement.scrollHeight") - top
    page.screenshot(path=file, full_page=True, clip={"x": 0, "y": top, "width": width, "height": min(most, left)})
    page.close()


if __name__ == "__main__":
    main()
