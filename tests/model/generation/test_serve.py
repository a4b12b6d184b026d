"""The page of the inference solver: what stands behind it, and the real process in a real browser."""

import importlib.util
import io
import re
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from inference_solver import main
from model.generation.kv_cache import KVCache
from model.generation.sampling import SamplingOptions
from model.generation.serve import GRADIO_PIN, NO_SIZE, Page, free_port
from tests.helpers import forked
from tests.helpers.browser_helpers import needs_browser
from tests.model.generation.test_inference_solver import make_request_image

ROOT = Path(__file__).parents[3]
HAS_GRADIO = importlib.util.find_spec("gradio") is not None
WAIT_S = 60
PAGE_SEED, MAX_GEN_LEN, SIZE = 5, 30, (64, 32)


def flags(folders: Path) -> list[str]:
    paths = ["--model_path", str(folders / "checkpoint"), "--vqgan_dir", str(folders / "vqgan")]
    settings = ["--seed", str(PAGE_SEED), "--max_gen_len", str(MAX_GEN_LEN), "--cfg", "2"]
    return [*paths, *settings, "--device", "cpu", "--precision", "fp32", "--target_size", "64"]


def ask(page: Page, report=lambda meter: None, **changes):
    """(images with captions, text, status) of one press of the button."""
    values = dict(prompt="a cat", images=None, size=NO_SIZE, num_answers=2, seed=PAGE_SEED, cfg=2.0)
    values |= dict(temperature=1.0, image_top_k=2000, text_top_k=10, max_gen_len=MAX_GEN_LEN)
    return page.answer(**(values | changes), report=report)


@pytest.fixture
def page(solver) -> Page:
    return Page(solver, SamplingOptions())


def test_images_side_by_side_are_those_of_the_seeds(page, solver):
    shown, text, status = ask(page, size="64x32", num_answers=3)
    options = solver.create_logits_processor(cfg=2.0)
    for seed in range(PAGE_SEED, PAGE_SEED + 3):
        _, images = solver.generate([], [["a cat", None]], MAX_GEN_LEN, 1.0, options, size=SIZE, seed=seed)
        found = [image for image, caption in shown if caption == f"seed {seed}"]
        assert [image.tobytes() for image in found] == [image.tobytes() for image in images]
    assert text.count("seed ") == 3 and "tokens/s" in status
    # What the page has no field for is that of the command line.
    options = replace(options, seed=PAGE_SEED, speculative=2)
    expected = solver.answer_many([{"qas": [["a cat", None]], "size": SIZE}], MAX_GEN_LEN, options)[0]
    shown, *_ = ask(Page(solver, SamplingOptions(speculative=2)), size="64x32", num_answers=1)
    assert [image.tobytes() for image, _ in shown] == [image.tobytes() for image in expected.images]


def test_the_status_says_what_was_cut_off(page):
    shown, _, status = ask(page, size="64x64", max_gen_len=9)
    assert shown == []
    assert "2 of 2 answers were cut off at max_gen_len=9 tokens, 2 of them within an image" in status


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(prompt="<|image|>what"), r"1 <\|image\|>, but there are 0 images"),
        (dict(prompt=" "), "the prompt is empty"),
        (dict(images=[("pyproject.toml", None)]), "pyproject.toml cannot be read"),
        # An emptied field.
        (dict(seed=None), "seed is None"),
        (dict(max_gen_len=None), "at least 1 token"),
        (dict(max_gen_len=2, size="64x32"), "max_gen_len"),
    ],
)
def test_bad_input_becomes_the_status(page, changes, reason):
    shown, text, status = ask(page, **changes)
    assert re.search(reason, status) and shown == [] and text == ""


def test_too_little_memory_becomes_the_status_and_the_next_request_is_answered(page, monkeypatch):
    def fail(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "allocate", fail)
        page.solver.forward.kept_batch = None
        _, _, status = ask(page, num_answers=3)
    assert status.startswith("too little memory") and "answers (3) smaller" in status
    assert ask(page, size="64x32")[0]


def test_a_generation_can_be_stopped_and_the_next_request_is_answered(page):
    seen = []

    def stop_soon(meter) -> None:
        seen.append(meter.num_tokens)
        if len(seen) == 3:
            page.stop()

    assert ask(page, stop_soon, size="64x64") == ([], "", "Stopped.")
    assert len(seen) == 3
    assert ask(page, size="64x32")[0]


def test_sizes_are_those_of_training(page, solver):
    names = ["128x32", "96x32", "64x64", "64x32", "32x128", "32x96", "32x64"]
    assert sorted(page.sizes) == sorted([NO_SIZE, *names])
    for size in page.sizes.values():
        assert size is None or solver.image_start(size)


def test_a_taken_port_and_a_foreign_address_are_rejected_before_the_model_is_loaded(monkeypatch, capsys):
    # Importing the real one takes long.
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1:{port} .*give another --port"):
            free_port("127.0.0.1", port)
        arguments = ["--model_path", "absent", "--vqgan_dir", "exps/tiny/vqgan", "--serve", "--port", str(port)]
        assert main(arguments) == 2
        assert f"127.0.0.1:{port}" in capsys.readouterr().err
    for host, port in (("192.0.2.1", 0), ("127.0.0.1", 70000)):
        with pytest.raises(OSError, match=f"{host}:{port}"):
            free_port(host, port)
    assert 0 < free_port("127.0.0.1", 0) < 2**16


def test_without_gradio_one_message_says_how_to_install_it(folders, monkeypatch, capsys):
    # Importing it fails, as where it is not installed.
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([*flags(folders), "--serve"]) == 2
    assert f"pip install {GRADIO_PIN}" in capsys.readouterr().err
    assert GRADIO_PIN in (ROOT / "tests" / "requirements.txt").read_text()


