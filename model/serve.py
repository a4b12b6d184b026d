"""
A page in the browser: a prompt and pictures in, several pictures side by side out.

    python inference_solver.py --model_path output/7B/epoch1 --serve

Where it stands: `inference_solver.py --serve` opens it; what it shows for a seed is what the command line gives for
that seed (several answers at once in fp32 only: see `generate_many`). Gradio draws it, and is imported only here and
only then. The page works without a network: nothing on it comes from elsewhere (the browser is told to refuse that),
nothing is reported to anybody, and what was put in and drawn lies in a temporary folder that is removed at the end.
"""

import html
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from data.image_transform import crop_sizes
from data.vocab import GRID_PIXELS, IMAGE_SYMBOL, ChameleonVocab
from model.generation import CUT_BY_LENGTH, CUT_BY_NAN, CUT_BY_POSITIONS, SamplingOptions
from model.progress import GenerationMeter
from model.requests import check_image_symbols

GRADIO_PIN = "gradio==6.31.0"  # the version of tests/requirements.txt
NO_SIZE = "as the model likes"
MAX_PICTURES = 16
MAX_PAGE_SEED = 2**53 - 1  # numbers of a browser are exact up to here
REPORT_INTERVAL_S = 0.2  # between two reports of progress to the browser
ENDING_S = 10.0  # how long the end waits for a generation to notice it
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")

# What the browser may load: this page's own files. Gradio's own scripts and styles are partly inline.
CONTENT_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
CSS = """
.gradio-container { max-width: 1400px !important; }
#pictures .grid-wrap { max-height: none; overflow: visible; }
#pictures .thumbnail-item { aspect-ratio: auto; height: auto; }
#images .grid-container { grid-template-columns: repeat(auto-fill, 100px) !important; }
#pictures .grid-container { grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
#status p { margin: 0; padding: 2px 0; }
#status .bad { color: var(--error-text-color); font-weight: 600; }
#answer textarea { font-size: var(--text-md); }
"""


class Stopped(Exception):
    """Raised inside a generation that is to end."""


@dataclass(frozen=True)
class Result:
    """What the page shows: pictures with their captions, the answers' text, and one line about it."""

    pictures: list[tuple[Image.Image, str]]
    text: str
    status: str
    is_bad: bool = False

    def outputs(self) -> tuple[list[tuple[Image.Image, str]], str, str]:
        """For Gradio's gallery, text box and HTML."""
        return self.pictures, self.text, f'<p class="{"bad" if self.is_bad else "good"}">{html.escape(self.status)}</p>'


class Page:
    """What stands behind the page: a solver that answers one request at a time."""

    def __init__(self, solver: Any, options: SamplingOptions, max_gen_len: int):
        """`solver`: a FlexARInferenceSolver; `options` and `max_gen_len`: what the page begins with."""
        self.solver, self.options, self.max_gen_len = solver, options, max_gen_len
        sizes = valid_sizes(solver.vocab, solver.item_processor.target_size)
        self.sizes = {NO_SIZE: None} | {f"{width}x{height}": (width, height) for width, height in sizes}
        self.is_ending = False
        self._stop_asked, self._busy = threading.Event(), threading.Lock()

    def answer(
        self,
        prompt: str,
        pictures: list[tuple[str, str | None]] | None,
        size: str,
        num_pictures: int,
        seed: int | None,
        cfg: float | None,
        temperature: float | None,
        image_top_k: int | None,
        text_top_k: int | None,
        max_gen_len: int | None,
        report: Callable[[GenerationMeter], None] | None = None,
    ) -> Result:
        """One press of the button. `pictures`: (path, caption) of what was put in. Errors become the status."""
        with self._busy:
            self._stop_asked.clear()
            try:
                values = {"seed": seed, "guidance": cfg, "temperature": temperature, "longest answer": max_gen_len}
                values |= {"top-k (pictures)": image_top_k, "top-k (text)": text_top_k}
                check_inputs(prompt, len(pictures or ()), values)
                options = SamplingOptions(temperature, image_top_k, text_top_k, cfg, seed)
                request = {
                    "qas": [[prompt, None]],
                    "images": [path for path, _ in pictures or ()],
                    "size": self.sizes[size],
                }
                return self._generate([request] * num_pictures, options, max_gen_len, report)
            except Stopped:
                return Result([], "", "Stopped.", is_bad=True)
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                return Result([], "", str(error), is_bad=True)

    def stop(self) -> None:
        """End the generation that is running, if any."""
        self._stop_asked.set()

    def end(self) -> None:
        """End the generation that is running and every later one; returns once none is, or after ENDING_S."""
        self.is_ending = True
        if self._busy.acquire(timeout=ENDING_S):
            self._busy.release()

    def _generate(
        self,
        requests: list[dict],
        options: SamplingOptions,
        max_gen_len: int,
        report: Callable[[GenerationMeter], None] | None,
    ) -> Result:
        last: list[GenerationMeter] = []

        def watch(meter: GenerationMeter) -> None:
            last[:] = [meter]
            if self.is_ending or self._stop_asked.is_set():
                raise Stopped
            if report is not None:
                report(meter)

        answers = self.solver.answer_many(requests, max_gen_len, options, on_progress=watch)
        shown, texts = [], []
        for seed, answer in enumerate(answers, start=options.seed):
            texts.append(answer.text if len(answers) == 1 else f"seed {seed}: {answer.text}")
            for number, image in enumerate(answer.images, start=1):
                part = f" ({number} of {len(answer.images)})" if len(answer.images) > 1 else ""
                shown.append((image, f"seed {seed}{part}"))
        status = [last[0].total()] if last else []
        places = {CUT_BY_LENGTH: f"{max_gen_len} tokens", CUT_BY_POSITIONS: "the end of the model's positions"}
        places[CUT_BY_NAN] = "logits that are no numbers"
        for cause, place in places.items():
            cut = [str(seed) for seed, answer in enumerate(answers, start=options.seed) if answer.cut_by == cause]
            if cut:
                status.append(f"cut off at {place}: seed {', '.join(cut)}")
        if num_left_out := sum(answer.is_image_cut_off for answer in answers):
            status.append(f"unfinished pictures left out: {num_left_out}")
        return Result(shown, "\n".join(texts), "; ".join(status), is_bad=any(answer.is_cut_off for answer in answers))


