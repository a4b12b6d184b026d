"""The processes that load images: they give what one process gives, heed no signal, and die with their worker."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.item_processor import PreparedItem
from pre_tokenize.loading import Refused, check_can_be_sent, prepare_windows
from pre_tokenize.pre_tokenize import encode_windows
from pre_tokenize.pre_tokenize import main as pre_tokenize
from tests import forked
from tests.test_item_processor import tiny_processor  # noqa: F401  (a fixture)
from tests.test_pre_tokenize import SCRIPT, arguments, task  # noqa: F401  (fixtures)
from tests.tokenize_helpers import command, environment, snapshot, write_items

NUM_ITEMS = 60


def items_of(folder: Path, num_items: int) -> list[tuple[int, dict]]:
    Image.new("RGB", (50, 40), (200, 30, 30)).save(folder / "a.png")
    turns = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|>"}]
    paths = [str(folder / ("gone.png" if number == 3 else "a.png")) for number in range(num_items)]
    return list(enumerate({"conversations": turns, "image": path} for path in paths))


def test_windows_are_the_same_with_and_without_processes(tiny_processor, tmp_path):  # noqa: F811
    items = items_of(tmp_path, 7)
    alone = list(prepare_windows(items, tiny_processor, 3, num_workers=0, max_seq_len=90))
    assert [len(window) for window in alone] == [3, 3, 1]
    assert isinstance(alone[1][0], Refused) and isinstance(alone[0][0], PreparedItem)
    assert list(prepare_windows(items, tiny_processor, 3, num_workers=2, max_seq_len=90)) == alone
    assert tiny_processor.image_encode is not None


def test_a_processor_that_cannot_be_sent_is_refused_with_the_way_out(tiny_processor):  # noqa: F811
    check_can_be_sent(tiny_processor)
    tiny_processor.text_encode = lambda text: [1]
    with pytest.raises(ValueError, match="cannot be sent to the processes that load images .*--num_workers 0"):
        check_can_be_sent(tiny_processor)


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


# Real workers with loader processes


@pytest.fixture(scope="module")
def long_task(task, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("long")
    for name in ("tokenizer", "vqgan"):
        (folder / name).symlink_to(task / name)
    write_items(folder, NUM_ITEMS)
    return folder


@pytest.fixture
def start():
    """A function that starts a worker in a process group of its own; none outlives its test."""
    workers = []

    def start_worker(*args: str) -> forked.Popen:
        workers.append(forked.Popen(command(SCRIPT, *args), environment(), start_new_session=True))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.kill()
        worker.wait()


def loaders_of(worker: forked.Popen) -> list[int]:
    """Pids of the loader processes of a worker that is writing items."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_items(worker: forked.Popen, out: Path, count: int = 1) -> None:
    while worker.poll() is None and len(list(out.glob("files/*.pkl"))) < count:
        time.sleep(0.002)
    assert worker.poll() is None, worker.communicate()[1]


@pytest.mark.slow
def test_loaders_die_with_their_killed_parent_and_keep_no_lock(long_task, tmp_path, start):
    calm, out = tmp_path / "calm", tmp_path / "out"
    worker = start(*arguments(long_task, out, batch_size=1, num_workers=3))
    wait_for_items(worker, out)
    loaders = loaders_of(worker)
    assert len(loaders) == 3
    worker.kill()
    worker.communicate()
    assert pre_tokenize(arguments(long_task, out, batch_size=1)) == 0  # not refused for a lock that a loader keeps
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in loaders) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in loaders if Path(f"/proc/{pid}").exists()]
    assert pre_tokenize(arguments(long_task, calm, batch_size=1, num_workers=0)) == 0
    assert snapshot(out) == snapshot(calm)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_ends_the_worker_alone_and_cleanly(long_task, tmp_path, start):
    out = tmp_path / "out"
    worker = start(*arguments(long_task, out, batch_size=1))
    wait_for_items(worker, out)
    loaders = loaders_of(worker)
    os.killpg(worker.pid, signal.SIGTERM)
    _, message = worker.communicate(timeout=60)
    assert worker.returncode == 143, message
    assert "ended by SIGTERM" in message and "Traceback" not in message and "killed" not in message
    assert len(list(out.glob("files/*.pkl"))) % 8 == 0
    assert not [pid for pid in loaders if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_killed_loader_ends_the_worker_with_a_message_and_loses_nothing(long_task, tmp_path, start):
    out = tmp_path / "out"
    worker = start(*arguments(long_task, out, batch_size=1))
    wait_for_items(worker, out)
    os.kill(loaders_of(worker)[0], signal.SIGKILL)
    _, message = worker.communicate(timeout=60)
    assert worker.returncode == 1, message
    assert "a process that loads images was killed" in message and "Traceback" not in message
    assert pre_tokenize(arguments(long_task, out, batch_size=1)) == 0
    assert len(list(out.glob("files/*.pkl"))) == NUM_ITEMS
