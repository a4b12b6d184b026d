"""A page in the browser: a prompt and images in, several answers side by side out.

    python inference_solver.py --model_path output/7B/epoch1 --serve

Gradio draws the page, and is imported only here. The browser may load nothing from elsewhere. Images put in and drawn
are in a temporary folder that is removed at the end.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from data.items.image_transform import crop_sizes
from data.items.vocab import GRID_PIXELS, IMAGE_SYMBOL
from model.generation.loop import SamplingOptions
from model.generation.progress import GenerationMeter
from model.generation.requests import describe_cuts

# The version of tests/requirements.txt.
GRADIO_PIN = "gradio==6.31.0"
NO_SIZE = "as the model likes"
MAX_ANSWERS = 16
# Numbers of a browser are exact up to here.
MAX_PAGE_SEED = 2**53 - 1
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")

# The browser may load only files of this page. Gradio's own scripts and styles are partly inline.
CONTENT_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


class Stopped(Exception):
    pass


class Page:
    """Answers the requests of the page, one at a time."""

    def __init__(self, solver: Any, options: SamplingOptions):
        """
        Args:
            solver: a FlexARInferenceSolver, with a VQGAN that has a decoder.
            options: what the page has no field for.
        """
        self.solver, self.options = solver, options
        # The sizes that the model was trained to draw, as far as the vocabulary has them.
        sides = {grids * GRID_PIXELS for grids in solver.vocab.grid_size_ids}
        sizes = [size for size in crop_sizes(solver.item_processor.target_size) if sides.issuperset(size)]
        self.sizes = {NO_SIZE: None} | {f"{width}x{height}": (width, height) for width, height in sizes}
        self._stop_asked = threading.Event()

    def answer(
        self,
        prompt: str,
        images: list[tuple[str, str | None]] | None,
        size: str,
        num_answers: int,
        seed: int | None,
        cfg: float | None,
        temperature: float | None,
        image_top_k: int | None,
        text_top_k: int | None,
        max_gen_len: int | None,
        report: Callable[[GenerationMeter], None] = lambda meter: None,
    ) -> tuple[list[tuple[Image.Image, str]], str, str]:
        """(images with captions, text, status). `images`: (path, caption) each. Errors become the status."""
        line = ""

        def watch(meter: GenerationMeter) -> None:
            nonlocal line
            line = meter.line()
            if self._stop_asked.is_set():
                raise Stopped
            report(meter)

        self._stop_asked.clear()
        try:
            if not prompt.strip() and not images:
                raise ValueError("the prompt is empty; say what to draw or to answer")
            if max_gen_len is None or max_gen_len < 1:
                raise ValueError("the longest answer must be at least 1 token")
            values = dict(temperature=temperature, image_top_k=image_top_k, text_top_k=text_top_k, cfg=cfg, seed=seed)
            options = replace(self.options, **values)
            paths = [path for path, _ in images or ()]
            request = {"qas": [[prompt, None]], "images": paths, "size": self.sizes[size]}
            answers = self.solver.answer_many([request] * num_answers, max_gen_len, options, on_progress=watch)
        except Stopped:
            return [], "", "Stopped."
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            return [], "", str(error)
        named = [(f"seed {seed + index}", answer) for index, answer in enumerate(answers)]
        shown = [(image, name) for name, answer in named for image in answer.images]
        texts = [answer.text if len(answers) == 1 else f"{name}: {answer.text}" for name, answer in named]
        return shown, "\n".join(texts), "; ".join(filter(None, [line, describe_cuts(answers, max_gen_len)]))

    def stop(self) -> None:
        """End the generation that is running, if any."""
        self._stop_asked.set()


def serve(
    build_solver: Callable[[], Any], options: SamplingOptions, max_gen_len: int, host: str, port: int, title: str
) -> None:
    """
    Open the page, and return after SIGINT or SIGTERM.

    `build_solver` is called after Gradio and the address have been checked. `options` and `max_gen_len` are the first
    values of the fields. Port 0 takes any that is free.
    Raises ImportError without Gradio, OSError if the address is taken or not this machine's.
    """
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as folder:
        # Before the import: Gradio would take a folder that all users of the machine share.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio
        except ImportError as error:
            raise ImportError(f"--serve needs Gradio, which is not here ({error}): pip install {GRADIO_PIN}") from error
        port = free_port(host, port)
        page = Page(build_solver(), options)
        blocks = build_page(gradio, page, options, max_gen_len, title)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            url = _launch(gradio, blocks, host, port)
            if host not in LOCAL_HOSTS:
                warning = "anyone who reaches this machine can use the page, without a password."
                print(f"--host {host}: {warning}", file=sys.stderr)
            print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            # The script ends its process: a generation that is running needs no end of its own.
            blocks.close(verbose=False)


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0. Raises OSError with the address if a page cannot be opened there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise OSError(f"no page can be opened at {host}:{port} ({error}); give another --port or --host.") from error


def build_page(gradio: Any, page: Page, options: SamplingOptions, max_gen_len: int, title: str):
    """The gradio.Blocks of a page, not yet opened."""
    progress = gradio.Progress()

    def answer(*inputs, progress=progress):
        return page.answer(*inputs, report=lambda meter: progress(meter.fraction, desc=meter.line()))

    with gradio.Blocks(title=title) as blocks:
        gradio.Markdown(f"### `{title}`")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                inputs, go, stop = _add_inputs(gradio, page, options, max_gen_len)
            with gradio.Column(scale=3, min_width=320):
                # PNG: what is shown and saved is what was drawn, to the pixel.
                buttons = ["download", "download_all", "fullscreen"]
                drawn = gradio.Gallery(label="Images", format="png", columns=4, buttons=buttons, elem_id="drawn")
                text = gradio.Textbox(label="Answer", lines=2, max_lines=12, buttons=["copy"], elem_id="answer")
                status = gradio.Textbox(label="Status", elem_id="status")
        # One at a time, whatever Gradio's settings are: answers share the buffers of the solver.
        queue = {"concurrency_id": "answer", "concurrency_limit": 1}
        for trigger in (go.click, inputs[0].submit):
            trigger(answer, inputs, [drawn, text, status], show_progress_on=drawn, **queue)
        stop.click(page.stop, queue=False, show_progress="hidden")
    return blocks


def _add_inputs(gradio: Any, page: Page, options: SamplingOptions, max_gen_len: int) -> tuple[list, Any, Any]:
    """The left side, in the order of `Page.answer`; and its two buttons."""

    def number(name: str, value: float, label: str, **more: Any):
        return gradio.Number(value, label=label, min_width=100, elem_id=name, **more)

    info = f"{IMAGE_SYMBOL} marks where images stand; without it they come first"
    prompt = gradio.Textbox(label="Prompt", info=info, lines=3, max_lines=12, autofocus=True, elem_id="prompt")
    files = {"type": "filepath", "file_types": ["image"], "elem_id": "images"}
    images = gradio.Gallery(label="Images of the prompt, in order", columns=6, height=140, **files)
    with gradio.Row():
        go = gradio.Button("Generate", variant="primary", scale=3, elem_id="go")
        stop = gradio.Button("Stop", scale=1, min_width=80, elem_id="stop")
    with gradio.Row():
        size = gradio.Dropdown(list(page.sizes), value=NO_SIZE, label="Size", min_width=220, elem_id="size")
        num_answers = gradio.Slider(1, MAX_ANSWERS, 4, step=1, label="Answers", elem_id="num")
    with gradio.Row():
        seed = number("seed", options.seed, "Seed of the first", precision=0, minimum=0, maximum=MAX_PAGE_SEED)
        cfg = number("cfg", options.cfg, "Guidance (1: none)", step=0.5)
        temperature = number("temperature", options.temperature, "Temperature", step=0.1)
    with gradio.Row():
        image_top_k = number("image_top_k", options.image_top_k, "Top-k (images)", precision=0)
        text_top_k = number("text_top_k", options.text_top_k, "Top-k (text)", precision=0)
        longest = number("max_gen_len", max_gen_len, "Longest (tokens)", precision=0)
    return [prompt, images, size, num_answers, seed, cfg, temperature, image_top_k, text_top_k, longest], go, stop


def _add_content_policy(app: Any) -> Any:
    """ASGI middleware: every response says what the browser may load."""

    async def with_policy(scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode())
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        await app(scope, receive, send_with_policy)

    return with_policy


def _launch(gradio: Any, blocks: Any, host: str, port: int) -> str:
    """Open the page in a thread of its own; its address."""
    from starlette.middleware import Middleware

    # Gradio asks whether its page is there: not through the proxy of a cluster.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join([*LOCAL_HOSTS, host, *filter(None, [os.environ.get(name)])])
    # Gradio's own fonts would come from the network. Its run history would keep prompts in the browser.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, url, _ = blocks.queue(api_open=False).launch(
        server_name=host,
        server_port=port,
        theme=gradio.themes.Default(**fonts),
        app_kwargs={"middleware": [Middleware(_add_content_policy)]},
        footer_links=[],
        share=False,
        run_history=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    return url
