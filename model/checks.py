"""What is checked of a training run before its ranks meet: options, files, data, and whether they belong together.

`prepare` is called on every rank, collects every problem, and raises one error. Nothing of the model is loaded for it.
"""

import mmap
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.data_config import load_data_config
from data.dataset import TokenDataset
from data.item_processor import hash_tokenizer, load_text_tokenizer
from data.manifest import MANIFEST_NAME
from data.vocab import ChameleonVocab
from model.checkpoint import find_changes, find_fixed_changes, find_start, read_state
from model.convert import check_weights
from model.decoder.chameleon import ChameleonXLLMXConfig, build_config, build_model
from model.distributed import Launch, choose_device
from model.options import Options, find_number_problems, resolve_model
from model.trainable import IMAGE_HEAD, choose_trainable

SHM_DIR = Path("/dev/shm")
INDEX_DIR = "data_index"  # of --cache_ann_on_disk, in --output_dir


def prepare(options: Options, launch: Launch) -> tuple[TokenDataset, TokenDataset | None]:
    """Checks everything that can be checked before the ranks meet; opens the dataset and that of validation, if any.

    Raises one ValueError that lists every problem found.
    """
    eval_only = options.validation.eval_only
    problems = [
        *find_number_problems(options),
        *options.trainable.problems(),
        *options.optim.problems(),
        *options.parallel.problems(launch.world_size, launch.local_world_size),
        *(_find_eval_problems(options) if eval_only else options.checkpoint.problems()),
        *options.float8.problems(
            options.run.device, options.parallel.precision, options.trainable.is_partial, options.data.max_row_len
        ),
        *options.trackers.problems(),
        *options.watch.problems(),
    ]
    try:
        choose_device(options.run.device, launch)
    except ValueError as error:
        problems.append(str(error))
    problems += _find_shm_problems(options, launch)
    dataset = _open_dataset("data_config", options, launch, problems)
    val_dataset, notes = None, []
    if options.validation.val_data_config is not None:
        val_dataset = _open_dataset("val_data_config", options, launch, problems)
    datasets = [found for found in (dataset, val_dataset) if found is not None]
    problems += _find_model_problems(options, datasets, notes)
    if dataset is not None and options.data.context_dropout and not dataset.has_images:
        problems.append("--context_dropout: no record says that an item ends in a generated image (image_len)")
    problems += _find_mask_problems(options, dataset, val_dataset)
    fixed = [] if problems or eval_only else find_fixed_changes(options.checkpoint, options.resolved)
    if fixed:
        problems.append(
            f"the checkpoint to go on from does not fit: {'; '.join(fixed)}. Give what it was started with, "
            "or begin another run with --init_from the checkpoint and another --output_dir"
        )
    if not problems and not options.checkpoint.resume_anyway and not eval_only:
        changes = find_changes(options.checkpoint, options.resolved, dataset.fingerprint)
        if changes:
            problems.append(
                f"the run to go on with began otherwise: {'; '.join(changes)}. Go on as it began, add --resume_anyway "
                "if that is meant, or begin another run with --init_from the checkpoint and another --output_dir"
            )
    if problems:
        raise ValueError("\n  - ".join(["training cannot start:", *problems]))
    if launch.is_main:
        print("\n".join(notes), end="\n" if notes else "", flush=True)
    return dataset, val_dataset


def settle_codebook(dataset: TokenDataset, start: str | None) -> str | None:
    """The `codebook_sha256` of what is trained on these items: theirs (None, if they mix several), else the start's."""
    named = {manifest.get("codebook_sha256") for _, manifest in dataset.manifests if manifest} - {None}
    return start if not named else named.pop() if len(named) == 1 else None


