"""What several benches share: names and size of Chameleon's vocabulary, and weights."""

import torch
from torch.distributed.tensor import DTensor

from exps.tiny.train_tokenizer import special_names  # noqa: F401

VOCAB_SIZE = 65536
WEIGHT_STD = 0.02


@torch.no_grad()
def fill_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of norms become 1, biases 0, all else normal in the order of the parameters.

    Our model and stock `transformers` get the same weights. They are drawn on the device: a host takes a minute for 7B.
    """
    generator = None
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if "norm" in module.rpartition(".")[2]:
            local.fill_(float(kind == "weight"))
            continue
        generator = generator or torch.Generator(local.device).manual_seed(0)
        local.normal_(0.0, WEIGHT_STD, generator=generator)
    return model
