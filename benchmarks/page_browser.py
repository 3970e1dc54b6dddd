"""Opens docs/index.html in a real browser, from disk, and drives every control of it.

    pip install playwright
    python benchmarks/page_browser.py --chromium /usr/bin/chromium --screenshots page_shots

Not part of `pytest` (see notebooks/browser.py for where a Chromium comes from). Exit code 1, and what was wrong, when a
control changes nothing, a message is in the console, a request leaves the page's folder, text has too little contrast,
something is wider than a phone, or the first picture takes longer than a second.
"""

import argparse
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "index.html"
OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--no-first-run")  # fmt: skip
CONTROLS = "button, input, a[href]"
NAMELESS = """() => [...document.querySelectorAll('button, input, canvas')].filter(element =>
    element.ariaHidden != 'true' && !element.ariaLabel && !element.innerText?.trim() && !element.labels?.length)
    .map(element => element.outerHTML.slice(0, 120))"""
PALE = """() => {
  const light = rgb => rgb.slice(0, 3).map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [.2126, .7152, .0722][k], 0);
  const numbers = text => text.match(/[0-9.]+/g).map(Number);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour.length == 3 || colour[3] == 1) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('body *')].filter(element => element.checkVisibility() &&
      [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())).map(element => {
    const style = getComputedStyle(element);
    const ink = light(numbers(element.closest('svg') ? style.fill : style.color)), paper = light(behind(element));
    return [(Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05), element.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


def changed(page, what: str, do, *watched: str) -> None:
    """Does something; all that is watched must look or read otherwise afterwards."""
    before = [page.locator(each).inner_html() + str(page.locator(each).get_attribute("aria-label")) for each in watched]
    do()
    page.wait_for_timeout(80)
    for each, was in zip(watched, before, strict=True):
        now = page.locator(each).inner_html() + str(page.locator(each).get_attribute("aria-label"))
        assert now != was, f"{what}: {each} did not change"


def opened(page, address: str) -> float:
    """-> seconds until all pictures of the first screen are there"""
    page.goto(address)
    return page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart") / 1000


def lit(page) -> list[str]:
    cards = page.locator("#strip button")
    assert cards.count() == 9
    pressed = [card for card in cards.all() if card.get_attribute("aria-pressed") == "true"]
    assert all("lit" in card.get_attribute("class") for card in pressed)
    return [card.get_attribute("data-card") for card in pressed]


def moves(page, canvas: str) -> bool:
    """Whether a film's picture changes within a second and a half."""
    page.locator(canvas).scroll_into_view_if_needed()
    first = page.locator(canvas).screenshot()
    for _ in range(6):
        page.wait_for_timeout(250)
        if page.locator(canvas).screenshot() != first:
            return True
    return False


def drive_route(page) -> None:
    names = set()
    for card in [page.locator("#strip button").nth(k) for k in (0, 8, 3, 3, 6, 2, 2, 5, 1, 7, 4, 0, 8, 8)]:
        changed(page, "a frame of the strip", card.click, "#strip")
        assert len(lit(page)) == 4, lit(page)
        names.add(page.locator("#film").get_attribute("aria-label"))
    assert len(names) > 2, f"all routes end alike: {names}"
    assert not any("undefined" in name for name in names)
    before = lit(page)
    page.locator("#strip button").nth(4).click()
    page.locator("#strip button").nth(4).click()
    assert sorted(lit(page)) == sorted(before), "the second tap on a frame must take the first one back"
    page.locator("#strip button").first.focus()
    changed(page, "Enter on a frame", lambda: page.keyboard.press("Enter"), "#strip")
    tries = page.locator("#found tbody tr:first-child td").first
    many = int(tries.inner_text())
    for _ in range(8):
        page.locator("#any").click()
    assert int(tries.inner_text()) > many, "another memory was not counted"
    changed(page, "fresh noise", page.locator("#fresh").click, "#why", "#found")
    for number in range(2, 9):
        page.locator("#fresh").click()
        assert page.locator("#found tbody tr:last-child td").first.inner_text() == str(number)
    assert moves(page, "#film"), "the film stands still"
    ends = [page.locator(f"#found tbody tr:nth-child({k}) canvas").count() for k in (1, 2)]
    print(f"route: {ends[0]} endings by memory, {ends[1]} by noise")
    assert ends[0] > ends[1]


def drive_motion(page) -> None:
    page.locator("#motion").click()
    assert page.locator("#motion").get_attribute("aria-pressed") == "true"
    assert not moves(page, "#film"), "the film goes on after a pause"
    page.locator("#motion").click()
    assert moves(page, "#film"), "the film does not go on"


