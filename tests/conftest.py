"""What all tests share: a temporary folder of the session's own, also for the processes that tests start."""

import contextlib
import multiprocessing.util
import os
import tempfile

import pytest

# A GPU machine may be without hypothesis; no test marked `gpu` needs it.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # The same examples in every run: a test that fails today fails tomorrow.
    settings.register_profile("same", derandomize=True)
    settings.load_profile("same")

# Sums depend on the number of threads in their last bit, and threads that wait for each other make small models slow
# on a busy machine. Set before torch is imported, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

# Triton's kernels run on a CPU by its interpreter: set before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from data.formats.record import read_record, write_merged  # noqa: E402
from tests.helpers.browser_helpers import start_browser  # noqa: E402
from tests.helpers.small_run import call_main, solver_args, write_small_task  # noqa: E402


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory):
    """Indices of records are kept in the temporary folder of the node; those of tests must not stay there."""
    # The server of `tests.helpers.forked` outlives the session's folder.
    multiprocessing.util.get_temp_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session")
def small_task(tmp_path_factory):
    """The folder of `write_small_task`, which no test may change."""
    folder = tmp_path_factory.mktemp("small_task")
    write_small_task(folder)
    return folder


@pytest.fixture(scope="session")
def trained(small_task, tmp_path_factory):
    """The output folder of a training of the small task, 24 steps of 2 epochs, which no test may change."""
    output_dir = tmp_path_factory.mktemp("trained") / "runs" / "first"
    assert call_main(solver_args(small_task, output_dir)) == (0, "")
    return output_dir


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def two_types(tmp_path_factory):
    """A small task whose items are in two records, of the types `text` and `images`; no test may change it."""
    folder = tmp_path_factory.mktemp("two_types")
    write_small_task(folder)
    entries = list(read_record(folder / "record.json"))
    for name, has_image in (("text", False), ("images", True)):
        write_merged([entry for entry in entries if bool(entry.image_len) == has_image], folder / f"{name}.json")
    lines = [f"  - {{path: {name}.json, type: {name}}}\n" for name in ("text", "images")]
    (folder / "data.yaml").write_text("META:\n" + "".join(lines))
    return folder
