"""
The rows of `lm_head` of image tokens where a training starts.

Where it stands: between the weights on disk and `open_weights` (model/adapter_folder.py). The recipe starts from a
model that writes text alone, with these rows zeroed; the other ways are to keep them, as a trained model needs, or to
draw them from a normal distribution.
"""

import torch

from model.decoder.chameleon import ChameleonXLLMXConfig, build_model
from model.hf_folder import load_config
from model.weight_files import ChangedReader, WeightReader

IMAGE_HEAD_INITS = ("zero", "keep", "normal")
HEAD = "lm_head.weight"
STOCK_ARCHITECTURE = "ChameleonForConditionalGeneration"
# Set in the config.json of our exports in stock's shape: their image rows may be trained, Chameleon's own are not.
EXPORT_MARK = "is_xllmx_export"


def default_image_head_init(config: ChameleonXLLMXConfig, shape: str) -> str:
    """How a checkpoint with this configuration is converted to `shape` unless told: "zero" or "keep".

    Zeroed where stock Chameleon becomes a start of training. What has been trained is never touched.
    """
    return "zero" if shape == "xllmx" and is_stock(config) else "keep"


def is_stock(config: ChameleonXLLMXConfig) -> bool:
    """Whether a configuration was read from stock Chameleon, not from an export of ours in its shape."""
    return STOCK_ARCHITECTURE in (config.architectures or []) and not getattr(config, EXPORT_MARK, False)


def image_token_ids(config: ChameleonXLLMXConfig) -> torch.Tensor:
    """Sorted int64 ids of the image tokens of a configuration."""
    return build_model(config).image_token_ids(torch.device("cpu"))  # on meta: no weights


class ImageHeadReader(ChangedReader):
    """
    Reads weights with the image rows of `lm_head` reinitialized; what else is in them stays as it is.

    Args:
        image_head_init: "zero", or "normal": drawn from normal(0, `initializer_range`) by `seed`.

    Raises:
        ValueError: another `image_head_init`, or no image tokens in the vocabulary of the configuration.
    """

    def __init__(self, base: WeightReader, image_head_init: str, seed: int):
        super().__init__(base)
        if image_head_init not in IMAGE_HEAD_INITS:
            raise ValueError(f"image_head_init must be one of {', '.join(IMAGE_HEAD_INITS)}, got {image_head_init!r}.")
        config = load_config(base.folder)
        self._ids, self._seed = image_token_ids(config), seed
        self._std = config.initializer_range if image_head_init == "normal" else 0.0
        if not len(self._ids):
            raise ValueError(
                f"the vocabulary_map in {base.folder / 'config.json'} names no image tokens (IMGIMG...), whose rows of "
                f"lm_head are to be reinitialized ({image_head_init}); keep them as they are: --image_head_init keep."
            )

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        tensor = self._base.read(name, part)
        if name != HEAD:
            return tensor
        num_rows, width = self.shape(name)
        rows = torch.zeros(len(self._ids), width)
        if self._std:  # all of them, whatever the part: the values do not depend on how ranks share the head
            rows.normal_(0.0, self._std, generator=torch.Generator().manual_seed(self._seed))
        of_rows, of_columns = part or (slice(None), slice(None))
        first, last, _ = of_rows.indices(num_rows)
        is_read = (self._ids >= first) & (self._ids < last)
        return tensor.index_copy(0, self._ids[is_read] - first, rows[is_read][:, of_columns].to(tensor.dtype))
