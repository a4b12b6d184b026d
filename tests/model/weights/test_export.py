"""Folders for stock transformers: the processor, a pipeline, and the auto classes, on the reference tokenizer."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    ChameleonForConditionalGeneration,
    pipeline,
)

from data.items.item_processor import load_text_tokenizer
from model.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.convert import main
from model.decoder.chameleon import build_config, build_model
from model.vqgan.vqgan import VQGAN, image_to_pixels, save_vqgan
from model.weights.load import load_pretrained
from tests.helpers.decoder_helpers import seed_weights, small_config, small_model, write_small_tokenizer
from tests.helpers.small_run import export_hf
from tests.helpers.tokenize_helpers import write_reference_tokenizer
from tests.model.weights.test_convert import same_parameters

# Pixels of the VQGAN: an image has 16 codes.
SIDE = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`raw/`, a checkpoint with the reference tokenizer, `vqgan/`, and `hf/`, which the command made of them."""
    root = tmp_path_factory.mktemp("stock")
    tokenizer = load_text_tokenizer(write_reference_tokenizer(root / "tokenizer"))
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vq_config = small_config().vq_config.to_dict() | {"num_embeddings": 64, "resolution": SIDE}
    config = build_config("tiny", tokenizer, **shape, num_key_value_heads=2, vq_config=vq_config)
    export_hf(seed_weights(build_model(config, "cpu"), 0.1), config, root / "raw", root / "tokenizer")
    save_vqgan(VQGAN(config.vq_config), root / "vqgan", torch.float32)
    command = [str(root / "raw"), str(root / "hf"), "--shape", "hf", "--vqgan_dir", str(root / "vqgan")]
    assert main(command) == 0
    return root


@pytest.mark.slow
def test_auto_processor_makes_what_the_model_takes(folders):
    processor = AutoProcessor.from_pretrained(folders / "hf")
    image = Image.effect_noise((100, SIDE), 80).convert("RGB")
    inputs = processor(images=image, text="What is it?<image>", return_tensors="pt")
    tokenizer = load_text_tokenizer(folders / "tokenizer")
    encode, ids = tokenizer.backend_tokenizer.encode, tokenizer.convert_tokens_to_ids
    span = [ids("<racm3:break>"), *[ids("<reserved08707>")] * 16, ids("<eoss>")]
    text = encode("What is it?", add_special_tokens=False).ids
    assert inputs["input_ids"][0].tolist() == [ids("<s>"), *text, *span, ids("<reserved08706>")]
    left = (100 - SIDE) // 2
    cropped = image_to_pixels(image.crop((left, 0, left + SIDE, SIDE)))
    torch.testing.assert_close(inputs["pixel_values"][0], cropped, rtol=0, atol=1e-5)
    stock = AutoModelForImageTextToText.from_pretrained(folders / "hf")
    # Registering ours does not replace the stock class.
    assert type(stock) is ChameleonForConditionalGeneration
    with torch.no_grad():
        assert stock(**inputs).logits.isfinite().all()


@pytest.mark.slow
def test_a_pipeline_answers_about_an_image(folders):
    pipe = pipeline("image-text-to-text", model=str(folders / "hf"))
    image = Image.effect_noise((100, 80), 80).convert("RGB")
    answer = pipe(text="<image>What is it?", images=image, max_new_tokens=3)[0]["generated_text"]
    assert answer.startswith("<image>What is it?")
    assert pipe.model.generation_config.eos_token_id == pipe.tokenizer.convert_tokens_to_ids("<reserved08706>")


@pytest.mark.slow
def test_a_raw_checkpoint_is_loaded_by_the_auto_classes(folders, tmp_path):
    assert type(AutoConfig.from_pretrained(folders / "raw")) is ChameleonXLLMXConfig
    found = AutoModelForCausalLM.from_pretrained(folders / "raw", device_map="cpu", trust_remote_code=False)
    assert type(found) is ChameleonXLLMXForConditionalGeneration
    assert same_parameters(found, load_pretrained(folders / "raw"))
    assert AutoModelForCausalLM.from_pretrained(folders / "raw", dtype="bfloat16").dtype == torch.bfloat16
    # Older checkpoints have stock's model type.
    shutil.copytree(folders / "raw", tmp_path / "old")
    values = json.loads((tmp_path / "old" / "config.json").read_text())
    assert values["model_type"] == "chameleon_xllmx"
    (tmp_path / "old" / "config.json").write_text(json.dumps(values | {"model_type": "chameleon"}))
    assert same_parameters(found, ChameleonXLLMXForConditionalGeneration.from_pretrained(tmp_path / "old"))


def test_the_processor_needs_a_token_for_images(folders, tmp_path, capsys):
    """The small vocabulary has `<image>`; another one has neither of its names, and the command says so."""
    write_small_tokenizer(tmp_path / "tokenizer")
    save_vqgan(VQGAN(small_config().vq_config), tmp_path / "vqgan", torch.float32)
    for name, has_token in (("with", True), ("without", False)):
        model = small_model()
        if not has_token:
            model.config.vocabulary_map.pop("<image>")
        export_hf(model, model.config, tmp_path / name, tmp_path / "tokenizer")
        out = tmp_path / f"{name}-hf"
        assert main([str(tmp_path / name), str(out), "--shape", "hf", "--vqgan_dir", str(tmp_path / "vqgan")]) == 0
        assert (out / "processor_config.json").is_file() == has_token
        assert ("without a processor" in capsys.readouterr().out) != has_token
