"""The public face of the decoder: `from model.chameleon import ChameleonXLLMXForConditionalGeneration`.

Importing this module gives the class its `from_pretrained` and registers it with the auto classes of `transformers`.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration
from model.weights.hf_folder import resolve_checkpoint
from model.weights.load import load_pretrained

__all__ = ["ChameleonXLLMXConfig", "ChameleonXLLMXForConditionalGeneration"]


def _from_pretrained(
    cls: type[ChameleonXLLMXForConditionalGeneration], pretrained_model_name_or_path: str, **kwargs: Any
) -> ChameleonXLLMXForConditionalGeneration:
    """
    Load a folder or hub id of either checkpoint shape; see `load_pretrained` for the arguments.

    `AutoModelForCausalLM` calls this too. Of its arguments `config`, `revision`, `dtype` by name and the `device_map`
    of one device have an effect.
    """
    # For a folder of adapters, AutoModelForCausalLM names the base, and the adapters here.
    adapter_dir = (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
    if adapter_dir:
        pretrained_model_name_or_path, kwargs["config"] = adapter_dir, None
    folder = resolve_checkpoint(pretrained_model_name_or_path, revision=kwargs.pop("revision", None))
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device_map", None) or kwargs.pop("device", "cpu")
    if isinstance(dtype, str):
        # "auto" becomes None: the type of the files.
        dtype = getattr(torch, dtype, None)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_pretrained(folder, dtype, device, **kwargs)


ChameleonXLLMXForConditionalGeneration.from_pretrained = classmethod(_from_pretrained)
AutoConfig.register(ChameleonXLLMXConfig.model_type, ChameleonXLLMXConfig, exist_ok=True)
AutoModelForCausalLM.register(ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration, exist_ok=True)
