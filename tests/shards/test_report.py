"""`wanshards report`: one page that a browser shows whole, searches, and never takes a caption for markup in."""

import json
import re

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
from click.testing import CliRunner
from prep_runs import build
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait
from shards_data import PREVIEW, write_dataset
from stats_data import clip_name, key_of, write_latents

from shards.cli import main
from shards.format.ledger import LedgerRow
from shards.report.gallery import RefusedKeeper
from shards.report.report import write_dataset_report

EVIL = "<img src=x onerror=\"document.title='broken'\"></script><script>document.title='broken'</script>&amp;"


@pytest.fixture(scope="module")
def evil_report(tmp_path_factory):
    """A report over 20 samples and 4 refused records, whose ids and captions are markup."""
    folder = tmp_path_factory.mktemp("evil")
    write_dataset(folder / "root", 2, samples_per_unit=20, prefix=EVIL, scratch=folder / "scratch")
    write_dataset_report(str(folder / "root"), folder / "report.html", cache=folder / "cache")
    return folder / "report.html"


def _gallery(driver):
    titles = driver.find_elements("css selector", "#gallery .cards h3")
    return driver.find_element("id", "found").text, [title.text for title in titles]


def _wait_for_focus(driver, name):
    """A link to a place within the page is followed a moment later, and what had the focus may be gone by then."""
    wait = WebDriverWait(driver, 10, ignored_exceptions=[StaleElementReferenceException])
    wait.until(lambda driver: driver.switch_to.active_element.get_attribute("id") == name)


def _type(driver, text):
    field = driver.find_element("id", "find")
    field.clear()
    field.send_keys(text)
    return _gallery(driver)


def test_markup_in_ids_and_captions_is_text(evil_report, driver):
    open_page(driver, evil_report)
    found, titles = _gallery(driver)
    assert found == "42 of 42 match"
    assert len(titles) == 24, "a page of the list"
    caption = driver.find_element("css selector", "#gallery .caption").text
    assert caption.startswith("caption 0 of <img src=x onerror=")
    assert "</script><script>" in caption
    assert driver.find_elements("css selector", "main img[src=x]") == []
    driver.find_element("css selector", "#gallery .cards h3 a").click()
    assert "</script><script>" in driver.find_element("css selector", "#one .caption").text
    assert driver.title.startswith("Dataset")
    assert console(driver) == []
    assert requests(driver) == []


def test_what_is_searched_is_found(evil_report, driver):
    open_page(driver, evil_report)
    found, titles = _type(driver, "fetch-404")
    assert found == "2 of 42 match"
    assert all("fetch-404" in badge.text for badge in driver.find_elements("css selector", ".badge.bad"))
    assert _type(driver, "CAPTION 1 of")[0] != "0 of 42 match", "captions, whatever their case"
    assert _type(driver, "no such thing") == ("0 of 42 match", [])
    _type(driver, "")
    select = driver.find_element("id", "by-category")
    options = {option.get_attribute("value"): option for option in select.find_elements("css selector", "option")}
    assert set(options) == {"", "news", "drama"}
    options["drama"].click()
    found, titles = _gallery(driver)
    assert int(found.split()[0]) == len(titles) < 24
    badges = [badge.text for badge in driver.find_elements("css selector", ".cards .badge")]
    assert "drama" in badges
    assert "news" not in badges
    options[""].click()
    driver.find_element("css selector", "#by-bucket option:nth-child(2)").click()
    bucket = driver.find_element("id", "by-bucket").get_attribute("value")
    assert {badge.text for badge in driver.find_elements("css selector", ".cards .badge")} >= {bucket}
    assert console(driver) == []


def test_keys_and_pages_by_keyboard(evil_report, driver):
    open_page(driver, evil_report)
    for key in ["\ue004", "\ue007"]:  # Tab to the skip link, Enter
        driver.switch_to.active_element.send_keys(key)
    _wait_for_focus(driver, "content")
    driver.find_element("xpath", "//button[.='Next']").send_keys("\ue007")
    assert len(_gallery(driver)[1]) == 42 - 24
    assert driver.switch_to.active_element.text == "Previous", "the focus stays among the pages"
    driver.switch_to.active_element.send_keys("\ue007")
    link = driver.find_element("css selector", "#gallery .cards h3 a")
    link.send_keys("\ue007")
    _wait_for_focus(driver, "one-title")
    back = driver.find_element("css selector", "#one button")
    back.send_keys("\ue007")
    _wait_for_focus(driver, "find")
    assert not driver.find_element("id", "one").is_displayed()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_can_be_read_by_all(evil_report, driver, size, dark):
    prefer(driver, dark=dark)
    open_page(driver, evil_report, size)
    assert not scrolls_sideways(driver)
    driver.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert accessibility_problems(driver) == []
    driver.find_element("css selector", "#gallery .cards h3 a").click()
    assert not scrolls_sideways(driver)
    assert accessibility_problems(driver) == []


