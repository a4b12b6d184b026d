"""Imported by the server of `tests.forked` alone: the libraries that scripts load late, ours not among them."""

import accelerate  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import transformers.models.chameleon.modeling_chameleon  # noqa: F401
