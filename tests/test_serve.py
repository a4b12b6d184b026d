"""The page of the inference solver: what stands behind it, and the real process in a real browser."""

import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inference_solver import FlexARInferenceSolver, main
from model.serve import GRADIO_PIN, NO_SIZE, Page, free_port, valid_sizes
from tests.browser_helpers import needs_browser
from tests.test_inference_solver import make_picture, write_folders

ROOT = Path(__file__).parents[1]
HAS_GRADIO = importlib.util.find_spec("gradio") is not None
WAIT_S = 60
PAGE_SEED, MAX_GEN_LEN, SIZE = 5, 30, (64, 32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def solver(folders):
    return FlexARInferenceSolver(
        str(folders / "checkpoint"), "fp32", target_size=64, vqgan_dir=folders / "vqgan", device="cpu"
    )


def flags(folders: Path) -> list[str]:
    paths = ["--model_path", str(folders / "checkpoint"), "--vqgan_dir", str(folders / "vqgan")]
    settings = ["--seed", str(PAGE_SEED), "--max_gen_len", str(MAX_GEN_LEN), "--cfg", "2"]
    return [*paths, *settings, "--device", "cpu", "--precision", "fp32", "--target_size", "64"]


def ask(page: Page, report=None, **changes):
    """One press of the button, with the values that the page begins with but for `changes`."""
    values = dict(prompt="a cat", pictures=None, size=NO_SIZE, num_pictures=2, seed=PAGE_SEED, cfg=2.0)
    values |= dict(temperature=1.0, image_top_k=2000, text_top_k=10, max_gen_len=MAX_GEN_LEN)
    return page.answer(**(values | changes), report=report)


@pytest.fixture
def page(solver) -> Page:
    return Page(solver, solver.create_logits_processor(), MAX_GEN_LEN)


def test_pictures_side_by_side_are_those_of_the_seeds(page, solver):
    result = ask(page, size="64x32", num_pictures=3)
    options = solver.create_logits_processor(cfg=2.0)
    for seed in range(PAGE_SEED, PAGE_SEED + 3):
        _, images = solver.generate([], [["a cat", None]], MAX_GEN_LEN, 1.0, options, size=SIZE, seed=seed)
        shown = [image for image, caption in result.pictures if re.fullmatch(rf"seed {seed}( \(\d of \d\))?", caption)]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in images]
    assert result.text.count("seed ") == 3 and "tokens/s" in result.status


def test_what_was_cut_off_is_said(page):
    result = ask(page, size="64x64", num_pictures=2, max_gen_len=9)
    assert result.pictures == [] and result.is_bad
    assert "cut off at 9 tokens: seed 5, 6; unfinished pictures left out: 2" in result.status
    most = page.solver.model.config.max_position_embeddings
    result = ask(page, prompt="a" + " a" * (most - 20), size="64x64", num_pictures=2, max_gen_len=9999)
    assert "cut off at the end of the model's positions: seed 5, 6; unfinished" in result.status


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(prompt="<|image|>what"), r"1 <\|image\|>, but there are 0 images"),
        (dict(prompt="<image> what", pictures=[("a.png", None)]), r"has <image> but no <\|image\|>: did you mean"),
        (dict(prompt=" "), "the prompt is empty"),
        (dict(pictures=[("pyproject.toml", None)]), "pyproject.toml cannot be read"),
        (dict(seed=None, cfg=None), "seed is empty; give a number; guidance is empty"),
        (dict(seed=-1), "the seed is -1"),
        (dict(temperature=-1.0), "temperature is -1"),
        (dict(image_top_k=0), "top-k is 0"),
        (dict(max_gen_len=0), "must be at least 1"),
        (dict(max_gen_len=2, size="64x32"), r"max_gen_len"),
    ],
)
def test_bad_input_becomes_a_message(page, changes, reason):
    result = ask(page, **changes)
    assert result.is_bad and re.search(reason, result.status), result.status
    assert result.pictures == [] and result.text == ""
    assert "<|" not in result.outputs()[2]  # the page is HTML
    assert not ask(page, size="64x32", max_gen_len=60, temperature=0.0, text_top_k=1).text == ""  # and goes on


