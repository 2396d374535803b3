"""The quickstart in a real TensorBoard, looked at in a real browser.

`make browser` installs what it needs and makes the README's picture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LAYERS = ("conv2", "conv3", "fc")
PICTURES = os.environ.get("PICTURES")

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver: make browser"
)

# Everything that can be read, in the shadow of elements, too.
TEXT = """
const read = node => node.nodeType === 3 ? node.textContent.trim() + "\\n" :
  ["STYLE", "SCRIPT"].includes(node.nodeName) ? "" :
  (node.shadowRoot ? read(node.shadowRoot) : "") + [...node.childNodes].map(read).join("");
return read(document.body);
"""
# All elements of a name, in the shadow of others, too.
FIND = """
const found = [], look = node => {
  if (node.matches && node.matches(arguments[0])) found.push(node);
  if (node.shadowRoot) look(node.shadowRoot);
  node.childNodes.forEach(look);
};
look(document.body);
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens a tab of TensorBoard on the logs of a quickstart."""
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("quickstart")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "examples.quickstart", *([] if PICTURES else ["--epochs", "10"])],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
    )
    logs = "lightning_logs/quickstart-sparse"
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", "0"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    address = ""
    for line in server.stderr:
        if match := re.search(r"http://localhost:\d+/", line):
            address = match[0]
            break
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1440,900")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open_tab(name: str, query: str = "") -> Any:
        driver.get(f"{address}{query}#{name}")
        driver.refresh()  # another fragment alone loads nothing
        return driver

    try:
        yield open_tab
    finally:
        driver.quit()
        server.terminate()
        server.wait(timeout=30)
        server.stderr.close()


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    """What it says as soon as it says something; elements may go while they are looked at."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if found := ready():
                return found
        except WebDriverException:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not seen within a minute: {what}")


def wait_for_words(driver: Any, *words: str) -> str:
    def read() -> str:
        text = str(driver.execute_script(TEXT))
        return text if all(word in text for word in words) else ""

    return str(wait_for(read, f"{words}"))


def keep(driver: Any, name: str, height: int) -> None:
    """What the README shows."""
    if PICTURES:
        driver.set_window_size(1580, height)
        time.sleep(3)  # for what moves
        driver.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


def elements(driver: Any, selector: str, count: int) -> list[Any]:
    """As many of them, as soon as there are."""

    def look() -> list[Any]:
        found = driver.execute_script(FIND, selector)
        return found if len(found) == count else []

    return wait_for(look, f"{count} of {selector}")


def test_curves_of_every_layer_are_drawn(page: Callable[..., Any]) -> None:
    driver = page("timeseries", "?tagFilter=group_sparsity")
    for layer in LAYERS:

        def card(layer: str = layer) -> str:
            texts = [card.text for card in driver.execute_script(FIND, "scalar-card")]
            return "".join(x for x in texts if f"network.{layer}" in x and "0.75" in x)

        assert "/group_sparsity" in wait_for(card, f"the last value of {layer}")


def test_the_layout_draws_layers_together(page: Callable[..., Any]) -> None:
    driver = page("custom_scalars")
    titles = ("group sparsity of layers", "accuracy", "gap", "budget and groups alive")
    text = wait_for_words(
        driver, *titles, "Matches (4)", "Matches (1)", "Matches (2)", "accuracy ("
    )
    curves = {name for name in text.splitlines() if name.endswith(" (version_0)")}
    assert curves == {
        f"{tag} (version_0)"
        for tag in (
            *(f"wgsef/network.{layer}/group_sparsity" for layer in LAYERS),
            "wgsef/frozen",
            "val/accuracy",
            "test/accuracy",
            "wgsef/gap",
            "wgsef/groups_alive",
            "wgsef/groups_budget",
        )
    }
    elements(driver, "vz-line-chart2", 4)
    keep(driver, "curves", height=860)


def test_pictures_of_the_groups_are_shown(page: Callable[..., Any]) -> None:
    driver = page("images")
    pictures = elements(driver, "img", 3)
    width = "return arguments[0].naturalWidth"
    for picture in pictures:
        assert wait_for(lambda: driver.execute_script(width, picture), "its pixels") > 100  # noqa: B023
    text = wait_for_words(driver, *(f"network.{layer}/life_of_the_groups" for layer in LAYERS))
    assert "version_0/wgsef" not in text  # one run, not two
    keep(driver, "groups", height=860)


def test_histograms_of_norms_are_drawn(page: Callable[..., Any]) -> None:
    driver = page("histograms")
    wait_for_words(driver, *(f"wgsef/network.{layer}/norms" for layer in LAYERS))
    assert len(elements(driver, "vz-histogram-timeseries", 3)) == 3


def test_settings_stand_beside_results(page: Callable[..., Any]) -> None:
    driver = page("hparams")
    (table,) = elements(driver, "tf-hparams-table-view", 1)
    (pane,) = elements(driver, "tf-hparams-query-pane", 1)
    for name in ("lr", "optimizer", "wgsef/k", "wgsef/lam", "wgsef/grouping"):
        assert wait_for(lambda name=name: name in pane.text, name)
    shown = ("0.25000", "Homotopy(", "channel", "wgsef/final_sparsity", "val/accuracy")
    assert wait_for(lambda: all(word in table.text for word in shown), f"{shown}")


def test_the_report_can_be_read(page: Callable[..., Any]) -> None:
    alive = ("4 / 16", "8 / 32", "16 / 64")
    text = wait_for_words(page("text"), "wgsef/report", *alive)
    assert [text.index(part) for part in alive] == sorted(text.index(part) for part in alive)
