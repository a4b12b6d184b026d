"""The processes that load images: they give what one process gives, and end with an error if one is killed."""

import multiprocessing
from concurrent.futures import BrokenExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.items.item_processor import PreparedItem
from pre_tokenize.loading import Rejected, prepare_windows
from pre_tokenize.pre_tokenize import encode_windows
from tests.data.items.test_item_processor import tiny_processor  # noqa: F401  (a fixture)


def items_of(folder: Path, num_items: int) -> list[tuple[int, dict]]:
    Image.new("RGB", (50, 40), (200, 30, 30)).save(folder / "a.png")
    turns = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|>"}]
    paths = [str(folder / ("gone.png" if number == 3 else "a.png")) for number in range(num_items)]
    return list(enumerate({"conversations": turns, "image": path} for path in paths))


def test_windows_are_the_same_with_and_without_processes(tiny_processor, tmp_path):  # noqa: F811
    items = items_of(tmp_path, 7)
    alone = list(prepare_windows(items, tiny_processor, 3, num_workers=0, max_seq_len=90))
    assert [len(window) for window in alone] == [3, 3, 1]
    assert isinstance(alone[1][0], Rejected) and isinstance(alone[0][0], PreparedItem)
    assert list(prepare_windows(items, tiny_processor, 3, num_workers=2, max_seq_len=90)) == alone
    assert tiny_processor.image_encode is not None


@pytest.mark.slow
def test_a_killed_process_ends_the_windows(tiny_processor, tmp_path):  # noqa: F811
    windows = prepare_windows(items_of(tmp_path, 30), tiny_processor, 3, num_workers=2)
    next(windows)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(BrokenExecutor):
        list(windows)
    assert not multiprocessing.active_children()


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
        pairs = list(encode_windows(Encoder(device), iter(windows)))
        assert done == expected
        assert [window for window, _ in pairs] == windows and [len(codes) for _, codes in pairs] == [1, 2, 3]
