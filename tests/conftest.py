"""What all tests share: a temporary folder of the session's own, also for the processes that tests start."""

import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory):
    """Indices of records are kept in the temporary folder of the node; those of tests must not stay there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)
        yield