def test_too_little_memory_becomes_a_message(page, monkeypatch):
    def refuse(*args):
        torch.empty(1 << 60)

    with monkeypatch.context() as patch:
        patch.setattr("model.generation.KVCache", refuse)
        result = ask(page, num_pictures=3)
    assert result.is_bad and result.status.startswith("too little memory") and "answers (3) smaller" in result.status
    assert ask(page, size="64x32").pictures


def test_a_generation_can_be_stopped_and_the_next_one_goes_on(page):
    seen = []

    def stop_soon(meter) -> None:
        seen.append(meter.num_tokens)
        if len(seen) == 3:
            page.stop()

    assert ask(page, stop_soon, size="64x64").status == "Stopped."
    assert len(seen) == 3
    assert ask(page, size="64x32").pictures


def test_requests_are_answered_one_at_a_time_and_none_after_the_end(page):
    order, running = [], threading.Event()

    def watch(name: str):
        def report(_) -> None:
            order.append(name)
            running.set()

        return report

    results = {}
    threads = [
        threading.Thread(target=lambda name=name: results.update({name: ask(page, watch(name), size="64x32")}))
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(set(order)) == 2 and order == sorted(order, reverse=order[0] == "b")
    assert results["a"].text == results["b"].text

    running.clear()
    last = threading.Thread(target=lambda: results.update(last=ask(page, watch("c"), max_gen_len=400, num_pictures=16)))
    last.start()
    assert running.wait(WAIT_S)
    page.end()
    last.join(WAIT_S)
    assert results["last"].status == "Stopped." == ask(page).status


def test_sizes_are_those_of_training(solver):
    sizes = valid_sizes(solver.vocab, 64)
    assert sizes[0] == (64, 64) and sorted(sizes) == [
        (32, 64),
        (32, 96),
        (32, 128),
        (64, 32),
        (64, 64),
        (96, 32),
        (128, 32),
    ]
    for size in sizes:
        assert solver.image_start(size)
    vocab = replace(solver.vocab, grid_size_ids={1: 5, 2: 6})  # a vocabulary without the larger sides
    assert sorted(valid_sizes(vocab, 64)) == [(32, 64), (64, 32), (64, 64)]


@pytest.mark.slow
def test_a_taken_port_and_a_foreign_address_are_refused_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1:{port} .*give another --port"):
            free_port("127.0.0.1", port)
        if HAS_GRADIO:
            arguments = ["--model_path", "absent", "--vqgan_dir", ".", "--serve", "--port", str(port)]
            assert main(arguments) == 2
            assert f"127.0.0.1:{port}" in capsys.readouterr().err
    with pytest.raises(OSError, match="192.0.2.1"):
        free_port("192.0.2.1", 0)
    assert 0 < free_port("127.0.0.1", 0) < 2**16


def test_without_gradio_one_message_says_how_to_install_it(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it fails, as where it is not installed
    assert main([*flags(folders), "--serve"]) == 2
    assert f"pip install {GRADIO_PIN}" in capsys.readouterr().err
    assert GRADIO_PIN in (ROOT / "tests" / "requirements.txt").read_text()


@pytest.fixture
def served(folders, tmp_path):
    """The real process and the address of its page; its stderr is in `tmp_path/stderr`."""
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "inference_solver.py", *flags(folders), "--serve", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    environment |= dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")  # as on a cluster; nobody is there
    with open(tmp_path / "stderr", "w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()
        assert "The page is at" in line, (tmp_path / "stderr").read_text()
        yield process, re.search(r"http://\S+", line)[0]
    finally:
        process.kill()
        process.wait()


class Driven:
    """The page in the browser, by the names of its fields."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.get_log("browser")  # of the pages of other tests
        driver.get(url)
        self.wait(lambda: self.all("#prompt textarea"))

    def wait(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_S).until(lambda _: condition())

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def first(self, selector: str):
        """The page draws its parts one after the other."""
        return self.wait(lambda: self.all(selector))[0]

    def fill(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.all(selector)[0].send_keys(Keys.CONTROL, "a")
        self.all(selector)[0].send_keys(text)

    def choose_size(self, label: str) -> None:
        self.first("#size input").click()
        options = self.wait(lambda: self.all("[role=option]"))
        next(option for option in options if option.get_attribute("aria-label") == label).click()

    def generate(self) -> str:
        """Press the button; the new line about the answer."""
        before = self.first("#status").text
        self.first("#go").click()
        self.wait(lambda: self.first("#status").text not in ("", before))
        return self.first("#status").text

    def pictures(self, num: int) -> list[Image.Image]:
        """The files that the gallery shows, once there are `num`."""
        self.wait(lambda: len(self.all("#pictures .grid-container img")) == num)
        urls = [image.get_attribute("src") for image in self.all("#pictures .grid-container img")]
        return [Image.open(io.BytesIO(urllib.request.urlopen(url).read())) for url in urls]


def listening_addresses(port: int) -> set[str]:
    """Addresses at which someone listens on that port, hexadecimal as in /proc."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    return {words[1].split(":")[0] for words in lines if words[3] == "0A" and int(words[1].split(":")[1], 16) == port}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GRADIO, reason="gradio is not here")
@needs_browser
def test_the_page_in_a_browser(served, browser, solver, folders, tmp_path):
    process, url = served
    assert listening_addresses(int(url.rstrip("/").rsplit(":")[-1])) == {"0100007F"}  # 127.0.0.1 and no other

    # text to image: two pictures side by side, those of the seeds, and of the command line
    page = Driven(browser, url)
    page.fill("#prompt textarea", "a red cat")
    page.choose_size("64x32")
    page.fill("#num input[type=number]", "2")
    status = page.generate()
    options = solver.create_logits_processor(cfg=2.0)
    arguments = ([], [["a red cat", None]], MAX_GEN_LEN, 1.0, options)
    expected = [solver.generate(*arguments, size=SIZE, seed=seed) for seed in (PAGE_SEED, PAGE_SEED + 1)]
    images = [image for _, images in expected for image in images]
    shown = page.pictures(len(images))
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in images]
    assert all(image.format == "PNG" for image in shown) and shown[0].size == SIZE
    captions = [node.text for node in page.all("#pictures .caption-label")]
    assert len(images) == 2 and captions == ["seed 5", "seed 6"]
    left, right = (image.rect for image in page.all("#pictures .grid-container img"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert "tokens/s" in status
    answer = page.first("#answer textarea").get_attribute("value")
    assert answer == "\n".join(f"seed {seed}: {text}" for seed, (text, _) in enumerate(expected, start=PAGE_SEED))
    out_path = tmp_path / "out.png"
    assert main([*flags(folders), "--prompt", "a red cat", "--size", "64x32", "--out", str(out_path)]) == 0
    assert np.array_equal(np.asarray(Image.open(out_path)), np.asarray(shown[0]))

    # a mistake: a message, not a traceback; the old pictures go
    page.fill("#prompt textarea", "<|image|>two <|image|>")
    assert "the text has 2 <|image|>, but there are 0 images; give one for each" in page.generate()
    assert page.all("#status .bad") and page.pictures(0) == []

    # two pictures in, text out
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for seed, path in enumerate(paths):
        make_picture(seed=seed).save(path)
    page.first("#images input[type=file]").send_keys("\n".join(map(str, paths)))
    page.wait(lambda: len(page.all("#images .grid-container img, #images .thumbnails img")) >= 2)
    page.choose_size(NO_SIZE)
    page.fill("#num input[type=number]", "1")
    assert "tokens/s" in page.generate()
    text, _ = solver.generate(paths, [["<|image|>two <|image|>", None]], MAX_GEN_LEN, 1.0, options, seed=PAGE_SEED)
    assert page.first("#answer textarea").get_attribute("value") == text

    # nothing from elsewhere, nothing that the policy of the page or the missing network refused
    assert "default-src 'self'" in urllib.request.urlopen(url).headers["Content-Security-Policy"]
    elsewhere = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(origin))"
    assert [name for name in browser.execute_script(elsewhere) if not name.startswith(("data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    # the end, while it is generating
    page.fill("#num input[type=number]", "16")
    page.fill("#max_gen_len input", "400")
    page.first("#go").click()
    page.wait(lambda: "tokens/s" in page.first("#pictures").text)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert list((tmp_path / "tmp").iterdir()) == []
