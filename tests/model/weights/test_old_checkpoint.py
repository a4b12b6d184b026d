"""`golden/run`: checkpoints of step 3 that commit 3c38ea1 wrote on the small task, by a decoder of one layer.

`full/` trained every weight. `adapters/` trained LoRA and the image rows, beside a `starting_point/` of zeroed rows.
"""

import shutil

import pytest
import torch

from model.weights.load import load_pretrained
from tests.helpers.small_run import ROOT, call_main, losses, solver_args

ADAPTERS = {"lora_rank": 2, "train_only": "image_head", "image_head_init": "zero"}
# Logits of 3c38ea1 for the tokens 40 to 59 (the last, every fortieth), and its losses of steps 4 to 6.
LOGITS = {
    "full": [-0.0280632, 0.0913348, -0.0815752, 0.0030104, -0.0438474],
    "adapters": [0.0134187, 0.0028607, -0.0384258, -0.0007921, -0.0122080],
}
LOSSES = {
    "full": {4: 5.29302876180013, 5: 5.261072420200893, 6: 5.251674204182943},
    "adapters": {4: 5.286730612182617, 5: 5.294363888096401, 6: 5.303175894266764},
}


@pytest.mark.parametrize("name", LOGITS)
def test_a_checkpoint_of_3c38ea1_loads(name):
    model = load_pretrained(ROOT / "tests/golden/run" / name / "epoch0-iter3")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(40, 60)[None]).logits[0, -1, :200:40]
    assert logits.tolist() == pytest.approx(LOGITS[name], abs=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_checkpoint_of_3c38ea1_resumes(small_task, tmp_path, name):
    if name == "adapters":
        pytest.importorskip("peft")
    shutil.copytree(ROOT / "tests/golden/run" / name, tmp_path / "out")
    changes = ADAPTERS if name == "adapters" else {}
    assert call_main(solver_args(small_task, tmp_path / "out", max_steps=6, **changes)) == (0, "")
    assert losses(tmp_path / "out") == pytest.approx(LOSSES[name], rel=1e-5)
