"""The page of a trace made by hand, in a real browser: every state of a cell, every move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import complaints, open_browser, open_page
from tests.helpers.traces import small_trace
from twotower.trace import Trace, trace_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
EVIL = "<img src=x onerror=document.title='owned'>"


def opened(browser: Any, folder: Path, trace: Trace, at: str = "") -> Any:
    return open_page(browser, folder, trace_page(trace), at)


def cell(page: Any, block: int, position: int) -> Any:
    return page.find_element(
        "css selector", f".cell[data-block='{block}'][data-position='{position}']"
    )


def shown(page: Any, block: int) -> str:
    """State and text of a block's cells."""
    cells = page.find_elements("css selector", f".cell[data-block='{block}']")
    words = [c.find_element("class name", "word").get_attribute("textContent") for c in cells]
    states = [c.get_attribute("data-state") for c in cells]
    return ", ".join(f"{state} {word}" for state, word in zip(states, words, strict=True))


def passes(page: Any) -> str:
    return str(page.find_element("id", "stat-pass").text)


def press(page: Any, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(key).perform()


def test_every_state_of_a_cell(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, small_trace())
    assert shown(page, 0) == "just one, just \u2423, rejected guess, rejected \u23ce"
    assert shown(page, 1) == "masked , masked , masked , masked "
    press(page, "\ue014")  # arrow right
    assert shown(page, 0) == "earlier one, earlier \u2423, rejected two, just \u23ce"
    press(page, "\ue010")  # end
    assert shown(page, 1) == "earlier three, earlier !, just </s>, earlier </s>"
    assert page.find_element("id", "text").get_attribute("textContent") == "one two\nthree!"
    cut = page.find_elements("css selector", ".cell.cut")
    assert [c.get_attribute("data-position") for c in cut] == ["2", "3"], "past the text's end"
    current = page.find_elements("css selector", ".block.current")
    assert [b.get_attribute("aria-current") for b in current] == ["true"]


def test_confidence_is_a_bar_and_a_sentence(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page = opened(browser, tmp_path, small_trace())
    width = "return arguments[0].querySelector('.fill').style.width"
    assert page.execute_script(width, cell(page, 0, 2)) == "41%"
    ActionChains(page).move_to_element(cell(page, 0, 2)).perform()
    detail = page.find_element("id", "detail")
    said = '"guess" (token 20) was predicted with confidence 0.4100 (threshold 0.9) and not taken'
    assert said in detail.text
    ActionChains(page).move_to_element(cell(page, 0, 0)).perform()
    assert '"one" (token 10), committed in step 0 with confidence 0.9500' in detail.text
    press(page, "\ue010")
    assert page.execute_script(width, cell(page, 0, 0)) == "95%", "of when it was committed"


def test_the_numbers_are_those_of_the_trace(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, small_trace(), "#pass=5")
    stats = {"pass": "5 / 6", "block": "1", "step": "1", "t": "0.75", "ms": "5.0 ms"}
    stats |= {"committed": "2 of 3", "lowest": "0.920", "rate": "1.40"}
    assert {name: page.find_element("id", f"stat-{name}").text for name in stats} == stats
    heat = [b.text for b in page.find_elements("css selector", "#heat button")]
    assert heat == ["0", "0", "2", "1", "0", "1", "2", "1"]
    totals = page.find_element("id", "totals").text
    assert "passes a block 3.00" in totals
    assert "tokens (ended by eos) 6" in totals
    times = page.find_element("id", "times").text
    for line in (
        "(prefill) 3.0 ms",
        "denoiser tower, 6 passes 30.0 ms",
        "reads 1 block 2.0 ms",
        "everything else 1.0 ms",
        "in all 36.0 ms",
    ):
        assert line in times


def test_keys_slider_and_heat_map_lead_to_the_same_passes(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, small_trace())
    keys = "\ue014\ue014\ue012\ue010\ue014\ue011"  # right, right, left, end, right, home
    for key, want in zip(keys, (2, 3, 2, 6, 6, 1), strict=True):
        press(page, key)
        assert passes(page) == f"{want} / 6"
    slider = page.find_element("id", "slider")
    slider.send_keys("\ue014")  # its own key, and one pass only
    assert passes(page) == "2 / 6"
    page.find_element("css selector", "#heat button[data-block='1'][data-position='3']").click()
    assert passes(page) == "5 / 6"
    assert slider.get_attribute("value") == "4"
    status = page.find_element("id", "status").get_attribute("textContent")
    assert "block 1, step 1: 2 tokens committed" in status
    marked = page.find_elements("css selector", "#heat button.now")
    places = [(b.get_attribute("data-block"), b.get_attribute("data-position")) for b in marked]
    assert places == [("1", "1"), ("1", "3")]


def test_space_plays_and_pauses(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import Select, WebDriverWait

    page = opened(browser, tmp_path, small_trace())
    play = page.find_element("id", "play")
    Select(page.find_element("id", "speed")).select_by_value("200")
    page.execute_script("document.activeElement.blur()")
    press(page, " ")
    assert (play.text, play.get_attribute("aria-label")) == ("Pause", "Pause")
    WebDriverWait(page, 10).until(lambda p: passes(p) == "3 / 6")
    press(page, " ")
    assert play.text == "Play"
    stopped = passes(page)
    page.execute_async_script("setTimeout(arguments[0], 700)")
    assert passes(page) == stopped != "6 / 6"
    play.click()
    WebDriverWait(page, 10).until(lambda p: passes(p) == "6 / 6" and play.text == "Play")


def test_what_the_model_wrote_runs_nowhere(browser: Any, tmp_path: Path) -> None:
    trace = small_trace(
        f"{EVIL}</script><script>document.title='owned'</script><!--<script>",
        {10: EVIL, 20: "</script><b>"},
        text=EVIL,
    )
    page = opened(browser, tmp_path, trace, "#pass=6")
    assert page.find_element("id", "prompt").text == trace.header.prompt
    assert page.find_element("id", "text").text == EVIL
    press(page, "\ue011")
    assert f"just {EVIL}, just" in shown(page, 0)
    assert "rejected </script><b>, " in shown(page, 0)
    assert not page.find_elements("css selector", "main img, main b, main script")
    assert "owned" not in page.title
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not complaints(page)


def test_token_numbers_where_there_is_no_text(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, small_trace(None, text=None))
    assert page.find_element("id", "prompt").text == "1 10"
    assert page.find_element("id", "text").text == "10 11 \u2592 \u2592 "
    press(page, "\ue010")
    assert page.find_element("id", "text").text == "10 11 12 13 14 15"


def test_a_phone_in_the_dark(tmp_path: Path) -> None:
    with open_browser(390, 844, dark=True) as page:
        opened(page, tmp_path, small_trace(pieces={10: "a-very-long-word-of-one-token"}))
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(20, 24, 29)"
        page.find_element("id", "forward").click()
        assert passes(page) == "2 / 6"
