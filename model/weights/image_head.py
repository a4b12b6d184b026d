"""Rows of `lm_head` of the image tokens, where a training starts.

The recipe starts from a model that writes text alone, with these rows zeroed. Other ways: keep the rows, as a trained
model needs, or draw them from a normal distribution. `open_weights` (model/weights/adapter_folder.py) calls
`set_image_rows`.
"""

import torch

from model.decoder.chameleon import ChameleonXLLMXConfig, build_model
from model.weights.hf_folder import load_config
from model.weights.weight_files import WeightReader

IMAGE_HEAD_INITS = ("zero", "keep", "normal")
HEAD = "lm_head.weight"
STOCK_ARCHITECTURE = "ChameleonForConditionalGeneration"
# In the config.json of our exports in stock's shape: their image rows may be trained, those of stock Chameleon are not.
EXPORT_MARK = "is_xllmx_export"


def default_image_head_init(config: ChameleonXLLMXConfig, shape: str) -> str:
    """What a conversion to `shape` does with the image rows: "zero" from stock Chameleon to "xllmx", else "keep"."""
    return "zero" if shape == "xllmx" and is_stock(config) else "keep"


def is_stock(config: ChameleonXLLMXConfig) -> bool:
    """Whether a configuration was read from stock Chameleon, not from an export of ours in its shape."""
    return STOCK_ARCHITECTURE in (config.architectures or []) and not getattr(config, EXPORT_MARK, False)


def image_token_ids(config: ChameleonXLLMXConfig) -> torch.Tensor:
    """Sorted int64 ids of the image tokens of a configuration."""
    # On meta: no weights are made.
    return build_model(config).image_token_ids(torch.device("cpu"))


def set_image_rows(reader: WeightReader, image_head_init: str, seed: int) -> None:
    """
    Makes a reader give `lm_head` with reinitialized image rows.

    Args:
        image_head_init: "keep"; "zero"; or "normal", drawn from normal(0, `initializer_range`) by `seed`.

    Raises:
        ValueError: another `image_head_init`, or no image tokens in the vocabulary of the configuration.
    """
    if image_head_init not in IMAGE_HEAD_INITS:
        raise ValueError(f"image_head_init must be one of {', '.join(IMAGE_HEAD_INITS)}, got {image_head_init!r}.")
    if image_head_init == "keep":
        return
    config = load_config(reader.folder)
    ids = image_token_ids(config)
    if not len(ids):
        raise ValueError(
            f"the vocabulary_map in {reader.folder / 'config.json'} names no image tokens (IMGIMG...), whose rows of "
            f"lm_head are to be reinitialized ({image_head_init}); keep them as they are: --image_head_init keep."
        )

    def reinitialize(head: torch.Tensor) -> torch.Tensor:
        # All rows at once, on every rank: the values do not depend on how ranks share the head.
        rows = torch.zeros(len(ids), head.shape[1])
        if image_head_init == "normal":
            rows.normal_(0.0, config.initializer_range, generator=torch.Generator().manual_seed(seed))
        return head.index_copy(0, ids, rows.to(head.dtype))

    reader.change(HEAD, reinitialize)