def valid_sizes(vocab: ChameleonVocab, target_size: int) -> list[tuple[int, int]]:
    """(width, height) of pictures that the model was trained to draw at that target size: squares first, then wide."""
    sides = {grids * GRID_PIXELS for grids in vocab.grid_size_ids}
    sizes = [size for size in crop_sizes(target_size) if sides.issuperset(size)]
    return sorted(sizes, key=lambda size: (size[0] != size[1], size[0] < size[1], -size[0] * size[1], -size[0]))


def check_inputs(prompt: str, num_given: int, values: dict[str, float | None]) -> None:
    """Raises ValueError with every problem of what was typed; `num_given`: pictures that were put in."""
    problems = [f"{name} is empty; give a number" for name, value in values.items() if value is None]
    if not prompt.strip() and not num_given:
        problems.append("the prompt is empty; say what to draw or to answer")
    try:
        check_image_symbols([prompt], num_given)
    except ValueError as error:
        problems.append(str(error))
    if values["seed"] is not None and not 0 <= values["seed"] <= MAX_PAGE_SEED:
        problems.append(f"the seed is {values['seed']}; it must be from 0 to {MAX_PAGE_SEED}")
    if values["longest answer"] is not None and values["longest answer"] < 1:
        problems.append(f"the longest answer is {values['longest answer']} tokens; it must be at least 1")
    if problems:
        raise ValueError("; ".join(problems) + ".")