def drive_learn(page) -> None:
    slider = page.locator("#update")
    most = int(slider.get_attribute("max"))
    all_of_it = ("#done", "#five", "#curve", "#over", "#group-h")
    changed(page, "one update on", page.locator("#next").click, "#done", "#curve")
    changed(page, "one update back", page.locator("#back").click, "#done", "#curve")
    slider.focus()
    changed(page, "End on the slider", lambda: page.keyboard.press("End"), *(all_of_it if most > 1 else all_of_it[:-1]))
    assert slider.input_value() == str(most)
    changed(page, "left arrow on the slider", lambda: page.keyboard.press("ArrowLeft"), "#done")
    box = slider.bounding_box()
    changed(page, "a drag", lambda: page.mouse.click(box["x"] + 6, box["y"] + box["height"] / 2), "#done")
    assert slider.input_value() == "0"
    page.locator("#play").click()
    page.wait_for_function("document.getElementById('update').value > 0", timeout=8000)
    assert page.locator("#play").inner_text() == "Pause"
    page.locator("#play").click()
    stopped = slider.input_value()
    page.wait_for_timeout(3000)
    assert slider.input_value() == stopped, "the run goes on after a pause"
    marks = page.locator("#branches .pulled, #branches .pushed").count()
    assert page.locator("#branches li").count() > 2 and marks, "no branch is pulled or pushed"
    assert moves(page, "#five canvas >> nth=0")
    print(f"learn: {most} updates, {marks} branches pulled or pushed at update {stopped}")


def drive_taste(page) -> None:
    radios = page.locator("#tastes input")
    assert radios.count() == 3
    for k in (1, 2, 0):
        grid = page.locator("#after").screenshot()
        changed(page, f"taste {k}", radios.nth(k).check, "#verdict", "#pairs")
        page.wait_for_timeout(200)
        assert page.locator("#after").screenshot() != grid, f"taste {k}: the films are the same"
    radios.first.focus()
    changed(page, "down arrow", lambda: page.keyboard.press("ArrowDown"), "#verdict")
    page.keyboard.press("ArrowUp")
    print(f"taste: {page.locator('#verdict').inner_text()}")


def check_reach(page) -> None:
    """By Tab alone one comes to every control; of radio buttons, to the chosen one."""
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("h1").click()
    focused = set()
    for _ in range(page.locator(CONTROLS).count() + 2):
        page.keyboard.press("Tab")
        focused.add(page.evaluate("document.activeElement.outerHTML"))
    for control in page.locator(CONTROLS).all():
        html = control.evaluate("element => element.outerHTML")
        chosen = control.evaluate("element => element.type != 'radio' || element.checked")
        assert html in focused or not chosen, f"Tab does not reach {html[:100]}"


def check_links(page) -> None:
    for target in set(page.eval_on_selector_all("a[href]", "links => links.map(link => link.getAttribute('href'))")):
        path = (PAGE.parent / target.split("#")[0]).resolve() if not target.startswith("#") else PAGE
        assert path.exists(), f"no file behind the link {target}"
        if target.startswith("#"):
            assert page.locator(target).count() == 1, target


def check_look(page, width: int) -> None:
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, f"{wide} pixels wide on a screen of {width}"
    assert not (pale := page.evaluate(PALE)), f"too little contrast: {pale}"
    assert not (nameless := page.evaluate(NAMELESS)), f"a screen reader has no name for {nameless}"
    words = page.locator("body").inner_text()
    assert not re.search(r"\b(undefined|NaN|null)\b", words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default=None, help="the browser's program; default: playwright's own")
    parser.add_argument("--page", default=str(PAGE), help="the page to open")
    parser.add_argument("--screenshots", default="", help="folder for pictures of both widths, light and dark")
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        print("playwright is missing: pip install playwright", file=sys.stderr)
        return 2
    address = Path(args.page).resolve().as_uri()
    folder = address.rsplit("/", 1)[0]
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=OFFLINE)
        try:
            for width, height, colours, motion in (
                (1440, 900, "light", "no-preference"), (360, 740, "light", "no-preference"),
                (1440, 900, "dark", "reduce"), (360, 740, "dark", "no-preference"),
            ):  # fmt: skip
                kind = f"{width} {colours}"
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours,
                                              reduced_motion=motion)  # fmt: skip
                page = context.new_page()
                page.on("console", lambda message: wrong.append(f"console: {message.text}"))
                page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
                page.on("request", lambda request: request.url.startswith((folder, "data:")) or
                        wrong.append(f"asks for {request.url}"))  # fmt: skip
                seconds = min(opened(page, address) for _ in range(3))  # other programs may be at work
                print(f"{kind}: all pictures of the first screen after {seconds:.2f} s")
                assert seconds < 1, "the first picture must come within a second"
                page.wait_for_timeout(300)
                if args.screenshots:
                    Path(args.screenshots).mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=f"{args.screenshots}/{width}_{colours}_first.png")
                    page.screenshot(path=f"{args.screenshots}/{width}_{colours}.png", full_page=True)
                check_look(page, width)
                if motion == "reduce":
                    assert not moves(page, "#film"), "the reader asked for no motion"
                    page.locator("#motion").click()
                    assert moves(page, "#film"), "films cannot be started"
                else:
                    drive_motion(page)
                drive_route(page)
                drive_learn(page)
                drive_taste(page)
                check_look(page, width)
                check_reach(page)
                check_links(page)
                if args.screenshots:
                    page.screenshot(path=f"{args.screenshots}/{width}_{colours}_used.png", full_page=True)
                assert not wrong, wrong
                context.close()
        except Exception as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
        finally:
            browser.close()
    print("all changed as it should")
    return 0


if __name__ == "__main__":
    sys.exit(main())
