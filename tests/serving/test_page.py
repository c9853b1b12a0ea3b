"""The page in headless Chromium: streaming, colours, slots under pointer and keyboard, errors, widths, its policy."""

import shutil
import time

import pytest
from served import serving, until, untrained_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver is found")

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
  "--disable-dev-shm-usage")  # fmt: skip


class Browser:
  """A page in a browser, found by CSS selectors."""

  def __init__(self, profile):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
      options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

  def open(self, url, width=1000, height=900):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    self.driver.get(url)

  def all(self, selector):
    return self.driver.find_elements("css selector", selector)

  def one(self, selector):
    (found,) = self.all(selector)
    return found

  def run(self, script, *args):
    return self.driver.execute_script(script, *args)

  def set(self, selector, value):
    """Changes a slider or a field like a user."""
    self.run(
      "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));",
      self.one(selector), value,
    )  # fmt: skip

  def keys(self, *keys):
    webdriver.ActionChains(self.driver).send_keys(*keys).perform()

  def generate(self):
    self.one("#start").click()
    until(lambda: self.one("#status").text.startswith("Done"))

  def problems(self):
    """What the browser has logged, without its advice."""
    return [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp("profile"))
  yield browser
  browser.driver.quit()


def test_text_is_coloured_by_its_pauses(browser, served):
  browser.open(served.url)
  until(lambda: "at most 2 pauses per token" in browser.one("#model").text)
  browser.set("#tokens", 20)
  browser.generate()
  body = {"prompt": "The film was", "max_tokens": 20, "temperature": 0.8, "seed": 0}
  for panel, extra in (("#paced", {"mode": "self_paced", "read": "sample"}), ("#plain", {"mode": "none"})):
    (choice,) = served.complete(**body, **extra)["choices"]
    spans = browser.all(f"{panel} .text .t")
    assert "".join(span.get_property("textContent") for span in spans) == choice["text"]
    pauses = [next((int(name[1]) for name in span.get_attribute("class").split() if name[0] == "u"), 0)
              for span in spans]  # fmt: skip
    assert pauses == choice["pauses"]
    slots = sum(len(each["d"]) for each in choice["slots"])
    assert f"slots per token {slots / 20:.2f}" in " ".join(browser.one(f"{panel} .numbers").text.split())
    if panel == "#paced":
      assert len(set(pauses)) > 1
      colours = {browser.run("return getComputedStyle(arguments[0]).backgroundColor", span) for span in spans}
      assert len(colours) == len(set(pauses))
  assert browser.problems() == []


def test_slots_under_the_pointer_and_by_keyboard(browser, served):
  from selenium.webdriver.common.keys import Keys

  browser.open(served.url)
  until(lambda: "method cyb" in browser.one("#model").text)
  browser.set("#tokens", 20)
  browser.generate()
  (choice,) = served.complete(prompt="The film was", max_tokens=20, temperature=0.8, seed=0)["choices"]
  spans = browser.all("#paced .text .t")
  # The text is random: some tokens are invisible, and others are wrapped, so that their middle is another token.
  pointed = browser.run(
    "return arguments[0].findIndex((span, i) => { const r = span.getBoundingClientRect();"
    " return i > 1 && document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2) === span; });", spans,
  )  # fmt: skip
  webdriver.ActionChains(browser.driver).move_to_element(spans[pointed]).perform()

  def rows():
    cells = [row.find_elements("css selector", "td") for row in browser.all("#slots tbody tr")]
    return [[cell.text for cell in row] for row in cells]

  def expected(number):
    slots = choice["slots"][number]
    return [[f"{slots[name][slot]:.4f}" for name in "dts"] for slot in range(len(slots["d"]))]

  assert rows() == expected(pointed)
  # One stop for the tab key; the arrows move between tokens.
  assert [span.get_attribute("tabindex") for span in spans] == ["0"] + ["-1"] * 19
  browser.run("arguments[0].focus()", spans[0])
  assert rows() == expected(0)
  browser.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert rows() == expected(2)
  assert browser.driver.switch_to.active_element == spans[2]
  browser.keys(Keys.END)
  assert rows() == expected(19)
  assert browser.all("#slots tbody tr.read th")[0].text.endswith("read")
  browser.keys(Keys.ESCAPE)
  assert not browser.one("#slots").is_displayed()


def test_sliders_reach_the_model(browser, served):
  browser.open(served.url)
  until(lambda: "method cyb" in browser.one("#model").text)
  browser.set("#threshold", 0)
  assert browser.one("input[value=threshold]").is_selected()
  browser.set("#budget", 3)
  assert browser.one("#budget-value").text == "at most 3"
  browser.generate()
  assert [span.get_attribute("class") for span in browser.all("#paced .text .t")[:3]] == ["t c6 u2", "t c1 u1", "t"]
  browser.one("#compare").click()
  assert not browser.one("#plain").is_displayed()
  browser.one("#compare").click()


def test_errors_are_shown_and_stop_stops(browser, served):
  browser.open(served.url, 800)
  until(lambda: "method cyb" in browser.one("#model").text)
  browser.set("#temperature", 9)
  browser.run("document.getElementById('form').noValidate = true")
  browser.one("#start").click()
  until(lambda: "temperature: 9 must be a number in 0..2" in browser.one("#status").text)
  browser.set("#temperature", 1)
  browser.set("#tokens", 30)
  before = served.engine.stats.cancelled
  # The stop is pressed before the answer is complete.
  browser.run("document.getElementById('start').click(); document.getElementById('stop').click();")
  until(lambda: browser.one("#status").text == "Stopped.")
  until(lambda: served.engine.num_running == served.engine.num_waiting == 0)
  assert served.engine.stats.cancelled >= before
  browser.generate()
  browser.problems()  # the refused request


def test_no_width_needs_scrolling_and_every_control_has_a_label(browser, served):
  for width in (360, 800, 1600):
    browser.open(served.url, width)
    until(lambda: "method cyb" in browser.one("#model").text)
    browser.generate()
    inner, scroll = browser.run("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width
    assert scroll <= width
    side_by_side = browser.one("#paced").rect["y"] == browser.one("#plain").rect["y"]
    assert side_by_side == (width >= 800)
  assert (
    browser.run("return [...document.querySelectorAll('input, textarea')].filter((x) => x.labels.length !== 1).length")
    == 0
  )
  assert browser.problems() == []


def test_a_server_that_is_gone(browser, run):
  with serving(run) as served:
    browser.open(served.url)
    until(lambda: "method cyb" in browser.one("#model").text)
  browser.one("#start").click()
  until(lambda: browser.one("#status").text == "The server does not answer. Is cyb-serve still running?")
  assert browser.one("#start").is_enabled()
  browser.problems()


def test_a_key_is_asked_for(browser, run):
  with serving(run, api_key="secret") as served:
    browser.open(served.url)
    until(lambda: browser.one("#key").is_displayed())
    assert "the API key is missing or wrong" in browser.one("#status").text
    browser.one("#key").send_keys("secret\t")
    until(lambda: "method cyb" in browser.one("#model").text)
    browser.generate()
    time.sleep(0.1)
    browser.problems()


@pytest.mark.slow
def test_a_model_without_pauses_has_one_panel(browser):
  with serving(untrained_run(name="baseline")) as served:
    browser.open(served.url)
    until(lambda: "method baseline" in browser.one("#model").text)
    browser.generate()
    assert not browser.one("#pausing").is_displayed()
    assert not browser.one("#plain").is_displayed()
    assert len(browser.all("#paced .text .t")) > 5
    assert browser.problems() == []
