"""Train the laptop default's BPE text tokenizer on the texts of its conversations, in Chameleon's vocabulary layout.

    python exps/tiny/train_tokenizer.py --in_filename output/tiny/data/train.json --out_dir output/tiny/tokenizer

The layout is Chameleon's, only smaller: special tokens, the image codes `IMGIMG...Z`, end and begin of an image, the
reserved tokens that the sequence format names, then bytes and merges. All ids are looked up by name.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

NUM_CODES = 1024
MAX_GRIDS = 32
# A multiple of 64; ids that the texts do not fill stay reserved.
VOCAB_SIZE = 1536


def image_token_name(code: int) -> str:
    """Chameleon's name of an image code: decimal digits as letters A to J, such as IMGIMGBACZ for 102."""
    return f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"


def control_tokens() -> list[str]:
    """Every token that is not text, in the order of its id."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *map(image_token_name, range(NUM_CODES)), "<eoss>", "<racm3:break>"]
    names += ["<image>", "<reserved08706>", "<reserved08799>"]
    return names + [f"<reserved{8800 + n:05d}>" for n in range(1, MAX_GRIDS + 1)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly VOCAB_SIZE entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\t\n]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = control_tokens()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    filler = [f"<reserved{8200 + n:05d}>" for n in range(VOCAB_SIZE - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens(filler)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def read_texts(path: Path) -> list[str]:
    """The texts of all turns of an input JSON. Raises ValueError if the file is no such JSON."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        return [turn["value"].replace("<|image|>", "") for item in items for turn in item["conversations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--in_filename {path} is not what exps/tiny/make_data.py writes ({error!r})") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--in_filename",
        type=Path,
        default=Path("output/tiny/data/train.json"),
        help="input JSON (default: %(default)s)",
    )
    add("--out_dir", type=Path, default=Path("output/tiny/tokenizer"), help="folder to write to (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.in_filename.is_file():
        print(f"{args.in_filename} is missing: write it with exps/tiny/make_data.py", file=sys.stderr)
        return 2
    if (args.out_dir / "tokenizer.json").exists():
        print(f"{args.out_dir}: already there")
        return 0
    try:
        if args.out_dir.exists() and (not args.out_dir.is_dir() or any(args.out_dir.iterdir())):
            raise ValueError(f"--out_dir {args.out_dir} holds other files than a tokenizer; choose another")
        texts = read_texts(args.in_filename)
    except (ValueError, OSError) as error:
        print(f"train_tokenizer.py: {error}", file=sys.stderr)
        return 2
    tokenizer = train_tokenizer(texts)
    partial = args.out_dir.with_name(f"{args.out_dir.name}.partial")
    tokenizer.save_pretrained(partial)
    os.replace(partial, args.out_dir)
    print(f'{args.out_dir}: {len(tokenizer)} tokens; "{texts[0]}" is {len(tokenizer.tokenize(texts[0]))} of them')
    return 0


if __name__ == "__main__":
    sys.exit(main())