def _find_shm_problems(options: Options, launch: Launch) -> list[str]:
    """Why loader workers cannot be started. Rows need no shared memory, but each semaphore of their queues a page."""
    num_workers = options.data.num_workers
    if not num_workers or not SHM_DIR.is_dir():
        return []
    num_loaders = launch.local_world_size * (2 if options.validation.val_data_config else 1)
    needed, shm = mmap.PAGESIZE * num_loaders * (3 * num_workers + 8), shutil.disk_usage(SHM_DIR)
    if shm.free >= needed or not shm.total:  # 0: without a limit
        return []
    return [
        f"the queues of the loader workers take {needed >> 10} KiB in {SHM_DIR}, which has {shm.free >> 10} KiB free: "
        f"give the container a larger --shm-size, or fewer --num_workers than {num_workers}"
    ]


def _open_dataset(name: str, options: Options, launch: Launch, problems: list[str]) -> TokenDataset | None:
    """The items of `--{name}`; what is wrong with them is added to `problems`."""
    try:
        sources = load_data_config(options.resolved[name])
        is_kept = options.data.cache_ann_on_disk and not options.validation.eval_only  # which writes nothing there
        cache_dir = options.checkpoint.output_dir / INDEX_DIR if is_kept else None
        say = print if launch.is_main else lambda message: None
        return TokenDataset(sources, options.data.max_seq_len, options.data.overlong, cache_dir, say)
    except (ValueError, OSError) as error:
        problems.append(f"--{name}: {error}")
        return None


def _find_eval_problems(options: Options) -> list[str]:
    """What keeps `--eval_only` from starting, one sentence each."""
    found, checkpoint = [], options.checkpoint
    if options.validation.val_data_config is None:
        found.append("--eval_only needs items to validate on: --val_data_config")
    if checkpoint.resume_path is not None:
        try:
            read_state(checkpoint.resume_path)
        except ValueError as error:
            found.append(f"--resume_path: {error}; to validate weights alone use --init_from")
    elif options.model.init_from is None and find_start(checkpoint)[0] is None:
        found.append(
            f"--eval_only needs weights: --init_from, --resume_path, or a checkpoint in {checkpoint.output_dir}"
        )
    return found


def _find_model_problems(all_options: Options, datasets: Sequence[TokenDataset], notes: list[str]) -> list[str]:
    """What is wrong with the model and what it learns, one sentence each; what is only to be said goes to `notes`."""
    options = all_options.model
    found = options.problems()
    start = _find_whole_start(all_options)
    # A run that goes on needs nothing of where it once began, which may be gone.
    weights, tokenizer = (start, start) if start else resolve_model(options)
    if tokenizer is None:
        return [*found, f"--model_size {options.model_size} starts afresh: its vocabulary needs --tokenizer DIR"]
    try:
        config = check_weights(weights, "keep" if start else options.start_head_init) if weights else None
        num_rows = config.vocab_size if config else None
        loaded = load_text_tokenizer(tokenizer)
        manifests = [pair for dataset in datasets for pair in dataset.manifests]
        found += _find_foreign_records(manifests, loaded, tokenizer)
        start_codebook = (config.codebook_sha256, f"the checkpoint {weights}") if config else (None, "")
        mixed = _find_mixed_codebooks(manifests, start_codebook, notes)
        found += [] if all_options.data.mix_vqgans else mixed
        vocab = ChameleonVocab.from_tokenizer(loaded)
        vocab_size = vocab.vocab_size
        found += _find_trainable_problems(all_options, config or build_config(options.model_size, loaded))
        found += all_options.samples.problems(vocab, options.mask_image_logits)
        for dataset in datasets:
            dataset.use_vocabulary(num_rows or vocab_size, vocab.begin_image_id)
            dataset.check_first_items(all_options.data.max_bad_items)
    except (ValueError, OSError) as error:
        return [*found, str(error)]
    if num_rows is not None and vocab_size > num_rows:
        found.append(f"the tokenizer {tokenizer} has {vocab_size} ids, but the weights in {weights} {num_rows}")
    return found


def _find_whole_start(options: Options) -> str | None:
    """The checkpoint that the run goes on from, if there is one that is whole (others are refused elsewhere)."""
    start, _ = find_start(options.start_options)
    try:
        return None if start is None or read_state(start) is None else str(start)
    except ValueError:
        return None


