"""The processes that load images: they give what one process gives, and end with an error if one is killed."""

import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data.items.item_processor import PreparedItem
from pre_tokenize.loading import Crop, Loaders, Rejected, Window
from pre_tokenize.options import default_batch_size, default_num_workers, default_window_items
from pre_tokenize.pre_tokenize import Stopwatch, encode_windows
from pre_tokenize.progress import Progress
from tests.data.items.test_item_processor import tiny_processor  # noqa: F401  (a fixture)
from tests.helpers.tokenize_helpers import ROOT, environment
from tests.pre_tokenize.test_pre_tokenize import arguments, task  # noqa: F401  (a fixture)


def items_of(folder: Path, num_items: int) -> list[tuple[int, dict]]:
    """Items of 0 to 3 images of several sizes; the image of item 3 is missing."""
    for number, size in enumerate([(50, 40), (90, 30), (31, 80)]):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{number}.png")
    items = []
    for item_id in range(num_items):
        paths = [str(folder / f"{(item_id + number) % 3}.png") for number in range(item_id % 4)]
        answer = {"from": "gpt", "value": "ok" + " <|image|>" * len(paths)}
        paths = [str(folder / "gone.png")] * 3 if item_id == 3 else paths
        items.append((item_id, {"conversations": [{"from": "human", "value": "draw"}, answer], "image": paths}))
    return items


def copied(windows: Iterable[Window]) -> list[Window]:
    """Windows whose pixels stay: each image as its size and bytes."""
    return [
        [
            replace(item, images=tuple((image.size, np.array(image).tobytes()) for image in item.images))
            for item in window
        ]
        for window in windows
    ]


def test_windows_are_the_same_with_and_without_processes(tiny_processor, tmp_path):  # noqa: F811
    items = items_of(tmp_path, 23)
    with Loaders(tiny_processor, 0, 3, max_seq_len=90) as loaders:
        alone = copied(loaders.windows(items))
    assert [len(window) for window in alone] == [3] * 7 + [2]
    assert isinstance(alone[1][0], Rejected) and isinstance(alone[0][0], PreparedItem)
    with Loaders(tiny_processor, 2, 3, max_seq_len=90) as loaders:
        # Of three images the last is pickled.
        kinds = [[type(image) for image in item.images] for window in loaders.windows(items) for item in window]
        assert [Crop, Crop, Image.Image] in kinds
        assert copied(loaders.windows(items)) == alone


def test_pixels_stay_while_two_more_windows_are_taken_and_prepared(tiny_processor, tmp_path):  # noqa: F811
    """As on a GPU, which may still fetch the pixels of a window when the next but one is begun."""
    items = items_of(tmp_path, 60)
    with Loaders(tiny_processor, 2, 3, windows_ahead=2) as loaders:
        expected, before = copied(loaders.windows(items)), None
        for number, window in enumerate(loaders.windows(items)):
            if before is not None:
                assert copied([before, window]) == expected[number - 1 : number + 1]
            before = window


@pytest.mark.parametrize("error", [BrokenExecutor, OSError])
def test_a_killed_process_ends_the_windows(tiny_processor, tmp_path, error):  # noqa: F811
    with pytest.raises(error), Loaders(tiny_processor, 2, 3) as loaders:
        windows = loaders.windows(items_of(tmp_path, 300))
        next(windows)
        loaders.processes[0].kill()
        if error is OSError:
            raise OSError
        list(windows)
    assert not any(process.is_alive() for process in loaders.processes)


def test_memory_that_cannot_be_page_locked_is_an_error(tiny_processor, monkeypatch):  # noqa: F811
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr("torch.cuda.cudart", lambda: runtime)
    with Loaders(tiny_processor, 1, 3) as loaders, pytest.raises(ValueError, match="CUDA error 2.*--num_workers 0"):
        loaders.pin_memory()


