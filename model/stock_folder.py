"""
The config.json of either shape of checkpoint, and the processor's files that stock transformers needs beside weights.

`model/convert.py` calls it; `AutoProcessor` and `pipeline("image-text-to-text")` take what `--shape hf` writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from data.item_processor import load_text_tokenizer
from data.vocab import BEGIN_IMAGE, BOS, END_IMAGE, END_OF_TURN
from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.image_head import EXPORT_MARK, STOCK_ARCHITECTURE
from model.weight_files import write_text_file

SHAPES = ("xllmx", "hf")
# Chameleon's published vocabularies call the same token by either name; stock transformers knows the first alone.
IMAGE, RESERVED_IMAGE = "<image>", "<reserved08707>"
PROCESSOR_NAME = "processor_config.json"


def config_values(config: ChameleonXLLMXConfig, shape: str, is_trained: bool) -> dict[str, Any]:
    """The config.json of a checkpoint in the given shape; `is_trained`: its image rows are not stock Chameleon's."""
    if shape not in SHAPES:
        raise ValueError(f"the shape of a checkpoint is {shape!r}; it must be one of {', '.join(SHAPES)}.")
    values = config.to_dict()
    for name in ("_name_or_path", EXPORT_MARK):
        values.pop(name, None)
    if shape == "xllmx":
        return values | {"architectures": [ChameleonXLLMXForConditionalGeneration.__name__]}
    for ours in ("dropout", "z_loss_weight", "mask_image_logits", "tie_head_norm", "model_type"):
        values.pop(ours, None)
    values["vocabulary_map"] = name_image_token(values["vocabulary_map"] or {})
    return values | {"architectures": [STOCK_ARCHITECTURE]} | ({EXPORT_MARK: True} if is_trained else {})


def name_image_token(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """{name: id} in which `<image>` is the name of the token that is reserved for it."""
    if IMAGE in vocabulary:
        return dict(vocabulary)
    return {IMAGE if name == RESERVED_IMAGE else name: token_id for name, token_id in vocabulary.items()}


def write_processor_files(folder: Path) -> None:
    """
    Adds to a folder in stock's shape what its processor and `generate` need, and changes its tokenizer to fit.

    Nothing is written where the tokenizer is missing or has another token for `<image>` than the model, or none.
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
    write_text_file(path, json.dumps(raw, ensure_ascii=False))

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
    _write_json(folder / "preprocessor_config.json", _image_processor(side))
    processor = {"processor_class": "ChameleonProcessor", "image_token": IMAGE}
    _write_json(folder / PROCESSOR_NAME, processor | {"image_seq_length": (side // downsampling) ** 2})
    ids = {"bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"]}
    GenerationConfig(**ids, eos_token_id=tokenizer.sep_token_id).save_pretrained(folder)


def _image_processor(side: int) -> dict[str, Any]:
    """Images of `side` x `side` pixels in [-1, 1], as the VQGAN of the training took them."""
    return {
        "image_processor_type": "ChameleonImageProcessor",
        "processor_class": "ChameleonProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 1,  # Lanczos
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 2 / 255,
        "do_normalize": True,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text_file(path, json.dumps(values, indent=2) + "\n")
