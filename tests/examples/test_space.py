"""The Space: its files fit the package, and its page works in a real browser that reaches nothing but this machine."""

import base64
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.hub_server import run_python, serve

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FILES = {"README.md", "requirements.txt", "app.py", "models.py", "page.py"}
THEME = os.environ.get("SPACE_THEME", "light")


def test_the_folder_is_a_space():
    metadata = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (gradio,) = (Requirement(line) for line in extras["space"] if line.startswith("gradio"))
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] in gradio.specifier
    assert (SPACE / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60  # the Hub refuses more
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").split("\n")
    needed = {Requirement(line).name for line in lines if line and not line.startswith("--")}
    assert needed == {"torch", "torchvision", "hf-lop"}
    assert {path.name for path in SPACE.iterdir() if path.is_file()} == FILES


@pytest.mark.slow
def test_it_is_pushed_as_its_readme_says(tmp_path):
    readme = (SPACE / "README.md").read_text(encoding="utf-8")
    with serve(tmp_path) as hub:
        for line in re.search(r"```bash\n(.*?)```", readme, re.DOTALL)[1].splitlines():
            start = f"import sys; from huggingface_hub.cli.hf import main; sys.argv = {shlex.split(line)!r}; main()"
            run_python(start, hub, cwd=SPACE)
        pushed = hub.files("me/lop-demo")
    assert {name: pushed[name] for name in FILES} == {name: (SPACE / name).read_bytes() for name in FILES}


def test_the_page_shows_only_what_is_escaped(monkeypatch):
    monkeypatch.syspath_prepend(SPACE)
    import page

    html = page.answers("<b>", "", "red", 30)
    assert "&lt;b&gt; ✗" in html
    assert "(nothing) ✗" in html
    assert "http" not in page.CSS + page.INTRO + page.ASK_ALL


@contextmanager
def serving():
    """Start the app as a Space does, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "GRADIO_SERVER_PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                assert process.poll() is None, process.stdout.read().decode()
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def url():
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium with chromedriver on the PATH (Debian: chromium, chromium-driver)")
    said = [
        subprocess.run([program, "--version"], capture_output=True, text=True).stdout for program in (BROWSER, DRIVER)
    ]
    if len({re.search(r"\d+", version)[0] for version in said}) > 1:
        pytest.skip(f"the driver is not of this browser: {said}")
    for package in ("gradio", "selenium"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra dev)")
    with serving() as running:
        yield running


@contextmanager
def browser(width, height):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    arguments = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"window-size={width},{height}"]
    arguments += ["host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "force-color-profile=srgb"]
    for argument in arguments:
        options.add_argument(f"--{argument}")
    # A desktop window is at least 500 pixels wide; a phone's width has to be emulated.
    metrics = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1.0}}
    if width < 500:
        options.add_experimental_option("mobileEmulation", metrics)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def text(driver):
    return driver.find_element("tag name", "body").text


def wait_for(driver, pattern, seconds=60):
    """Wait until the page shows a pattern, and return the match."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, text(driver))):
        assert time.monotonic() < end, f"{pattern!r} did not appear in:\n{text(driver)}"
        time.sleep(0.1)
    return found


def button(driver, name):
    (found,) = [each for each in driver.find_elements("tag name", "button") if each.text == name]
    return found


def kept(driver):
    """Neurons kept by layer, as the bars say it to a screen reader."""
    labels = [bar.get_attribute("aria-label") for bar in driver.find_elements("css selector", "[role=img]")]
    return [int(re.fullmatch(r"Layer \d keeps (\d+) of 64 neurons", label)[1]) for label in labels]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)])
def test_in_a_browser(url, width, height):
    from selenium.webdriver.common.keys import Keys

    with browser(width, height) as driver:
        driver.get(f"{url}?__theme={THEME}")
        wait_for(driver, r"50\.0% of 512 FFN neurons removed")
        assert sum(kept(driver)) == 256
        shot(driver, f"start-{width}")

        slider = driver.find_element("css selector", "#ratio input[type=range]")
        slider.send_keys(*[Keys.ARROW_LEFT] * 20)
        wait_for(driver, r"30\.1% of 512 FFN neurons removed, planned and cut in \d+ ms")
        assert sum(kept(driver)) == 358
        assert "583,200" in text(driver)  # as `make quickstart` says of 30 %
        assert "-7.1%" in text(driver)

        wait_for(driver, "Pruned by 30 %")
        asked = [label for label in driver.find_elements("css selector", "#questions label") if label.text]
        assert len(asked) == 4
        asked[1].click()
        right = wait_for(driver, r"The right answer is (circle|square|triangle|diamond|cross|ring)\.")[1]
        assert re.search(rf"Dense model\n{right} ✓\nPruned by 30 %\n{right} ✓", text(driver))

        before = driver.find_element("css selector", "#picture img").get_attribute("src")
        button(driver, "Another picture").click()
        wait_for(driver, r"The right answer is (red|green|blue|yellow|purple|orange|cyan|grey)\.")
        assert driver.find_element("css selector", "#picture img").get_attribute("src") != before

        button(driver, "Ask all 200 questions").click()
        dense, pruned = map(int, wait_for(driver, r"Dense\n(\d+) of 200 right\nPruned\n(\d+) of 200 right").groups())
        assert 180 < pruned <= dense + 3
        shot(driver, f"end-{width}")

        # Nothing hangs over the edge, and nothing was asked of another machine.
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        names = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [name for name in names if not name.startswith((url, "data:", "blob:"))] == []


def shot(driver, name):
    """Keep a picture of the whole page where SPACE_SHOTS names a folder (and SPACE_THEME may say dark)."""
    if folder := os.environ.get("SPACE_SHOTS"):
        full = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": full["width"], "height": full["height"], "scale": 1}
        taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(taken["data"]))
