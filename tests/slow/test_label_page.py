"""The labelling page in a browser and under load: by keyboard alone, and without losing a label."""

import json
import shutil
import threading

import pytest

from tests.helpers.label_client import get, label_some, serving
from tests.helpers.label_pairs import write_label_pairs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_labels_survive_a_kill_under_load(tmp_path):
    pairs, acknowledged = write_label_pairs(tmp_path / "pairs", 2000), []
    with serving(pairs, tmp_path / "out", "--overlap", "0") as (process, address):

        def work(name):
            try:
                for _ in range(1000):
                    acknowledged.extend(label_some(address, name, 1))
            except OSError:
                pass  # the server was killed

        people = [threading.Thread(target=work, args=(name,)) for name in ("Ann", "Ben", "Cem")]
        for person in people:
            person.start()
        while len(acknowledged) < 300:
            people[0].join(0.05)
        process.kill()
        for person in people:
            person.join()
    lines = (tmp_path / "out" / "labels.jsonl").read_text().splitlines()
    stored = {json.loads(line)["unit"] for line in lines if line.endswith("}")}
    assert set(acknowledged) <= stored
    assert len(set(acknowledged)) == len(acknowledged)  # no pair went to two people
    with serving(pairs, tmp_path / "out", "--overlap", "0") as (_, address):
        assert get(f"{address}summary")["labelled"] == len(stored)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_two_people_label_fifty_pairs_by_keyboard_with_a_reload(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    pairs = write_label_pairs(tmp_path / "pairs", 50)
    with (
        serving(pairs, tmp_path / "out", "--overlap", "1") as (_, address),
        playwright.sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        errors, pages = [], []
        for name in ("Ann", "Ben"):
            page = browser.new_context(bypass_csp=True).new_page()  # the driver evaluates text
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)
            page.keyboard.type(name)
            page.keyboard.press("Enter")
            pages.append(page)

        def wait(page, count):
            page.wait_for_function(
                "n => document.getElementById('count').textContent.startsWith(n + ' ')",
                arg=str(count),
            )

        for number in range(50):
            for page, key in zip(pages, "ab", strict=True):
                wait(page, number)
                if number == 25:
                    page.reload()
                    wait(page, number)
                page.keyboard.press("s" if number % 2 else key)
        for page in pages:
            page.wait_for_selector("#end:not([hidden])")
        pages[0].keyboard.press("u")
        wait(pages[0], 49)
        assert errors == []
        assert get(f"{address}summary")["alpha"]["SA"] is not None
        browser.close()
    lines = (tmp_path / "out" / "labels.jsonl").read_text().splitlines()
    given = [json.loads(line) for line in lines]
    for name in ("Ann", "Ben"):
        units = {row["unit"] for row in given if row["annotator"] == name and not row["undone"]}
        assert len(units) == 50