def test_a_sample_opens_by_link_and_a_missing_one_says_so(driver, tmp_path):
    write_latents(tmp_path / "root", 2, scratch=tmp_path / "scratch")
    write_dataset_report(str(tmp_path / "root"), tmp_path / "r.html", cache=tmp_path / "cache")
    open_page(driver, tmp_path / "r.html", PHONE, key_of(1, 3).replace("@", "%40"))
    assert driver.find_element("id", "one-title").text == key_of(1, 3)
    shown = "const r = document.getElementById('one').getBoundingClientRect(); return r.top >= 0 && r.top < 400"
    assert driver.execute_script(shown)
    # The same page, another sample: as a link within it, and back.
    driver.execute_script(f"location.hash = '#{key_of(0, 0)}'")
    driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert driver.find_element("id", "one-title").text == key_of(0, 0)
    driver.back()
    assert driver.find_element("id", "one-title").text == key_of(1, 3)
    open_page(driver, tmp_path / "r.html", PHONE, "clip-77@0-17-192x320")
    assert "is not on this page" in driver.find_element("id", "one-title").text
    open_page(driver, tmp_path / "r.html", PHONE, "record:lost-1")
    assert driver.find_element("id", "one-title").text == "lost-1"
    assert driver.find_element("css selector", "#one .badge").text == "refused: fetch/fetch-404"
    assert console(driver) == []


def test_what_a_finding_names_is_in_the_gallery_and_is_a_filter(driver, tmp_path):
    def flat(unit, place, latent):
        return latent * 0 if (unit, place) == (1, 5) else latent

    write_latents(tmp_path / "root", 3, flat, scratch=tmp_path / "scratch")
    write_dataset_report(str(tmp_path / "root"), tmp_path / "r.html", cache=tmp_path / "cache")
    open_page(driver, tmp_path / "r.html")
    overview = driver.find_element("id", "overview").text
    assert "To fix: latent-constant" in overview
    driver.find_element("css selector", "#by-reason option[value='finding: latent-constant']").click()
    assert _gallery(driver)[1] == [key_of(1, 5)]
    driver.find_element("css selector", f"#overview a[href*='{clip_name(1, 5)}']").send_keys("\ue007")
    assert driver.find_element("id", "one-title").text == key_of(1, 5)


def test_without_scripts_all_numbers_are_there(evil_report):
    text = evil_report.read_text(encoding="utf-8")
    body = text[: text.index('<script type="application/json"')]
    for words in ("Records read", "fetch-404", "17×96×160", "Mean and deviation by channel", "needs JavaScript"):
        assert words in body
    assert "<img src=x" not in text
    assert text.count("</script>") == 2
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", text)


def test_the_page_stays_under_its_size_and_says_what_it_left_out(tmp_path):
    root = tmp_path / "root"
    write_latents(root, 4, scratch=tmp_path / "scratch", samples=24, preview=PREVIEW + bytes(40_000))
    made = write_dataset_report(str(root), tmp_path / "r.html", max_megabytes=2, cache=tmp_path / "cache", sample=10)
    assert made["bytes"] < 2e6
    assert 5 < made["samples_with_pictures"] < made["samples"] <= made["of_samples"] == 96
    text = (tmp_path / "r.html").read_text()
    assert f"{made['samples_with_pictures']} with pictures" in text
    assert "Distributions and latents are of 10 of 96 samples" in text


def test_refused_records_are_kept_for_every_reason_whatever_their_order():
    def row(number):
        reason = "rare" if number == 1234 else "common"
        return LedgerRow(
            candidate=-1, clip_id=f"c{number}", source=f"s{number}", status="rejected", stage="sieve", reason=reason,
            detail="x" * 100, retryable=False, attempts=1, windows=(), seconds={}, bytes=0,
        )  # fmt: skip

    kept = []
    for numbers in (range(3000), reversed(range(3000))):
        keeper = RefusedKeeper()
        for number in numbers:
            keeper.add(row(number))
        assert keeper.num_seen == 3000
        rows = keeper.rows(50_000)
        assert "c1234" in {item["clip"] for item in rows}
        assert len(json.dumps(rows)) < 60_000
        kept.append({item["clip"] for item in rows})
    assert kept[0] == kept[1]


def test_the_command_reports_and_refuses(tiny_shards, tmp_path):
    out = tmp_path / "new folder" / "report.html"
    options = ["--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(main, ["report", str(tiny_shards), str(out), *options])
    assert done.exit_code == 0, done.output
    assert "24 of 24 samples (24 with pictures), 3 of 3 refused records" in done.output
    made = json.loads(
        CliRunner().invoke(main, ["report", str(tiny_shards), str(out), "--json", "--all", *options]).stdout
    )
    assert made["latents_read"] == 24
    for arguments, words in (
        ([str(tiny_shards), "report.txt"], "expected: a file that ends in .html"),
        ([str(tmp_path), str(out)], "no dataset here"),
        ([str(tiny_shards), str(out), "--all", "--sample", "3"], "--sample and --all are both given"),
    ):
        refused = CliRunner().invoke(main, ["report", *arguments, *options])
        assert refused.exit_code == 2
        assert words in refused.output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_a_real_build_the_pictures_and_captions_show(demo_corpus, driver, tmp_path):
    build(demo_corpus, tmp_path / "shards")
    made = write_dataset_report(str(tmp_path / "shards"), tmp_path / "r.html", cache=tmp_path / "cache")
    assert made["samples"] == made["samples_with_pictures"] > 5
    assert made["refused"] == made["of_refused"] == 7
    open_page(driver, tmp_path / "r.html")
    widths = driver.execute_async_script(
        "const done = arguments[0]; const all = [...document.querySelectorAll('.cards img')];"
        "all.forEach(i => { i.loading = 'eager' });"
        "Promise.all(all.map(i => i.decode())).then(() => done(all.map(i => i.naturalWidth)), e => done(String(e)))"
    )
    assert isinstance(widths, list), widths
    assert min(widths) > 100
    assert re.search("[가-힣]", driver.find_element("css selector", ".cards .caption").text)
    for dark in (False, True):
        prefer(driver, dark=dark)
        assert accessibility_problems(driver) == []
    assert console(driver) == []
    assert requests(driver) == []
