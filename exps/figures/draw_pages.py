"""Draws the README's figures of the run page, the inspect page and the browser page, from a finished laptop default.

    bash exps/tiny.sh && pip install gradio==6.31.0 selenium && python exps/figures/draw_pages.py

Chromium and its driver must be installed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "exps" / "figures"
SIZE = (1280, 1000)
PROMPT = "a car on the left and a carrot on the right on a green background"


def run(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def shoot(driver: webdriver.Chrome, name: str) -> None:
    """Saves what the window shows, at half the size."""
    path = FIGURES / f"{name}.png"
    driver.save_screenshot(str(path))
    with Image.open(path) as image:
        half = image.convert("RGB").resize((SIZE[0] // 2, SIZE[1] // 2), Image.Resampling.LANCZOS)
    half.quantize(128).save(path, optimize=True)


def draw_browser_page(driver: webdriver.Chrome, tiny: Path) -> None:
    """Asks the page of `--serve` for four images, and draws the page with the answers."""
    flags = ["--model_path", tiny / "checkpoints" / "epoch1", "--vqgan_dir", "exps/tiny/vqgan", "--device", "cpu"]
    flags += ["--precision", "fp32", "--target_size", "64", "--cfg", "1", "--max_gen_len", "64", "--port", "7861"]
    server = subprocess.Popen([sys.executable, "inference_solver.py", "--serve", *map(str, flags)], cwd=ROOT)
    try:
        # The driver raises while no server listens.
        wait = WebDriverWait(driver, 120, ignored_exceptions=[WebDriverException])
        wait.until(lambda page: page.get("http://127.0.0.1:7861") is None)
        wait.until(lambda page: page.find_elements("css selector", "#prompt textarea"))[0].send_keys(PROMPT)
        driver.find_element("css selector", "#go").click()
        wait.until(lambda page: len(page.find_elements("css selector", "#drawn .grid-container img")) == 4)
        time.sleep(2)
        shoot(driver, "browser_page")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # Relative to the checkout: the pages show it.
    parser.add_argument("--tiny", type=Path, default=Path("output/tiny"), help="folder of exps/tiny.sh")
    tiny = parser.parse_args().tiny
    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", f"--window-size={SIZE[0]},{SIZE[1]}"):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as folder, webdriver.Chrome(options=options) as driver:
        report, inspect = Path(folder) / "report.html", Path(folder) / "inspect.html"
        run("model/report.py", tiny / "checkpoints", "--out", report)
        paths = ["--tokenizer", tiny / "tokenizer", "--vqgan_dir", "exps/tiny/vqgan", "--out", inspect]
        run("pre_tokenize/inspect_record.py", tiny / "tokens" / "record.json", "--num", "6", *paths)
        for path, name in ((report, "run_page"), (inspect, "inspect_page")):
            driver.get(path.as_uri())
            shoot(driver, name)
        draw_browser_page(driver, tiny)


if __name__ == "__main__":
    main()
