"""
One token per row through the forward of the whole model, as a sharded one needs it.

Where it stands: in the place of `model/decode_step.py` when the samples of a training are generated
(`model/samples.py`). FSDP gathers weights where the root's forward and those of its parts are called, so nothing here
looks at a weight: whatever the layers hold (adapters, frozen and trained rows), a step is right if a forward is.
"""

from collections.abc import Callable

import torch
from torch import nn

from data.vocab import ChameleonVocab
from model.kv_cache import KVCache


class RootForward:
    """
    Logits of one token per row by the model's own forward.

    Attributes:
        device, dtype: of the activations, which under mixed precision is not the type of the weights.
        code_ids: sorted ids of the image codes, int64 [num_codes].
        agree: from the tokens int64 [N] that this rank drew to those that all ranks go on with: ranks whose tokens
            differed would end after different numbers of forwards, and wait for one another forever.
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
        """
        Args:
            input_ids, positions: int64 [N].
            cache: of N rows; gets the tokens' keys and values.
            slot: int64 [1], where.
            mask: [N, num_visible], 0 at the slots that a row sees, minus infinity elsewhere.
            is_image: nothing but image codes can come.

        Returns:
            Logits [N, V], with `is_image` of the image codes alone, [N, num_codes].
        """
        cache.begin_step(slot, mask.shape[1])
        logits = self._model(
            input_ids[:, None],
            position_ids=positions[:, None],
            attention_mask=mask[:, None, None],
            past_key_values=cache,
        ).logits[:, 0]
        return logits[:, self.code_ids] if is_image else logits