def _find_mask_problems(options: Options, *datasets: TokenDataset | None) -> list[str]:
    """Why `--mask_image_logits` cannot be, one sentence: under it the loss of an image token would be infinite."""
    if not options.model.mask_image_logits:
        return []
    way = "train without --mask_image_logits (--unmask_image_logits, the default)"
    if options.trainable.trains_image_rows:
        return [f"--mask_image_logits with --train_only {IMAGE_HEAD}: its rows would learn nothing; {way}"]
    if any(dataset is not None and dataset.has_images for dataset in datasets):
        return [
            "--mask_image_logits: the records have items that end in an image to be predicted (image_len), which it "
            f"forbids; {way}, or give records of text answers alone"
        ]
    return []


def _find_trainable_problems(options: Options, config: ChameleonXLLMXConfig) -> list[str]:
    """Why what is to be trained cannot be, one sentence each; `config` is the model's."""
    trainable = options.trainable
    if not trainable.is_partial or trainable.problems():
        return []
    try:
        model = choose_trainable(build_model(config), trainable)  # on meta
    except (ValueError, ImportError) as error:
        return [str(error)]
    if resolve_model(options.model)[0] is None:
        return ["--lora_rank and --train_only need weights to start from: give --init_from"]
    is_head_trained = any(p.requires_grad for name, p in model.named_parameters() if name.startswith("lm_head."))
    init = options.model.start_head_init
    if init != "keep" and not is_head_trained and not options.model.mask_image_logits:
        return [
            f"--image_head_init {init} reinitializes rows of lm_head of image tokens, and they are frozen: no image "
            "could be learned. Add --train_only image_head, or start from a model that writes images (--init_from)"
        ]
    return []


def _find_foreign_records(manifests: Sequence[tuple[Path, dict | None]], tokenizer: Any, name: str) -> list[str]:
    """Records whose `manifest.json` says that they were tokenized with another tokenizer, one sentence each."""
    found, ours = [], hash_tokenizer(tokenizer)
    for path, manifest in manifests:
        if (manifest or {}).get("tokenizer_sha256") not in (None, ours):
            found.append(
                f"{path} was tokenized with another tokenizer than {name} (its {MANIFEST_NAME} says so): train "
                "with that one (--tokenizer, --init_from), or pre-tokenize again"
            )
    return found


def _find_mixed_codebooks(
    manifests: Sequence[tuple[Path, dict | None]], start: tuple[str | None, str], notes: list[str]
) -> list[str]:
    """
    Why the records, and `start` (its codebook_sha256, if known, and its name), are not of one VQGAN; one sentence.

    Manifests of older versions know the hash of its files alone, and there are three file formats: for `notes`.
    """
    named = {start[0]: start[1]} if start[0] else {}
    found = [
        (path, manifest.get("vqgan_sha256"), manifest.get("codebook_sha256"))
        for path, manifest in manifests
        if manifest
    ]
    path_of_files = {files: path for path, files, _ in reversed(found) if files}
    codebook_of_files = {files: codebook for _, files, codebook in found if codebook}
    for path, _, codebook in found:
        if codebook:
            named.setdefault(codebook, str(path))
    unnamed = [path for files, path in path_of_files.items() if files not in codebook_of_files]
    without = [path for path, manifest in manifests if manifest is None]
    if without:
        number = f"{len(without)} of {len(manifests)} records"
        notes.append(f"{number} are taken without a {MANIFEST_NAME} that says what they were made with: {without[0]}")
    if unnamed and len(path_of_files) > 1:
        other = next(path for path in path_of_files.values() if path != unnamed[0])
        notes.append(
            f"careful: {unnamed[0]} and {other} were made with different VQGAN files (vqgan_sha256): "
            "if these hold different VQGANs, the same codes mean other images in them"
        )
    if len(named) < 2:
        return []
    (one, first), (other, second) = list(named.items())[:2]
    return [
        f"{first} and {second} were made with different VQGANs (codebook_sha256 {one[:12]}... and {other[:12]}...), in "
        "which the same codes mean other images: pre-tokenize again with one of them, or add --mix_vqgans if that is "
        "meant"
    ]
