"""The config.json of either shape of checkpoint, and the processor's files for stock transformers.

`model/convert.py` calls both. `AutoProcessor` and `pipeline("image-text-to-text")` load what `--shape hf` writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import ChameleonConfig, GenerationConfig

from data.items.item_processor import load_text_tokenizer
from data.items.vocab import BEGIN_IMAGE, BOS, END_IMAGE, END_OF_TURN
from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.weights.image_head import EXPORT_MARK, STOCK_ARCHITECTURE

SHAPES = ("xllmx", "hf")
# Two names of one token in Chameleon's published vocabularies; stock transformers knows only the first.
IMAGE, RESERVED_IMAGE = "<image>", "<reserved08707>"
PROCESSOR_NAME = "processor_config.json"


def write_config(
    config: ChameleonXLLMXConfig, folder: Path, dtype: torch.dtype, shape: str = "xllmx", is_trained: bool = True
) -> None:
    """
    Write the config.json of a checkpoint in the given shape.

    Args:
        dtype: of the weights beside it.
        is_trained: whether the image rows may differ from those of stock Chameleon.
    """
    values = config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    for name in ("_name_or_path", EXPORT_MARK):
        values.pop(name, None)
    if shape == "xllmx":
        values["architectures"] = [ChameleonXLLMXForConditionalGeneration.__name__]
        ChameleonXLLMXConfig.from_dict(values).save_pretrained(folder)
        return
    for ours in ("dropout", "z_loss_weight", "mask_image_logits", "tie_head_norm", "model_type"):
        values.pop(ours, None)
    values["vocabulary_map"] = name_image_token(values["vocabulary_map"] or {})
    values |= {"architectures": [STOCK_ARCHITECTURE]} | ({EXPORT_MARK: True} if is_trained else {})
    ChameleonConfig.from_dict(values).save_pretrained(folder)


def name_image_token(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """{name: id} in which `<reserved08707>` is renamed to `<image>`."""
    if IMAGE in vocabulary:
        return dict(vocabulary)
    return {IMAGE if name == RESERVED_IMAGE else name: token_id for name, token_id in vocabulary.items()}


def write_processor_files(folder: Path) -> None:
    """
    Add the files of stock's processor and `generate` to a folder in stock's shape, and adapt its tokenizer.

    Writes nothing where the tokenizer is missing, or its id of `<image>` is not the model's.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    path, image_id = folder / "tokenizer.json", config["vocabulary_map"].get(IMAGE)
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model": {"vocab": {}}}
    vocabulary = raw["model"]["vocab"] = name_image_token(raw["model"]["vocab"])
    if image_id is None or vocabulary.get(IMAGE) != image_id:
        return
    for token in raw["added_tokens"]:
        if token["id"] == image_id:
            token["content"] = IMAGE
    path.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")

    tokenizer = load_text_tokenizer(folder)
    names = (IMAGE, BEGIN_IMAGE, END_IMAGE, END_OF_TURN)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
    tokenizer.bos_token, tokenizer.sep_token = BOS, END_OF_TURN
    if tokenizer("").input_ids != [tokenizer.bos_token_id]:
        bos = [(BOS, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{BOS} $A", special_tokens=bos)
    tokenizer.save_pretrained(folder)

    vq_config = config["vq_config"]
    side, downsampling = vq_config["resolution"], 2 ** (len(vq_config["channel_multiplier"]) - 1)
    # The class's defaults, but for the side and the exact scale: pixels in [-1, 1], the range of the VQGAN's input.
    pixels = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "rescale_factor": 2 / 255}
    classes = {"image_processor_type": "ChameleonImageProcessor", "processor_class": "ChameleonProcessor"}
    _write_json(folder / "preprocessor_config.json", classes | pixels)
    processor = {"processor_class": "ChameleonProcessor", "image_token": IMAGE}
    _write_json(folder / PROCESSOR_NAME, processor | {"image_seq_length": (side // downsampling) ** 2})
    ids = {"bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"]}
    GenerationConfig(**ids, eos_token_id=tokenizer.sep_token_id).save_pretrained(folder)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
