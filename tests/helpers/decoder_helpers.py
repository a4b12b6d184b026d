"""What the tests of the decoder share: a small vocabulary in Chameleon's layout, small models and seeded weights."""

import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from model.decoder.chameleon import ChameleonXLLMXConfig, build_model

NUM_CODES = 32
VQ_CONFIG = {"embed_dim": 8, "latent_channels": 8, "resolution": 32, "base_channels": 32, "num_res_blocks": 1}
VQ_CONFIG |= {"channel_multiplier": [1, 1, 1, 1, 1]}
WORDS = "a b c d e f g h red blue one two cat car on the".split()


def code_name(code: int) -> str:
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def small_vocabulary() -> dict[str, int]:
    """Names and ids: specials, image codes (shuffled on purpose: ids must be found by name), reserved tokens, words."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    order = torch.randperm(NUM_CODES, generator=torch.Generator().manual_seed(0)).tolist()
    names += [code_name(code) for code in order]
    names += ["<racm3:break>", "<eoss>", "<reserved08706>", "<reserved08799>", "<image>"]
    names += [f"<reserved{8800 + n:05d}>" for n in (3, 1, 2, 4)]
    return {name: i for i, name in enumerate(names + WORDS)}


def small_config(**overrides) -> ChameleonXLLMXConfig:
    """Two layers of width 64 with the small vocabulary."""
    vocabulary = small_vocabulary()
    values = {"vocab_size": len(vocabulary), "vocabulary_map": vocabulary, "max_position_embeddings": 512}
    values |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    values |= {"bos_token_id": vocabulary["<s>"], "eos_token_id": vocabulary["</s>"]}
    values |= {"vq_config": VQ_CONFIG | {"num_embeddings": NUM_CODES}}
    return ChameleonXLLMXConfig(**(values | overrides))


@torch.no_grad()
def seed_weights(model: nn.Module, scale: float = 0.02) -> nn.Module:
    """The reference figures' seeding: every parameter drawn from the CRC of its name."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        module, _, kind = name.rpartition(".")
        if "norm" in module.rpartition(".")[2]:
            noise = noise * 0.05 + (1 if kind == "weight" else 0)
        else:
            noise = noise * scale
        parameter.copy_(noise)
    return model


def small_model(scale: float = 0.1, **overrides):
    return seed_weights(build_model(small_config(**overrides), "cpu"), scale)


def random_tokens(num: int, seed: int = 0) -> torch.Tensor:
    """Token ids [num] from the whole small vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, len(small_vocabulary()), (num,), generator=generator)


def write_small_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the small vocabulary, written to a folder."""
    return write_word_tokenizer(small_vocabulary(), folder)


def write_word_tokenizer(vocabulary: dict[str, int], folder: Path) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def count_graphs(backend: str):
    """A backend of `torch.compile` that counts its graphs (`frame_count`)."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    return CompileCounterWithBackend(backend)
