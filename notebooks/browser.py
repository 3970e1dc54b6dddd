"""Opens the notebooks in a real browser, as a student would: runs all cells, drags every slider, chooses from every
menu, clicks every button, presses play, and checks that plot, text and video changed.

    pip install playwright
    python notebooks/browser.py --chromium /usr/bin/chromium --screenshots browser
    python notebooks/browser.py 04 05  # these two alone

Not part of `pytest`: it needs a Chromium (`apt-get install chromium`, or `playwright install chromium` and no
--chromium; where neither can be had, the npm package `@sparticuz/chromium` carries one). JupyterLab runs on a copy
of the notebooks, with settings of its own, and nothing leaves this machine. `KVPO_FAST=1` makes the notebooks small.
Exit code 1 when something did not change or a cell failed.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--no-first-run")  # fmt: skip
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # else cells out of sight are not in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(prompt => prompt.innerText)"
STARTED = f"() => {PROMPTS}.some(text => text.includes('*'))"
DONE = f"() => !{PROMPTS}.some(text => text.includes('*'))"  # all ran, or one failed and the rest were called off
CHANGED = "([area, before, seen]) => area.innerHTML != before && (!seen || area.querySelector('img, video'))"


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A JupyterLab on a copy of the notebooks; -> its address"""
    work = folder / "notebooks"
    shutil.copytree(HERE, work, ignore=shutil.ignore_patterns("__pycache__", "browser"))
    for name in ("figures", "benchmarks"):  # recorded runs and measurements, which notebooks read
        (folder / name).symlink_to(HERE.parent / name)
    for name, setting in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(setting))
    env = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    env |= {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={work}"]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with (folder / "lab.log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            for _ in range(120):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/api/status").close()
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError("JupyterLab did not start:\n" + (folder / "lab.log").read_text()[-2000:])
            yield address
        finally:
            server.terminate()


def say(line: str) -> None:
    print(line, flush=True)


def open_and_run(page, address: str, name: str) -> None:
    """Run > Restart Kernel and Run All Cells, in the menu; raises AssertionError when a cell failed."""
    page.goto(f"{address}/lab/tree/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector("#jp-main-statusbar :text('| Idle')", timeout=60_000)  # the kernel is there
    begun = time.perf_counter()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    page.wait_for_function(STARTED, timeout=60_000)  # until then the stored numbers stand beside the cells
    page.wait_for_function(DONE, timeout=600_000)
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error'], .jp-RenderedText:has-text('Traceback')")
    assert errors.count() == 0, f"{name}: {errors.first.inner_text()[-500:]}"
    cells = page.locator(".jp-CodeCell").count()
    left = page.evaluate(f"{PROMPTS}.filter(text => !/[0-9]/.test(text)).length")
    assert left == 0, f"{name}: {left} of {cells} cells did not run"
    say(f"{name}: {cells} code cells ran in {time.perf_counter() - begun:.0f} s")


def move(page, area, control) -> str:
    """Drags a slider, chooses from a menu or ticks a box, waits until what it drives has changed; -> what was done."""
    html, pictures = area.inner_html(), area.locator("img").count()
    if control.locator("select").count():
        menu = control.locator("select")
        before = menu.evaluate("menu => menu.selectedOptions[0].innerText")
        menu.select_option(index=(menu.evaluate("menu => menu.selectedIndex") + 1) % menu.locator("option").count())
        after = menu.evaluate("menu => menu.selectedOptions[0].innerText")
    elif control.locator("input[type=checkbox]").count():
        box = control.locator("input[type=checkbox]")
        before = box.is_checked()
        box.click()
        after = box.is_checked()
    else:
        number, handle = control.locator(".widget-readout"), control.locator(".noUi-handle")
        before = number.inner_text()
        least, now, most = (float(handle.get_attribute(f"aria-value{end}")) for end in ("min", "now", "max"))
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + (-400 if 2 * now > least + most else 400), y, steps=6)  # to the farther end
        page.mouse.up()
        after = number.inner_text()
    assert after != before, f"stayed {before}"
    page.wait_for_function(CHANGED, arg=[area.element_handle(), html, pictures], timeout=60_000)
    assert area.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0, area.inner_text()[-500:]
    return f"from {before} to {after}"


def move_all(page, name: str) -> None:
    """Every slider, menu and box of the notebook; what it drives must change."""
    for number, widget in enumerate(page.locator(".widget-interact").all()):
        area = widget.locator(".widget-output").first
        for control in widget.locator(".widget-slider, .widget-dropdown, .widget-checkbox").all():
            control.scroll_into_view_if_needed()
            label = control.inner_text().replace("\u200b", "").strip().split("\n")[0]
            try:
                say(f"{name}: {label} {move(page, area, control)}")
            except Exception as error:
                raise AssertionError(f"{name}: widget {number}, {label}: {error}") from error


def click_all(page, name: str) -> None:
    """Every button in an output; what stands beside it must change."""
    for button in page.locator(".jp-OutputArea-output .jupyter-button").all():
        area = button.locator("xpath=ancestor::*[contains(@class, 'jp-OutputArea-output')][1]")
        label = button.inner_text()
        before = area.inner_text()
        button.scroll_into_view_if_needed()
        button.click()
        page.wait_for_function("([area, text]) => area.innerText != text", arg=[area.element_handle(), before])
        after = area.inner_text().replace("\u200b", "").splitlines()[-1]
        say(f"{name}: the button {label} says: {after}")


def press_play(page, name: str) -> None:
    """Clicks the first player, if there is one; its time must go on."""
    if not page.locator("video").count():
        return
    video = page.locator("video").first
    video.scroll_into_view_if_needed()
    video.evaluate("v => { v.pause(); v.currentTime = 0 }")
    page.wait_for_timeout(300)
    video.hover()
    page.wait_for_timeout(500)  # the browser's own bar shows itself
    video.click(position={"x": 24, "y": video.bounding_box()["height"] - 46})  # its triangle
    page.wait_for_function("v => !v.paused && v.currentTime > 0.2", arg=video.element_handle(), timeout=10_000)
    size = video.evaluate("v => [v.videoWidth, v.videoHeight, v.duration]")
    say(f"{name}: a player of {page.locator('video').count()} plays {size[0]} x {size[1]} pixels, {size[2]:.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="which notebooks, e.g. 04 05; default: all")
    parser.add_argument("--chromium", default=None, help="the browser's program; default: playwright's own")
    parser.add_argument("--screenshots", default="", help="folder for a picture of each notebook")
    args = parser.parse_args()
    names = sorted(path.name for path in HERE.glob("[0-9]*.ipynb") if not args.numbers or path.name[:2] in args.numbers)
    if not names:
        parser.error(f"no notebook begins with {' or '.join(args.numbers)}; they are numbered 00 to 09")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        print("playwright is missing: pip install playwright", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=OFFLINE)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        try:
            for name in names:
                open_and_run(page, address, name)
                for step in (move_all, click_all, press_play):
                    step(page, name)
                    if args.screenshots:
                        Path(args.screenshots).mkdir(parents=True, exist_ok=True)
                        page.screenshot(path=f"{args.screenshots}/{name[:2]}_{step.__name__}.png")
        except Exception as error:
            if args.screenshots:
                page.screenshot(path=f"{args.screenshots}/failed.png")
            print(f"failed: {error}", file=sys.stderr)
            return 1
        finally:
            browser.close()
    say("all changed as they should")
    return 0


if __name__ == "__main__":
    sys.exit(main())
