"""Update the screenshots of docs/report.md from reports/report.html, with Chromium.

Command python -m benchmarks.report_pictures    (after `make report`)
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

REPORT = Path("reports/report.html")
PICTURE_DIRECTORY = Path("docs/images")
# Name to color scheme, width, selector of the first element shown, and maximum height; sizes in pixels.
VIEWS = {
    "light": ("light", 1280, "header", 1250),
    "dark": ("dark", 1280, "#metrics", 1250),
    "narrow": ("light", 400, "header", 1400),
}


def main() -> None:
    with open_chromium() as browser:
        for name in VIEWS:
            file = PICTURE_DIRECTORY / f"report-{name}.png"
            take_picture(browser, name, file)
            print(f"{file}: {file.stat().st_size / 1e3:.0f} KB")


@contextmanager
def open_chromium() -> Iterator[Any]:
    """Open a headless browser and create the directory of the screenshots."""
    PICTURE_DIRECTORY.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


def take_picture(browser: Any, name: str, file: Path) -> None:
    scheme, width, selector, max_height = VIEWS[name]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # milliseconds
    page.goto(REPORT.resolve().as_uri())
    page.wait_for_selector(".plot .main-svg")
    top = page.locator(selector).bounding_box()["y"]
    available = page.evaluate("document.documentElement.scrollHeight") - top
    page.screenshot(
        path=file, full_page=True, clip={"x": 0, "y": top, "width": width, "height": min(max_height, available)}
    )
    page.close()


if __name__ == "__main__":
    main()
