"""Writing a checkpoint in either shape, with the VQGAN of its start and the files that stock transformers needs.

Saves and `model/convert.py` call it. `AutoProcessor` and `pipeline("image-text-to-text")` load the shape "hf".
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import ChameleonConfig, GenerationConfig

from data.items.item_processor import load_text_tokenizer
from data.items.vocab import BEGIN_IMAGE, BOS, END_IMAGE, END_OF_TURN
from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.vqgan.vqgan import HF_PREFIX
from model.weights.adapter_folder import open_weights
from model.weights.load import regroup_head_norm
from model.weights.weight_files import MAX_FILE_BYTES, WeightReader, write_weights

SHAPES = ("xllmx", "hf")
# Two names of one token in Chameleon's published vocabularies; stock transformers knows only the first.
IMAGE, RESERVED_IMAGE = "<image>", "<reserved08707>"
PROCESSOR_NAME = "processor_config.json"
STOCK_ARCHITECTURE = "ChameleonForConditionalGeneration"
# In the config.json of our exports in stock's shape: their image rows may be trained, those of stock Chameleon are not.
EXPORT_MARK = "is_xllmx_export"


def export_tensors(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    get: Callable[[str], torch.Tensor],
    config: ChameleonXLLMXConfig,
    out_dir: str | os.PathLike,
    vqgan: Mapping[str, torch.Tensor],
    shape: str = "xllmx",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """
    Write config.json and safetensors of a checkpoint, from full tensors, into a folder.

    Args:
        shapes: shape and type of every parameter, by name.
        get: gives a parameter when it is its turn.
        vqgan: the VQGAN's tensors by name, which keep their type; the shape "hf" needs them.
        shape: one of SHAPES.
        max_file_bytes: see `write_weights`.
    """
    if shape == "hf" and not vqgan:
        raise ValueError(
            "the hf shape holds the VQGAN, and there is none in the source: give its folder (--vqgan_dir). Only "
            "what was started from a checkpoint with a VQGAN carries it along."
        )
    num_rows = {}
    if shape == "hf":
        num_rows = {".q_norm.": config.num_attention_heads, ".k_norm.": config.num_key_value_heads}
    tensors = {}
    for name, (size, dtype) in shapes.items():
        rows = next((rows for part, rows in num_rows.items() if part in name), size[0])
        tensors[name] = torch.empty(rows, *size[1:], dtype=dtype, device="meta")

    def get_out(name: str) -> torch.Tensor:
        return vqgan[name] if name in vqgan else regroup_head_norm(name, get(name), tensors[name].shape[0])

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    tensors |= {name: tensor.to("meta") for name, tensor in vqgan.items()}
    write_weights(out_dir, tensors, get_out, max_file_bytes)
    write_config(config, Path(out_dir), tensors["lm_head.weight"].dtype, shape)


def carried_vqgan(config: ChameleonXLLMXConfig) -> dict[str, torch.Tensor]:
    """
    The VQGAN's tensors, by name, of the folder that a configuration was read from; empty without a VQGAN.

    In memory (0.1 GiB for Chameleon's): that folder may be a checkpoint which the training removes.
    """
    if not (config.name_or_path and Path(config.name_or_path).is_dir()):
        return {}
    return {name: tensor.clone() for name, tensor in stored_vqgan(open_weights(config.name_or_path)).items()}


def stored_vqgan(reader: WeightReader) -> dict[str, torch.Tensor]:
    """The VQGAN's tensors of a checkpoint, by name; empty without a VQGAN."""
    return {name: reader.read(name) for name in reader.names if name.startswith(HF_PREFIX)}


def is_stock(config: ChameleonXLLMXConfig) -> bool:
    """Whether a configuration was read from stock Chameleon, not from an export of ours in its shape."""
    return STOCK_ARCHITECTURE in (config.architectures or []) and not getattr(config, EXPORT_MARK, False)


def write_config(config: ChameleonXLLMXConfig, folder: Path, dtype: torch.dtype, shape: str = "xllmx") -> None:
    """Write the config.json of a checkpoint in one of SHAPES. `dtype`: of the weights beside it."""
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
    values |= {"architectures": [STOCK_ARCHITECTURE]} | ({} if is_stock(config) else {EXPORT_MARK: True})
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
    processor = {"processor_class": "ChameleonProcessor", "image_token": IMAGE}
    processor |= {"image_seq_length": (side // downsampling) ** 2}
    for name, values in (("preprocessor_config.json", classes | pixels), (PROCESSOR_NAME, processor)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    ids = {"bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"]}
    GenerationConfig(**ids, eos_token_id=tokenizer.sep_token_id).save_pretrained(folder)
