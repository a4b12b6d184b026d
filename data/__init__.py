"""From records to rows of tokens: formats, item processing, order and loading. Never imports `model`."""

import logging

# torchao, where it is installed, warns in every process that imports transformers, also if nobody uses it.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
