"""What is checked of a training run before its ranks meet: options, files, data, and whether they fit together.

finetune_solver.py calls `prepare` on every rank. All problems are raised as one error. No weights are loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.epoch.dataset import TokenDataset
from data.formats.data_config import load_data_config
from data.formats.manifest import MANIFEST_NAME
from data.items.item_processor import hash_tokenizer, load_text_tokenizer
from data.items.vocab import ChameleonVocab
from model.decoder.chameleon import ChameleonXLLMXConfig, build_config, build_model
from model.decoder.trainable import IMAGE_HEAD, choose_trainable
from model.run.options import Options, resolve_model
from model.training.checkpoint import find_changes, find_start, read_state
from model.training.distributed import Launch, choose_device
from model.weights.load import check_weights

# In --output_dir, with --cache_ann_on_disk.
INDEX_DIR = "data_index"

Manifests = Sequence[tuple[Path, dict | None]]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is known of a run on this rank before its model is built."""

    options: Options
    launch: Launch
    device: torch.device
    dataset: TokenDataset
    val_dataset: TokenDataset | None

    def say(self, message: str) -> None:
        """Prints a line, on rank 0 only, above the progress bar where there is one."""
        if self.launch.is_main:
            with tqdm.external_write_mode():
                print(message, flush=True)


def prepare(options: Options, launch: Launch) -> tuple[TokenDataset, TokenDataset | None]:
    """Checks a run and opens its datasets: (to train on, to validate on or None).

    Raises one ValueError that lists every problem.
    """
    problems = options.problems(launch.world_size, launch.local_world_size)

    def attempt(check: Callable[..., Any], *args: Any, prefix: str = "") -> Any:
        try:
            return check(*args)
        except (ValueError, OSError, ImportError) as error:
            problems.append(f"{prefix}{error}")

    eval_only, start, val_dataset = options.validation.eval_only, None, None
    # These name a --resume_path that cannot be read.
    start_problems = [] if eval_only else options.checkpoint.problems()
    problems += start_problems
    if not start_problems:
        start = attempt(_find_start, options)
    attempt(choose_device, options.run.device, launch)
    dataset = attempt(_open_dataset, options, options.data.data_config, launch, prefix="--data_config: ")
    val_config = options.validation.val_data_config
    if eval_only or val_config is not None:
        val_dataset = attempt(_open_dataset, options, val_config, launch, prefix="--val_data_config: ")
    datasets = [found for found in (dataset, val_dataset) if found is not None]
    attempt(_check_model, options, start, datasets, problems)
    if dataset is not None and options.data.context_dropout and not dataset.has_images:
        problems.append("--context_dropout: no item of the records ends in a generated image (image_len)")
    attempt(_check_mask, options, datasets)
    if not problems and not eval_only:
        attempt(_check_changes, options, dataset.fingerprint)
    if problems:
        raise ValueError("\n  - ".join(["training cannot start:", *problems]))
    if launch.is_main:
        _print_unnamed([pair for found in datasets for pair in found.manifests])
    return dataset, val_dataset


def settle_codebook(dataset: TokenDataset, start: str | None) -> str | None:
    """The `codebook_sha256` of the trained model: that of the records (None if several), else that of the start."""
    named = {manifest.get("codebook_sha256") for _, manifest in dataset.manifests if manifest} - {None}
    return start if not named else named.pop() if len(named) == 1 else None


def _find_start(options: Options) -> str | None:
    """The checkpoint that the run resumes from or evaluates, None without one. Raises ValueError."""
    start, _ = find_start(options.start_options)
    if start is not None:
        read_state(start)
        return str(start)
    if options.validation.eval_only and options.model.init_from is None:
        where = f"--init_from, --resume_path, or a checkpoint in {options.checkpoint.output_dir}"
        raise ValueError(f"--eval_only needs weights: {where}")
    return None


def _open_dataset(options: Options, config: Path | None, launch: Launch) -> TokenDataset:
    """The items of a data config. Raises ValueError or OSError."""
    if config is None:
        raise ValueError("give the YAML that lists the records")
    # An evaluation writes nothing to the output folder.
    is_kept = options.data.cache_ann_on_disk and not options.validation.eval_only
    cache_dir = options.checkpoint.output_dir / INDEX_DIR if is_kept else None
    say = print if launch.is_main else lambda message: None
    max_seq_len, overlong = options.data.max_seq_len, options.data.overlong
    dataset = TokenDataset(load_data_config(config), max_seq_len, overlong, cache_dir, say)
    if dataset.num_overlong:
        done = {"drop": "dropped", "truncate": "cut"}[overlong]
        say(f"{dataset.num_overlong} items of {config} above --max_seq_len {max_seq_len} are {done}")
    return dataset


def _check_changes(options: Options, fingerprint: str) -> None:
    """Raises ValueError that names what has changed since the checkpoint to resume from."""
    another_run = "or start another run with --init_from the checkpoint and another --output_dir"
    fixed, changes = find_changes(options.checkpoint, options.resolved, fingerprint)
    if fixed:
        raise ValueError(f"the checkpoint cannot be resumed: {'; '.join(fixed)}. Restore the old values, {another_run}")
    if changes and not options.checkpoint.resume_anyway:
        way = f"Restore the old values, add --resume_anyway if the change is intended, {another_run}"
        raise ValueError(f"the run to resume has changed: {'; '.join(changes)}. {way}")


