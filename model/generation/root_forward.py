"""
One token per row through the forward of the whole model, as a sharded model needs it.

`model/run/samples.py` hands it to `generate_batch` in the place of `model/generation/decode_step.py`. FSDP gathers
weights where the forwards of the root and of its parts are called, so nothing here looks at a weight: adapters and
frozen rows work too.
"""

from collections.abc import Callable

import torch
from torch import nn

from data.items.vocab import ChameleonVocab
from model.generation.kv_cache import KVCache


class RootForward:
    """
    Logits of one token per row by the model's own forward; interface as `LeanForward`.

    Attributes:
        device, dtype: of the activations. Under mixed precision, weights have another type.
        code_ids: sorted ids of the image codes, int64 [num_codes].
        agree: from the tokens int64 [N] that this rank drew to those that all ranks continue with. Ranks with other
            tokens would run another number of forwards, and wait for one another forever.
    """

    def __init__(
        self,
        model: nn.Module,
        vocab: ChameleonVocab,
        device: torch.device,
        dtype: torch.dtype,
        agree: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens,
    ):
        self._model, self.device, self.dtype, self.agree = model, device, dtype, agree
        self.code_ids = torch.tensor(sorted(vocab.image_token_ids.tolist()), device=device)

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        slot: torch.Tensor,
        mask: torch.Tensor,
        is_image: bool,
    ) -> torch.Tensor:
        """Arguments and result as in `LeanForward`."""
        cache.begin_step(slot, mask.shape[1])
        logits = self._model(
            input_ids[:, None],
            position_ids=positions[:, None],
            attention_mask=mask[:, None, None],
            past_key_values=cache,
        ).logits[:, 0]
        return logits[:, self.code_ids] if is_image else logits
