"""`golden/dataset`: an output folder that commit 3c38ea1 wrote (two token files, a shard of two items, one reject)."""

import shutil
from pathlib import Path

from data.formats.manifest import Manifest, load_manifest
from data.formats.record import read_record
from data.formats.record_index import open_index
from data.formats.token_file import load_token_file
from pre_tokenize.out_folder import settle_manifest
from pre_tokenize.worker_log import WorkerLog, read_failed

GOLDEN = Path(__file__).parents[2] / "golden" / "dataset"


def test_a_dataset_of_before_loads_and_resumes(tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(GOLDEN, folder)
    for name in ("record.json", "0-of-1-record.jsonl"):
        index = open_index(folder / name, tmp_path / "cache")
        assert [entry.len for entry in read_record(folder / name)] == index.lens.tolist() == [3] * 4
        assert index.image_lens.tolist() == [0, 2, 0, 0]
        items = [load_token_file(*index.place(i), expected_len=3, num_ids=65536) for i in range(4)]
        assert [(item.id, item.token.tolist(), item.label.tolist()) for item in items] == [
            (i, [i, 7, 65535], [-100, 7, 65535]) for i in range(4)
        ]
    manifest = Manifest(**{**load_manifest(folder), "codebook_sha256": "of a field that it lacks"})
    with settle_manifest(folder, manifest), WorkerLog(folder, rank=0, splits=1, first_id=0, stop_id=6) as log:
        log.recover()
    assert (log.num_good, log.num_rejected, log.next_id) == (4, 1, 5)
    assert list(read_failed(folder / "0-of-1-failed.jsonl")) == [(4, "no image")]
    for path in filter(Path.is_file, GOLDEN.rglob("*")):
        assert (folder / path.relative_to(GOLDEN)).read_bytes() == path.read_bytes()
