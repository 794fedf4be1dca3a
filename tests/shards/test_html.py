"""Pages: everything escaped, nothing fetched, charts with their numbers, readable by all."""

import json
import re
from pathlib import Path

import pytest
from browser import (
    DESKTOP,
    PHONE,
    accessibility_problems,
    console,
    open_page,
    prefer,
    requests,
    scrolls_sideways,
)
from hypothesis import given
from hypothesis import strategies as st

from shards.page.charts import Bar, Line, Mark, bar_list, line_chart, spark
from shards.page.html_page import Section, details, join, json_block, number, page, table, tag

ROOT = Path(__file__).parents[2]
EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


def _demo_page():
    lines = [Line("train", [0, 1, 2, 3], [1.0, 0.8, None, 0.7]), Line("held-out", [0, 2], [1.1, 0.9])]
    charts = [
        bar_list("Reasons", [Bar(EVIL, 3), Bar("too-short", 1)]),
        line_chart("Loss", lines, "step", "loss", marks=[Mark(2, "resumed")]),
        details("More", tag("p", spark([1, 2, None, 4], "loss falls"))),
    ]
    numbers = Section("numbers", "Numbers", tag("div", *charts, class_="charts"))
    words = Section("words", "Words", join([tag("p", EVIL), table(("a", "b"), [("x", 12345), (EVIL, 0.5)], EVIL)]))
    return page(f"A page {EVIL}", [numbers, words], lead=EVIL, data={"values": {"text": EVIL}}, footer=EVIL)


@given(st.text())
def test_text_comes_out_as_text_in_elements_attributes_and_data(text):
    element = tag("p", text, title=text)
    assert element.count("<") == 2
    assert "<" not in json_block("x", [text])[8:-9]
    block = re.fullmatch(r"<script [^>]*>(.*)</script>", json_block("x", [text]), re.DOTALL)
    assert block and json.loads(block[1]) == [text]


def test_only_what_tag_made_is_markup():
    assert tag("p", tag("b", "a & b"), "<i>") == "<p><b>a &amp; b</b>&lt;i&gt;</p>"
    assert (
        tag("input", aria_label='"', disabled=True, hidden=False, value=None) == '<input aria-label="&quot;" disabled>'
    )
    assert tag("p", "a" + tag("b", "x")) == "<p>a&lt;b&gt;x&lt;/b&gt;</p>", "text added to markup is text again"


def test_numbers_read_well():
    assert [number(value) for value in (1234567, 0.123456, 123456.7, 3.0)] == ["1,234,567", "0.1235", "123,457", "3"]


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 2e-9], [-3.0, 4e7]])
def test_line_charts_of_odd_ranges_draw_within_their_box(values):
    svg = line_chart("c", [Line("a", list(range(len(values))), values)], "step", "loss")
    heights = [float(a or b) for a, b in re.findall(r"[ML][\d.]+ ([\d.]+)|<circle[^>]* cy=\"([\d.]+)", svg)]
    assert len(heights) == len(values)
    assert all(12 <= y <= 200 for y in heights)


def test_a_chart_of_nothing_says_so():
    assert "Nothing was recorded" in line_chart("c", [Line("a", [1.0], [float("nan")])], "step", "loss")
    assert "<table" in bar_list("c", [])


def test_a_point_alone_is_a_dot_and_small_numbers_fit_the_margin():
    lines = [Line("one", [0], [1.0]), Line("some", [0, 1, 2, 3, 4], [0.9, None, 1.1, 1.2, None])]
    chart = str(line_chart("Loss", lines, "step", "loss"))
    assert len(re.findall("<circle", chart)) == 2, "the only one, and the one between gaps"
    assert len(re.findall('<path d="M[^"]*L', chart)) == 1
    chart = str(
        line_chart("TFLOP/s", [Line("all", [1, 2, 3], [0.00017, 0.00003, 0.00015])], "step", "", from_zero=True)
    )
    ticks = re.findall('text-anchor="end">([^<]*)<', chart)
    assert ticks[:3] == ["0", "5.0e-5", "1.0e-4"]
    assert max(map(len, ticks)) <= 7


@pytest.mark.timeout(600)
def test_in_a_browser_a_page_is_whole_and_foreign_markup_is_text(driver, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(_demo_page(), encoding="utf-8")
    for dark in (False, True):
        prefer(driver, dark=dark)
        for size in (DESKTOP, PHONE):
            open_page(driver, file, size)
            assert driver.title == f"A page {EVIL}"
            assert driver.find_element("css selector", "#words p").text == EVIL
            assert json.loads(driver.execute_script("return document.getElementById('values').textContent")) == {
                "text": EVIL
            }
            assert not scrolls_sideways(driver)
            driver.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
            assert accessibility_problems(driver) == []
    assert console(driver) == []
    assert requests(driver) == []


def test_in_a_browser_the_policy_stops_scripts_and_requests_that_got_in(driver, tmp_path):
    body = tag("p", "x")
    forced = page("Page", [Section("a", "A", body)]).replace("<p>x</p>", EVIL + '<img src="http://127.0.0.1:9/x.png">')
    (tmp_path / "page.html").write_text(forced, encoding="utf-8")
    open_page(driver, tmp_path / "page.html")
    assert driver.title == "Page"
    assert any("Content Security Policy" in line for line in console(driver))
    assert requests(driver) == []


def test_in_a_browser_the_theme_can_be_chosen(driver, tmp_path):
    (tmp_path / "page.html").write_text(_demo_page(), encoding="utf-8")
    open_page(driver, tmp_path / "page.html")
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = driver.execute_script(colour)
    button = driver.find_element("id", "theme")
    button.click()
    assert (button.text, driver.execute_script(colour)) == ("Theme: light", light)
    button.click()
    assert button.text == "Theme: dark"
    assert driver.execute_script(colour) != light