@pytest.fixture
def served(folders, tmp_path):
    """The real process and the address of its page."""
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "inference_solver.py", *flags(folders), "--serve", "--port", "0"]
    # A cluster has a proxy; nothing listens at this one.
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")
    process = forked.Popen(command, forked.environment() | proxies | {"TMPDIR": str(tmp_path / "tmp")})
    try:
        yield process, re.search(r"http://\S+", process.wait_for_output("(Ctrl-C ends it)"))[0]
    finally:
        process.kill()
        process.wait()


class Driven:
    """The page in the browser, by the names of its fields."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        # Drop the log of other tests.
        driver.get_log("browser")
        driver.get(url)
        self.wait(lambda: self.all("#prompt textarea"))

    def wait(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05).until(lambda _: condition())

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def first(self, selector: str):
        """The page draws its parts one after the other."""
        return self.wait(lambda: self.all(selector))[0]

    def value(self, name: str) -> str:
        return self.first(f"#{name} textarea").get_attribute("value")

    def fill(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.all(selector)[0].send_keys(Keys.CONTROL, "a")
        self.all(selector)[0].send_keys(text)

    def choose_size(self, label: str) -> None:
        self.first("#size input").click()
        options = self.wait(lambda: self.all("[role=option]"))
        next(option for option in options if option.get_attribute("aria-label") == label).click()

    def generate(self) -> str:
        """Press the button; the new status."""
        before = self.value("status")
        self.first("#go").click()
        self.wait(lambda: self.value("status") not in ("", before))
        return self.value("status")

    def drawn(self, num: int) -> list[Image.Image]:
        """The files that the gallery shows, once there are `num`."""
        images = "#drawn .grid-container img"
        self.wait(lambda: len(self.all(images)) == num)
        urls = [image.get_attribute("src") for image in self.all(images)]
        return [Image.open(io.BytesIO(urllib.request.urlopen(url).read())) for url in urls]


def listening_addresses(port: int) -> set[str]:
    """Addresses at which someone listens on that port, hexadecimal as in /proc."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    return {words[1].split(":")[0] for words in lines if words[3] == "0A" and int(words[1].split(":")[1], 16) == port}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GRADIO, reason="gradio is not here")
@needs_browser
def test_the_page_in_a_browser(served, browser, solver, tmp_path):
    process, url = served
    # 127.0.0.1 and no other.
    assert listening_addresses(int(url.rstrip("/").rsplit(":")[-1])) == {"0100007F"}

    # Text to image: two images side by side, those of the seeds.
    page = Driven(browser, url)
    page.fill("#prompt textarea", "a red cat")
    page.choose_size("64x32")
    page.fill("#num input[type=number]", "2")
    assert "tokens/s" in page.generate()
    options = solver.create_logits_processor(cfg=2.0)
    arguments = ([], [["a red cat", None]], MAX_GEN_LEN, 1.0, options)
    expected = [solver.generate(*arguments, size=SIZE, seed=seed) for seed in (PAGE_SEED, PAGE_SEED + 1)]
    images = [image for _, images in expected for image in images]
    shown = page.drawn(len(images))
    # Another process may round differently in the VQGAN.
    pairs = zip(shown, images, strict=True)
    assert all(np.allclose(np.int16(one), np.int16(other), rtol=0, atol=1) for one, other in pairs)
    assert all(image.format == "PNG" for image in shown) and shown[0].size == SIZE
    captions = [node.text for node in page.all("#drawn .caption-label")]
    assert len(images) == 2 and captions == ["seed 5", "seed 6"]
    left, right = (image.rect for image in page.all("#drawn .grid-container img"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    answers = [f"seed {seed}: {text}" for seed, (text, _) in enumerate(expected, start=PAGE_SEED)]
    assert page.value("answer") == "\n".join(answers)

    # An error: a message, and the old images go.
    page.fill("#prompt textarea", "<|image|>two <|image|>")
    assert "the text has 2 <|image|>, but there are 0 images; give one for each" in page.generate()
    assert page.drawn(0) == []

    # Two images in, text out.
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for seed, path in enumerate(paths):
        make_request_image(seed=seed).save(path)
    page.first("#images input[type=file]").send_keys("\n".join(map(str, paths)))
    page.wait(lambda: len(page.all("#images .grid-container img, #images .thumbnails img")) >= 2)
    page.choose_size(NO_SIZE)
    page.fill("#num input[type=number]", "1")
    assert "tokens/s" in page.generate()
    text, _ = solver.generate(paths, [["<|image|>two <|image|>", None]], MAX_GEN_LEN, 1.0, options, seed=PAGE_SEED)
    assert page.value("answer") == text

    # Nothing comes from elsewhere; neither the policy of the page nor the missing network blocked anything.
    assert "default-src 'self'" in urllib.request.urlopen(url).headers["Content-Security-Policy"]
    elsewhere = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(origin))"
    assert [name for name in browser.execute_script(elsewhere) if not name.startswith(("data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    # The end, while it is generating.
    page.fill("#num input[type=number]", "16")
    page.fill("#max_gen_len input", "400")
    page.first("#go").click()
    page.wait(lambda: "tokens/s" in page.first("#drawn").text)
    assert list((tmp_path / "tmp").glob("page-*"))
    process.terminate()
    assert process.wait(WAIT_S) == 0
    assert "Traceback" not in process.stderr.read_text()
    assert list((tmp_path / "tmp").iterdir()) == []
