"""The page of `sysdpo annotate` in a real Chromium: the command as its own process, keys alone, and what is on disk."""

import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.cli.test_annotate import EVIL, rows, write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None, reason="no browser: apt-get install chromium chromium-driver"
    ),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1280,900"),
)


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium, as make test-slow does")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@contextmanager
def annotating(*words):
    """(the process, the address that it prints)."""
    command = [sys.executable, "-m", "sysdpo_jax", "annotate", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = None
        while address is None:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        yield process, address[0]
    finally:
        process.kill()
        process.communicate()


def press(browser, key, wanted):
    """Press a key wherever the focus is, and wait for the page with the title that begins so."""
    browser.switch_to.active_element.send_keys(key)
    wait(browser, lambda: browser.title.startswith(wanted))


def wait(browser, found):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda _: found())


def test_a_person_compares_runs_by_keys_alone(tmp_path, browser):
    from selenium.webdriver.common.keys import Keys

    paths = [write(tmp_path / f"{name}.jsonl", name, 6, 1, 40 * place) for place, name in enumerate(("old", "new"))]
    output = tmp_path / "preferences.jsonl"
    with annotating(*paths, "--output", output) as (process, address):
        browser.get(address)
        assert browser.title == "Pair 1 of 6: which run is better?"
        # The pictures of both runs are drawn, and what a run says did not run.
        loaded = "return [...document.images].map((image) => image.complete && image.naturalWidth)"
        assert browser.execute_script(loaded) == [6, 6]
        assert EVIL in browser.find_element("tag name", "table").text
        assert browser.switch_to.active_element.tag_name == "h1"
        answers = browser.find_elements("css selector", "tbody:nth-of-type(2) td")
        sides = [cell.text.split()[0] for cell in answers]
        assert {*sides} == {"old", "new"}
        press(browser, "1", "Pair 2 of 6")
        assert [row["chosen"]["answer"]["text"].split()[0] for row in rows(output)] == sides[:1]
        press(browser, Keys.ARROW_RIGHT, "Pair 3 of 6")
        assert len(rows(output)) == 2
        press(browser, Keys.BACKSPACE, "Pair 2 of 6")
        assert len(rows(output)) == 1
        press(browser, "0", "Pair 3 of 6")
        press(browser, Keys.SPACE, "Pair 4 of 6")
        press(browser, "s", "Pair 5 of 6")
        press(browser, Keys.ARROW_LEFT, "Pair 6 of 6")
        # With the focus on a button, space presses that one.
        browser.execute_script("document.querySelector('button[value=right]').focus()")
        press(browser, Keys.SPACE, "Every pair is answered")
        assert "3 preferences, 2 ties, 1 skipped" in browser.find_element("tag name", "main").text
        press(browser, "u", "Pair 6 of 6")
        press(browser, "2", "Every pair is answered")
        # Nothing was refused by the page's own policy, nor failed.
        assert browser.get_log("browser") == []
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "3 preferences, 2 ties, 1 skipped" in said
    assert "is preferred to" in said
    assert f"--data.source {output}" in said
    lines = rows(tmp_path / "preferences.jsonl.answers.jsonl")
    assert [line["answer"] for line in lines] == [
        "left",
        "right",
        None,
        *(("tie", "tie", "skip", "left", "right")),
        None,
        "right",
    ]


def test_another_sites_page_cannot_answer(tmp_path, browser):
    """A form that names the right pair is sent from elsewhere, as a page that somebody visits meanwhile could."""
    path, output = write(tmp_path / "runs.jsonl", "said", picture=9), tmp_path / "preferences.jsonl"
    with annotating(path, "--output", output) as (_, address):
        browser.get(address)
        assert browser.execute_script("return document.images[0].naturalWidth") == 6
        pair = browser.find_element("name", "pair").get_attribute("value")
        fields = {"pair": pair, "answer": "left", "token": "guessed"}
        inputs = "".join(f'<input name="{name}" value="{value}">' for name, value in fields.items())
        (tmp_path / "foreign.html").write_text(
            f'<form method="post" action="{address}">{inputs}<button>go</button></form>'
        )
        browser.get((tmp_path / "foreign.html").as_uri())
        browser.find_element("tag name", "button").click()
        wait(browser, lambda: "of an earlier start" in browser.page_source)
        assert not output.exists()
        # Neither can it show the page inside its own, nor read it.
        (tmp_path / "frame.html").write_text(f'<iframe src="{address}"></iframe><img src="{address}pictures/{pair}/0">')
        browser.get((tmp_path / "frame.html").as_uri())
        said = json.dumps(browser.get_log("browser"))
        assert "frame-ancestors" in said or "Framing" in said
        assert browser.execute_script("return document.images[0].naturalWidth") == 0