def _check_model(options: Options, start: str | None, datasets: Sequence[TokenDataset], problems: list[str]) -> None:
    """Raises ValueError or OSError for what is wrong with weights, tokenizer and data; more goes to `problems`."""
    model = options.model
    # A resumed run does not need the weights that it once started from: they may be gone.
    weights, tokenizer = (start, start) if start else resolve_model(model)
    if tokenizer is None:
        raise ValueError(f"--model_size {model.model_size} without --init_from needs --tokenizer DIR: no vocabulary")
    config = check_weights(weights, "keep" if start else model.start_head_init) if weights else None
    loaded = load_text_tokenizer(tokenizer)
    vocab = ChameleonVocab.from_tokenizer(loaded)
    manifests = [pair for dataset in datasets for pair in dataset.manifests]
    codebooks = {config.codebook_sha256: f"the checkpoint {weights}"} if config else {}
    problems += _find_foreign_records(options, manifests, loaded, codebooks)
    _check_trainable(options, config or build_config(model.model_size, loaded))
    problems += options.samples.problems(vocab, model.mask_image_logits)
    num_rows = config.vocab_size if config else vocab.vocab_size
    if vocab.vocab_size > num_rows:
        raise ValueError(f"the tokenizer {tokenizer} has {vocab.vocab_size} ids, the weights in {weights} {num_rows}")
    for dataset in datasets:
        dataset.use_vocabulary(num_rows, vocab.begin_image_id)
        dataset.check_first_items(options.data.max_bad_items)


def _check_mask(options: Options, datasets: Sequence[TokenDataset]) -> None:
    """Raises ValueError if `--mask_image_logits` meets an image to learn: the loss of a masked token is infinite."""
    if not options.model.mask_image_logits:
        return
    way = "train without --mask_image_logits (--unmask_image_logits, the default)"
    if options.trainable.trains_image_rows:
        raise ValueError(f"--mask_image_logits with --train_only {IMAGE_HEAD}: its rows would learn nothing; {way}")
    if any(dataset.has_images for dataset in datasets):
        have = "the records have items that end in an image to learn (image_len)"
        raise ValueError(f"--mask_image_logits: {have}; {way}, or use records of text answers alone")


def _check_trainable(options: Options, config: ChameleonXLLMXConfig) -> None:
    """Raises ValueError or ImportError if what is to be trained cannot be trained; `config` is the model's."""
    trainable = options.trainable
    if not trainable.is_partial or trainable.problems():
        return
    # On the meta device: no memory is taken.
    model = choose_trainable(build_model(config), trainable)
    if resolve_model(options.model)[0] is None:
        raise ValueError("--lora_rank and --train_only need weights to start from: give --init_from")
    is_head_trained = any(p.requires_grad for name, p in model.named_parameters() if name.startswith("lm_head."))
    init = options.model.start_head_init
    if init != "keep" and not is_head_trained and not options.model.mask_image_logits:
        raise ValueError(
            f"--image_head_init {init} reinitializes rows of lm_head of image tokens, and they are frozen: no image "
            "could be learned. Add --train_only image_head, or start from a model that writes images (--init_from)"
        )


def _find_foreign_records(
    options: Options, manifests: Manifests, tokenizer: Any, codebooks: dict[str | None, str]
) -> list[str]:
    """Records of another tokenizer, or of another VQGAN than each other or than `codebooks` (names by sha256)."""
    found, ours, named = [], hash_tokenizer(tokenizer), {key: name for key, name in codebooks.items() if key}
    for path, manifest in manifests:
        fields = manifest or {}
        if fields.get("tokenizer_sha256") not in (None, ours):
            found.append(
                f"{path} was tokenized with another tokenizer than the model's, according to its {MANIFEST_NAME}: "
                "train with that one (--tokenizer, --init_from), or pre-tokenize again"
            )
        if fields.get("codebook_sha256"):
            named.setdefault(fields["codebook_sha256"], str(path))
    if len(named) > 1 and not options.data.mix_vqgans:
        (one, first), (other, second) = list(named.items())[:2]
        found.append(
            f"{first} and {second} were made with different VQGANs (codebook_sha256 {one[:12]} and {other[:12]}): "
            "the same codes mean other images. Pre-tokenize again with one VQGAN, or add --mix_vqgans if intended"
        )
    return found


def _print_unnamed(manifests: Manifests) -> None:
    """Prints which records cannot be compared: without a manifest, or with a manifest that names no codebook."""
    without = [path for path, manifest in manifests if manifest is None]
    if without:
        print(f"{len(without)} of {len(manifests)} records have no {MANIFEST_NAME}, the first: {without[0]}")
    paths = {fields["vqgan_sha256"]: path for path, fields in manifests if fields and fields.get("vqgan_sha256")}
    named = {fields.get("vqgan_sha256") for _, fields in manifests if fields and fields.get("codebook_sha256")}
    if len(paths) > 1 and paths.keys() - named:
        first, second, *_ = paths.values()
        print(f"warning: {first} and {second} were made with different VQGAN files, perhaps different VQGANs")
