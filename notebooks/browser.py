"""Opens notebooks in a real browser, as a student would: runs all cells, drags a slider, presses play, and checks that
plot, text and video changed.

    pip install playwright
    python notebooks/browser.py --chromium /usr/bin/chromium --screenshots browser

Not part of `pytest`: it needs a Chromium (`apt-get install chromium`, or `playwright install chromium` and no
--chromium). JupyterLab runs on a copy of the notebooks, with settings of its own, and nothing leaves this machine.
`KVPO_FAST=1` makes the notebooks small. Exit code 1 when something did not change or a cell failed.
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
NOTEBOOKS = {  # name -> whether it shows players
    "00_kvpo_in_one_picture.ipynb": True,
    "05_velocity_energy.ipynb": False,
}
OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--no-first-run")  # fmt: skip
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # else cells out of sight are not in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(prompt => prompt.innerText)"
STARTED = f"() => {PROMPTS}.some(text => text.includes('*'))"
DONE = f"() => {PROMPTS}.every(text => /[0-9]/.test(text))"
CHANGED = "([area, before]) => area.innerHTML != before"


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A JupyterLab on a copy of the notebooks; -> its address"""
    work = folder / "notebooks"
    shutil.copytree(HERE, work, ignore=shutil.ignore_patterns("__pycache__", "browser"))
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
    say(f"{name}: {cells} code cells ran in {time.perf_counter() - begun:.0f} s")


def drag_slider(page, name: str) -> None:
    """Drags the first slider with the mouse; the number beside it and what it drives must change."""
    widget = page.locator(".widget-interact").first
    widget.scroll_into_view_if_needed()
    handle, area = widget.locator(".noUi-handle").first, widget.locator(".widget-output").first
    area.locator("img").first.wait_for()
    number, html, text = widget.locator(".widget-readout").first.inner_text(), area.inner_html(), area.inner_text()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=6)
    page.mouse.up()
    page.wait_for_function(CHANGED, arg=[area.element_handle(), html], timeout=60_000)
    area.locator("img").first.wait_for()
    now = widget.locator(".widget-readout").first.inner_text()
    assert now != number, f"{name}: the slider's number stayed {number}"
    picture = area.locator("img").first.get_attribute("src")
    assert picture not in html, f"{name}: the plot did not change"
    changed = f", its text from {text!r} to {area.inner_text()!r}" if text.strip() else ""
    say(f"{name}: slider dragged from {number} to {now}; the plot changed{changed}")


def press_play(page, name: str) -> None:
    """Clicks the first player; its time must go on."""
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
    parser.add_argument("--chromium", default=None, help="the browser's program; default: playwright's own")
    parser.add_argument("--screenshots", default="", help="folder for a picture of each notebook")
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        print("playwright is missing: pip install playwright", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=OFFLINE)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        try:
            for name, players in NOTEBOOKS.items():
                open_and_run(page, address, name)
                for step in (drag_slider, press_play) if players else (drag_slider,):
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
