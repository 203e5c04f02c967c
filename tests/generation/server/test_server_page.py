"""The page in headless Chromium: typed into, watched, hovered over, used by keyboard, compared, masked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait
from serving import Process, get, post

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
REASON = "needs Chromium and its driver: apt-get install chromium chromium-driver"
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=REASON)
SECONDS = 60


def started_browser() -> WebDriver:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,1000",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(DRIVER))


@pytest.fixture(scope="module")
def browser(server: Process) -> Iterator[WebDriver]:
    found = started_browser()
    yield found
    found.quit()


@pytest.fixture
def page(browser: WebDriver, server: Process) -> Iterator[WebDriver]:
    """The page, its models loaded; what its console says in the test is a failure."""
    browser.get(f"{server.url}/")
    until(browser, lambda: len(Select(one(browser, "#model")).options) == 2)
    yield browser
    assert [line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []


def until(page: WebDriver, condition: Callable[[], object]) -> None:
    WebDriverWait(page, SECONDS, poll_frequency=0.1).until(lambda _: condition())


def one(page: WebDriver, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def every(page: WebDriver, selector: str) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, selector)


def fill(page: WebDriver, **fields: object) -> None:
    for name, value in fields.items():
        one(page, f"#{name}").clear()
        one(page, f"#{name}").send_keys(str(value))


def said(page: WebDriver) -> str:
    return one(page, "#status").text


def test_a_text_is_written_token_by_token_with_what_it_might_have_been(page: WebDriver, server: Process) -> None:
    fill(page, prompt="The quick", max_tokens=12, seed=3)
    one(page, "#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(page, lambda: said(page) == "done")
    asked = {
        "model": "one",
        "prompt": "The quick",
        "max_tokens": 12,
        "seed": 3,
        "temperature": 0.8,
        "top_p": 0.95,
        "logprobs": 8,
    }
    expected = post(f"{server.url}/v1/completions", asked).json()["choices"][0]
    tokens = every(page, "#text-0 .token")
    names = [token.get_attribute("aria-label") for token in tokens]
    assert len(tokens) == len(expected["logprobs"]["tokens"]) >= 1
    assert (
        "".join(t.get_attribute("textContent") or "" for t in every(page, "#text-0 .token:not(.unseen)"))
        == expected["text"]
    )
    assert all(name and name.endswith("%") for name in names)
    assert len({token.value_of_css_property("background-color") for token in tokens}) > 1

    tooltip = one(page, "#alternatives")
    assert not tooltip.is_displayed()
    webdriver.ActionChains(page).move_to_element(tokens[0]).perform()
    until(page, tooltip.is_displayed)
    assert 8 <= len(every(page, "#alternatives tbody tr")) <= 9
    webdriver.ActionChains(page).move_to_element(one(page, "h1")).perform()
    until(page, lambda: not tooltip.is_displayed())


def test_tokens_are_reached_by_the_keyboard(page: WebDriver) -> None:
    fill(page, prompt="The", max_tokens=5, seed=1)
    one(page, "#go").send_keys(Keys.ENTER)
    until(page, lambda: said(page) == "done")
    listbox = one(page, "#text-0")
    for _ in range(6):  # from the button on: Stop is off when all is done
        page.switch_to.active_element.send_keys(Keys.TAB)
        if page.switch_to.active_element == listbox:
            break
    assert page.switch_to.active_element == listbox
    assert listbox.get_attribute("aria-activedescendant") == "text-0-0"
    assert one(page, "#alternatives").is_displayed()
    listbox.send_keys(Keys.ARROW_RIGHT)
    assert listbox.get_attribute("aria-activedescendant") == "text-0-1"
    assert every(page, "#text-0 [aria-selected=true]") == [one(page, "#text-0-1")]
    listbox.send_keys(Keys.ESCAPE)
    assert not one(page, "#alternatives").is_displayed()


STOP_AT_THE_FIRST_TOKENS = """
window.seen = "";
new MutationObserver((_, observer) => {
  if (!document.querySelector("#text-0 .token") || !document.querySelector("#text-1 .token")) return;
  observer.disconnect();
  window.seen = document.querySelector("#status").textContent;
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
}).observe(document.body, {childList: true, subtree: true});
"""
"""In the page itself: a driver that asks from outside may come when all is written."""


def test_two_models_are_compared_and_stopped(page: WebDriver, server: Process) -> None:
    Select(one(page, "#other")).select_by_visible_text("two")
    fill(page, prompt="The", max_tokens=96, seed=1, temperature=2)
    page.execute_script(STOP_AT_THE_FIRST_TOKENS)
    one(page, "#go").click()
    until(page, lambda: said(page) == "stopped")
    assert [heading.text for heading in every(page, "#answers h2")] == ["one", "two"]
    assert page.execute_script("return seen") == "writing"  # tokens are seen before the end
    until(page, lambda: 'omega_answers_in_flight{model="two"} 0.0' in get(f"{server.url}/metrics").text)


def test_words_are_masked_by_a_click(page: WebDriver) -> None:
    one(page, "#continue-tab").send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == one(page, "#masks-tab") and one(page, "#masks").is_displayed()
    fill(page, text="The quick fox.")
    words = every(page, "#words button")
    assert [word.text for word in words] == ["The", "quick", "fox", "."]
    words[1].click()
    until(page, lambda: len(every(page, "#candidates table")) == 1)
    assert words[1].get_attribute("aria-pressed") == "true"
    assert len(every(page, "#candidates tbody tr")) == 8
    Select(one(page, "#other")).select_by_visible_text("two")
    until(page, lambda: len(every(page, "#candidates table")) == 2)
    words[1].send_keys(Keys.ARROW_RIGHT)
    page.switch_to.active_element.send_keys(Keys.SPACE)
    until(page, lambda: len(every(page, "#candidates table")) == 4)
    words[1].click()
    words[2].click()
    until(page, lambda: not every(page, "#candidates table"))


def test_what_is_refused_is_said_on_the_page(page: WebDriver) -> None:
    fill(page, prompt="The", max_tokens=100000)
    one(page, "#go").click()
    until(page, lambda: "96 are allowed" in one(page, "#answers").text)
    page.get_log("browser")  # Chromium notes the status of the answer


def test_everything_that_is_used_has_a_name(page: WebDriver) -> None:
    controls = every(page, "button, select, input:not(#key), textarea, [tabindex='0']")
    assert len(controls) > 12
    assert [
        control.get_attribute("outerHTML")
        for control in controls
        if not control.accessible_name and control.is_displayed()
    ] == []
