"""Train the laptop default's BPE text tokenizer on the texts of its conversations, in Chameleon's vocabulary layout.

    python exps/tiny/train_tokenizer.py --in_filename output/tiny/data/train.json --out_dir output/tiny/tokenizer

The layout is Chameleon's, only smaller: `special_names`, then bytes and merges. All ids are looked up by name.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Before transformers: keeps torchao quiet.
import data  # noqa: E402, F401 isort: skip
from transformers import PreTrainedTokenizerFast  # noqa: E402

from data.items.vocab import BEGIN_IMAGE, BOS, END_IMAGE, END_OF_TURN, EOS, FIRST_GRID_SIZE, NEW_LINE, PAD  # noqa: E402

NUM_CODES = 1024
MAX_GRIDS = 32
# A multiple of 64; ids that the texts do not fill stay reserved.
VOCAB_SIZE = 1536


def special_names(num_codes: int, max_grids: int) -> list[str]:
    """Every token of Chameleon's layout that is not text, in the order of its id.

    The name of an image code has letters A to J for decimal digits: IMGIMGBACZ is code 102.
    """
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = [f"IMGIMG{str(code).translate(letters)}Z" for code in range(num_codes)]
    grids = [f"<reserved{FIRST_GRID_SIZE + grids:05d}>" for grids in range(1, max_grids + 1)]
    return [BOS, PAD, EOS, "<unk>", *codes, END_IMAGE, BEGIN_IMAGE, "<image>", END_OF_TURN, NEW_LINE, *grids]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly VOCAB_SIZE entries."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(r"[\t\n]"), "isolated"), pre_tokenizers.Digits(individual_digits=True)]
    parts += [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_names(NUM_CODES, MAX_GRIDS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    filler = [f"<reserved{8200 + n:05d}>" for n in range(VOCAB_SIZE - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens(filler)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    in_filename = Path("output/tiny/data/train.json")
    add("--in_filename", type=Path, default=in_filename, help="input JSON (default: %(default)s)")
    add("--out_dir", type=Path, default=Path("output/tiny/tokenizer"), help="folder to write to (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.out_dir / "tokenizer.json").exists():
        print(f"{args.out_dir}: already there")
        return 0
    if args.out_dir.exists() and (not args.out_dir.is_dir() or any(args.out_dir.iterdir())):
        parser.error(f"--out_dir {args.out_dir} holds other files than a tokenizer; choose another")
    try:
        items = json.loads(args.in_filename.read_text(encoding="utf-8"))
        texts = [turn["value"].replace("<|image|>", "") for item in items for turn in item["conversations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--in_filename {args.in_filename} is not what exps/tiny/make_data.py writes ({error!r})")
    tokenizer = train_tokenizer(texts)
    partial = args.out_dir.with_name(f"{args.out_dir.name}.partial")
    tokenizer.save_pretrained(partial)
    os.replace(partial, args.out_dir)
    print(f'{args.out_dir}: {len(tokenizer)} tokens; "{texts[0]}" is {len(tokenizer.tokenize(texts[0]))} of them')
    return 0


if __name__ == "__main__":
    sys.exit(main())
