"""A small seeded checkpoint with its tokenizer and VQGAN, and the solver on it. No test may change the folders."""

from pathlib import Path

import pytest
import torch

from inference_solver import FlexARInferenceSolver
from model.vqgan.vqgan import VQGAN, save_vqgan
from tests.helpers.decoder_helpers import small_config, small_model, write_small_tokenizer
from tests.helpers.small_run import export_hf


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """`tokenizer/`, `checkpoint/` (a decoder of 2 layers, width 64) and `vqgan/`."""
    root = tmp_path_factory.mktemp("inference")
    write_small_tokenizer(root / "tokenizer")
    model = small_model(scale=0.3)
    export_hf(model, model.config, root / "checkpoint", root / "tokenizer")
    torch.manual_seed(0)
    save_vqgan(VQGAN(small_config().vq_config), root / "vqgan", torch.float32)
    return root


@pytest.fixture(scope="session")
def solver(folders) -> FlexARInferenceSolver:
    flags = {"target_size": 64, "vqgan_dir": folders / "vqgan", "device": "cpu"}
    return FlexARInferenceSolver(str(folders / "checkpoint"), "fp32", **flags)
