"""
The rows of `lm_head` of image tokens where a training starts, and the note of how a starting point was made.

Where it stands: under `model/convert.py`. The recipe starts from a model that writes text alone, with these rows
zeroed; the other ways are to keep them, as a trained model needs, or to draw them anew.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from model.decoder.chameleon import ChameleonXLLMXConfig, build_model
from model.hf_folder import load_config
from model.weight_files import WeightReader, write_text_file

IMAGE_HEAD_INITS = ("zero", "keep", "normal")
HEAD = "lm_head.weight"
NOTE_NAME = "starting_point.json"
STOCK_ARCHITECTURE = "ChameleonForConditionalGeneration"
# Set in the config.json of our exports in stock's shape: their image rows may be trained, Chameleon's own are not.
EXPORT_MARK = "is_xllmx_export"


@dataclass(frozen=True)
class StartingPoint:
    """
    How the folder of a starting point was made; `starting_point.json` in it holds this.

    Attributes:
        image_head_init: one of `IMAGE_HEAD_INITS`.
        seed: of "normal".
        source: the folder (absolute) or hub id that it was made from; None if that is not known.
    """

    image_head_init: str
    seed: int = 0
    source: str | None = None

    @classmethod
    def of(cls, source: str | os.PathLike, image_head_init: str, seed: int) -> "StartingPoint":
        where = os.path.abspath(source) if Path(source).is_dir() else str(source)
        return cls(image_head_init, seed, where)

    def write(self, folder: Path) -> None:
        write_text_file(folder / NOTE_NAME, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def check_made(self, folder: Path) -> None:
        """
        See that what is in `folder` was made like this.

        Raises:
            FileNotFoundError, ValueError: it is no checkpoint, or was made otherwise.
        """
        made = read_starting_point(folder)
        differences = []
        if made.image_head_init != self.image_head_init:
            differences.append(f"by --image_head_init {made.image_head_init}, not {self.image_head_init}")
        elif made.image_head_init == "normal" and made.seed != self.seed:
            differences.append(f"with --seed {made.seed}, not {self.seed}")
        # The source may be gone by now, so that a relative path to it can no longer be told from a hub id.
        if made.source not in (None, self.source, os.path.abspath(self.source)):
            differences.append(f"from {made.source}, not {self.source}")
        if differences:
            raise ValueError(
                f"{folder} was made {' and '.join(differences)}. Remove that folder to have it made anew, give the "
                "options that it was made by, or choose another --output_dir."
            )


def read_starting_point(folder: Path) -> StartingPoint:
    """
    How a starting point was made. The recipe's own have no note: their image rows must be zero.

    Raises:
        FileNotFoundError, ValueError: it is no checkpoint, or there is no telling how it was made.
    """
    path = folder / NOTE_NAME
    if path.is_file():
        try:
            return StartingPoint(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); remove {folder} to have it made anew.") from None
    image_ids = image_token_ids(load_config(folder))
    if not len(image_ids) or WeightReader(folder).read(HEAD)[image_ids].any():
        raise ValueError(
            f"{folder} has no {NOTE_NAME}, and the rows of lm_head of image tokens are not zero: there is no telling "
            "how it was made. Remove it to have it made anew, or give it as --init_from and another --output_dir."
        )
    return StartingPoint("zero")


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


def init_image_rows(
    head: torch.Tensor, image_head_init: str, image_ids: torch.Tensor, std: float, seed: int
) -> torch.Tensor:
    """
    `lm_head` [vocab_size, D] with its image rows as told; what is given stays as it is.

    Args:
        image_head_init: "zero", "keep", or "normal": drawn from normal(0, `std`) by `seed`.
        image_ids: int64, the rows.
    """
    if image_head_init == "zero":
        return head.index_fill(0, image_ids, 0)
    if image_head_init == "normal":
        rows = torch.empty(len(image_ids), head.shape[1])
        rows.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
        return head.index_copy(0, image_ids, rows.to(head.dtype))
    return head