def import_gradio():
    """Gradio, with its reports to its makers switched off. Raises ImportError with the way to install it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"--serve needs Gradio, which is not here ({error}): pip install {GRADIO_PIN}") from error
    return gradio


def build_page(solver: Any, options: SamplingOptions | None = None, max_gen_len: int = 8192, title: str = "Generation"):
    """
    The page of a FlexARInferenceSolver, not yet opened.

    Args:
        solver: with a VQGAN that has a decoder.
        options, max_gen_len: what its fields begin with; by default the recipe's.
        title: what stands above it.

    Returns:
        gradio.Blocks; `behind` is its Page.
    """
    gradio = import_gradio()
    page = Page(solver, options or solver.create_logits_processor(), max_gen_len)
    progress = gradio.Progress()

    def answer(*inputs, progress=progress):
        next_at = [0.0]

        def report(meter: GenerationMeter) -> None:
            if time.monotonic() >= next_at[0]:
                next_at[0] = time.monotonic() + REPORT_INTERVAL_S
                progress(meter.fraction, desc=meter.line())

        return page.answer(*inputs, report=report).outputs()

    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.HTML(f"<h3>{html.escape(title)}</h3>")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                inputs, go, stop = _add_inputs(gradio, page)
            with gradio.Column(scale=3, min_width=320):
                outputs = _add_outputs(gradio)
    blocks.behind = page
    with blocks:
        for trigger in (go.click, inputs[0].submit):
            trigger(answer, inputs, outputs, concurrency_limit=1, concurrency_id="solver", show_progress_on=outputs[:1])
        stop.click(page.stop, queue=False, show_progress="hidden")
    return blocks


def _add_inputs(gradio, page: Page) -> tuple[list, Any, Any]:
    """The left side, in the order of `Page.answer`; and its two buttons."""
    options = page.options
    prompt = gradio.Textbox(
        label="Prompt",
        info=f"{IMAGE_SYMBOL} marks where pictures stand; without it they come first",
        lines=3,
        max_lines=12,
        autofocus=True,
        elem_id="prompt",
    )
    pictures = gradio.Gallery(
        label="Pictures of the prompt, in order",
        type="filepath",
        file_types=["image"],
        interactive=True,
        columns=4,
        height=140,
        object_fit="contain",
        sources=["upload", "clipboard"],
        elem_id="images",
    )
    with gradio.Row():
        go = gradio.Button("Generate", variant="primary", scale=3, elem_id="go")
        stop = gradio.Button("Stop", scale=1, min_width=80, elem_id="stop")
    with gradio.Row():
        size = gradio.Dropdown(list(page.sizes), value=NO_SIZE, label="Size", min_width=220, elem_id="size")
        is_exact = page.solver.model.dtype == torch.float32
        info = None if is_exact else "alone, a seed may draw otherwise than among others (--precision fp32: the same)"
        num_pictures = gradio.Slider(1, MAX_PICTURES, 4, step=1, label="Answers", info=info, elem_id="num")
    with gradio.Row():
        seed = gradio.Number(options.seed, label="Seed of the first", precision=0, min_width=100, elem_id="seed")
        cfg = gradio.Number(options.cfg, label="Guidance (1: none)", step=0.5, min_width=100, elem_id="cfg")
        temperature = gradio.Number(
            options.temperature, label="Temperature", step=0.1, min_width=100, elem_id="temperature"
        )
    with gradio.Row():
        image_top_k = gradio.Number(
            options.image_top_k, label="Top-k (pictures)", precision=0, min_width=100, elem_id="image_top_k"
        )
        text_top_k = gradio.Number(
            options.text_top_k, label="Top-k (text)", precision=0, min_width=100, elem_id="text_top_k"
        )
        max_gen_len = gradio.Number(
            page.max_gen_len, label="Longest (tokens)", precision=0, min_width=100, elem_id="max_gen_len"
        )
    inputs = [prompt, pictures, size, num_pictures, seed, cfg, temperature, image_top_k, text_top_k, max_gen_len]
    return inputs, go, stop


def _add_outputs(gradio) -> list:
    """The right side: pictures, text, status."""
    # PNG: what is shown and saved is what was drawn, to the pixel
    pictures = gradio.Gallery(
        label="Pictures",
        format="png",
        interactive=False,
        columns=2,
        height="auto",
        object_fit="contain",
        buttons=["download", "download_all", "fullscreen"],
        elem_id="pictures",
    )
    status = gradio.HTML("", elem_id="status")
    text = gradio.Textbox(label="Answer", lines=2, max_lines=12, interactive=False, buttons=["copy"], elem_id="answer")
    return [pictures, text, status]


class _ContentPolicy:
    """ASGI middleware: every response says what the browser may load."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", CONTENT_POLICY.encode()),
                ]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(
    build_solver: Callable[[], Any], options: SamplingOptions, max_gen_len: int, host: str, port: int, title: str
) -> None:
    """
    Open the page, and return once SIGINT or SIGTERM has come.

    Args:
        build_solver: gives the FlexARInferenceSolver; called once Gradio and the address have been found good.
        options, max_gen_len, title: see `build_page`.
        host, port: where the page is; port 0 takes any that is free.

    Raises:
        ImportError: no Gradio.
        OSError: the address is taken or not this machine's.
    """
    with _upload_folder():  # from the import on: Gradio would make a folder for all users of the machine
        gradio = import_gradio()
        port = free_port(host, port)
        solver = build_solver()
        with _until_signal() as ended:
            blocks = build_page(solver, options, max_gen_len, title)
            url = _launch(gradio, blocks, host, port)
            if host not in LOCAL_HOSTS:
                warning = "whoever reaches this machine can use the page, without a password."
                print(f"--host {host}: {warning}", file=sys.stderr)
            print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
            ended.wait()
            blocks.behind.end()
            blocks.close(verbose=False)


def _launch(gradio, blocks, host: str, port: int) -> str:
    """Open the page in a thread of its own; its address."""
    from starlette.middleware import Middleware

    for name in ("NO_PROXY", "no_proxy"):  # Gradio looks whether its page is there: not through the cluster's proxy
        os.environ[name] = ",".join([*LOCAL_HOSTS, host, *filter(None, [os.environ.get(name)])])
    system_fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, url, _ = blocks.queue(max_size=32, api_open=False).launch(
        server_name=host,
        server_port=port,
        theme=gradio.themes.Default(**system_fonts),
        css=CSS,
        app_kwargs={"middleware": [Middleware(_ContentPolicy)]},
        footer_links=[],
        share=False,
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    return url


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0. Raises OSError with the address if a page cannot be opened there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"no page can be opened at {host}:{port} ({reason}); give another --port or --host.") from error


@contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    ended = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: ended.set()) for number in numbers]
    try:
        yield ended
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


@contextmanager
def _upload_folder() -> Iterator[str]:
    """Where Gradio keeps what was put in and drawn; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as folder:
        previous = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield folder
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if previous is not None:
                os.environ["GRADIO_TEMP_DIR"] = previous