@pytest.mark.slow
def test_loaders_run_before_torch_is_imported(task, tmp_path):  # noqa: F811
    """Each item is rejected with what its process has imported."""
    code = """
import sys
from data.items.conversation import ItemError
from exps.bench.pre_tokenize_ours import ZeroEncoder
from pre_tokenize import pre_tokenize
def process_item(self, raw_item, item_id):
    raise ItemError(f"torch: {'torch' in sys.modules}")
def load_encoder(*_):
    sys.modules["torch"] = None
    return ZeroEncoder(), {"vqgan_sha256": ""}
pre_tokenize.ItemProcessor.process_item = process_item
pre_tokenize.load_encoder = load_encoder
sys.exit(pre_tokenize.main(sys.argv[1:]))
"""
    argv = arguments(task, tmp_path, num_workers=2)
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, env=environment(), capture_output=True)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "0-of-1-failed.jsonl").read_text().count("torch: False") == 30


@pytest.mark.parametrize(
    "device, target_size, batch_size, window_items",
    [("cpu", 64, 16, 128), ("cpu", 256, 4, 32), ("cpu", 768, 1, 8)]
    + [("cuda", 64, 64, 256), ("cuda", 512, 27, 256), ("cuda", 768, 12, 256), ("cuda", 1536, 3, 64)],
)
def test_batches_and_windows_depend_on_target_size_and_kind_of_device(device, target_size, batch_size, window_items):
    assert default_batch_size(target_size, device, is_fused=True) == batch_size
    for given in (batch_size, None):
        assert default_window_items(target_size, device, given) == window_items
    assert default_batch_size(768, "cuda") == 3
    # On a GPU another batch does not move the windows.
    assert default_window_items(target_size, "cuda", 5) == default_window_items(target_size, "cuda", 7)


@pytest.mark.parametrize("cores, splits, expected", [(16, 1, 16), (96, 8, 12), (96, 1, 16), (8, 8, 2), (2, 1, 2)])
def test_the_loaders_of_a_gpu_share_the_cores_of_the_process(monkeypatch, cores, splits, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert default_num_workers("cuda", splits) == expected
    assert default_num_workers("cpu", splits) == 2


def test_progress_says_who_is_busy_and_how_fast_of_late(monkeypatch, capsys):
    # The first window was slow. It is not among the last 10 seconds.
    marks = [(8, 10, 6, 1), (16, 20, 12, 2), (20, 420, 13.4, 5.92), (26, 520, 15.5, 11.8)]
    times = iter([0, *(seconds for seconds, *_ in marks)])
    monkeypatch.setattr("pre_tokenize.progress.time", SimpleNamespace(perf_counter=lambda: next(times)))
    with Progress("rank 0 of 1", total=900, done=100, position=0) as progress:
        for _, images, loading_s, encoding_s in marks:
            progress.show(100 + images, 2, images, loading_s, encoding_s)
        progress.display()
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"rank 0 of 1: 620/900 items, loading 35% \| encoding 98%, 50.0 images/s, 2 rejected, \S+ left", last
    )


def test_the_next_window_is_begun_before_the_last_is_fetched_on_a_gpu():
    done = []

    class Encoder:
        def __init__(self, device_type: str):
            self.device = type("Device", (), {"type": device_type})

        def begin(self, images):
            done.append(f"begin {len(images)}")
            return lambda: done.append(f"fetch {len(images)}") or [np.zeros((2, 2))] * len(images)

    windows = [[PreparedItem(0, (), (Image.new("RGB", (32, 32)),) * count)] for count in (1, 2, 3)]
    for device, expected in (
        ("cpu", ["begin 1", "fetch 1", "begin 2", "fetch 2", "begin 3", "fetch 3"]),
        ("cuda", ["begin 1", "begin 2", "fetch 1", "begin 3", "fetch 2", "fetch 3"]),
    ):
        done.clear()
        pairs = list(encode_windows(Encoder(device), iter(windows), Stopwatch()))
        assert done == expected
        assert [window for window, _ in pairs] == windows and [len(codes) for _, codes in pairs] == [1, 2, 3]
