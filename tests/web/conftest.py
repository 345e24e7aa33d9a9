"""A real browser: the system's chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.support.gateway_stack import Gateway

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)

expect.set_options(timeout=30_000)  # only ends a test that has failed


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A new browser profile; the test fails if a page does something that it must not do."""
    faults: list[str] = []
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.on("console", lambda line: line.type == "error" and faults.append(line.text))
        context.on("weberror", lambda error: faults.append(str(error.error)))
        context.on(
            "request",
            lambda request: (
                request.url.startswith(("http://127.0.0.1:", "blob:", "data:"))
                or faults.append(request.url)
            ),
        )
        context.faults = faults
        yield context
    assert faults == []


@pytest.fixture
def page(context: BrowserContext, gateway: Gateway) -> Page:
    """The page, open, with its sample on display."""
    page = context.new_page()
    page.goto(gateway.url)
    page.get_by_text("computed beforehand").first.wait_for()
    page.get_by_text("Ready").wait_for()
    return page
