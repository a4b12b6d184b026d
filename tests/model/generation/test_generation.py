"""Sampling and the loop over the cache, against transformers' own generation and a plain loop without a cache."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import ChameleonForConditionalGeneration, LogitsProcessor, LogitsProcessorList

from data.items.vocab import ChameleonVocab
from model.generation.decode_step import LeanForward, RootForward
from model.generation.image_grammar import ImageGrammar, Kind
from model.generation.kv_cache import KVCache, free_bytes, row_bytes
from model.generation.loop import CUT_BY_LENGTH, CUT_BY_NAN, CUT_BY_POSITIONS, fit_batch_size, generate_batch
from model.generation.sampling import SamplingOptions, draw_noise, gumbel_noise, sample_codes, sample_tokens
from model.vqgan.vqgan import VQGAN, save_vqgan
from tests.helpers.decoder_helpers import random_tokens, small_config, small_model, small_vocabulary
from tests.helpers.small_run import export_hf
from tests.model.generation.test_image_grammar import plain_allowed

VOCAB = ChameleonVocab.from_mapping(small_vocabulary())
GREEDY = SamplingOptions(temperature=0.0)
CPU_FP32 = torch.device("cpu"), torch.float32
IMAGE_START = [VOCAB.begin_image_id, VOCAB.grid_size_ids[2], VOCAB.grid_size_ids[1]]  # 4 rows of 2 codes


def make_model(**overrides):
    return small_model(scale=0.3, **overrides).eval()


def make_prompts(lengths=(3, 9, 1, 6, 4)) -> list[list[int]]:
    """Prompts of words after `<s>`."""
    first_word, num_words = small_vocabulary()["a"], 10
    return [[VOCAB.bos_id, *(first_word + (3 * i + n) % num_words for i in range(n - 1))] for n in lengths]


class PlainGrammar(LogitsProcessor):
    """For transformers: what the plain grammar does not allow is set to minus infinity."""

    def __init__(self, prompt_len: int):
        self.prompt_len = prompt_len

    def __call__(self, input_ids, scores):
        for row, tokens in enumerate(input_ids.tolist()):
            allowed = torch.tensor(sorted(plain_allowed(tokens[self.prompt_len :])))
            scores[row] = torch.full_like(scores[row], -torch.inf).index_copy(0, allowed, scores[row, allowed])
        return scores


def plain_generate(model, prompt, forced, cfg, max_gen_len):
    """Greedy generation, with whole forwards of both branches for every token."""
    tokens = list(forced)
    while len(tokens) < max_gen_len:
        allowed = sorted(plain_allowed(tokens))
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        last_begin = max((i for i, token in enumerate(tokens) if token == VOCAB.begin_image_id), default=None)
        is_open = last_begin is not None and VOCAB.end_image_id not in tokens[last_begin:]
        if is_open and len(tokens) - last_begin >= 3:
            unconditional = model(torch.tensor([tokens[last_begin:]])).logits[0, -1]
            logits = unconditional + cfg * (logits - unconditional)
        token = allowed[logits[allowed].argmax()]
        if token == VOCAB.end_of_turn_id:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("overrides", [{}, dict(num_key_value_heads=2, model_parallel_size=2, swin_norm=True)])
def test_greedy_equals_stock_transformers(tmp_path, overrides):
    model = make_model(**overrides)
    torch.manual_seed(0)
    save_vqgan(VQGAN(small_config().vq_config), tmp_path / "vqgan", torch.float32)
    export_hf(model, model.config, tmp_path / "hf", shape="hf", vqgan_dir=tmp_path / "vqgan")
    stock = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    stock.model.vocabulary_mapping.__dict__["image_tokens"] = []  # stock never draws images: let it
    prompts = [*make_prompts(), *make_prompts((2, 7))]
    forced = [[]] * 5 + [IMAGE_START] * 2
    ours = generate_batch(model, prompts, VOCAB, GREEDY, 40, forced)
    for prompt, start, generation in zip(prompts, forced, ours, strict=True):
        context = torch.tensor([[*prompt, *start]])
        theirs = stock.generate(
            context,
            attention_mask=torch.ones_like(context),
            max_new_tokens=40 - len(start),
            do_sample=False,
            eos_token_id=VOCAB.end_of_turn_id,
            pad_token_id=VOCAB.pad_id,
            logits_processor=LogitsProcessorList([PlainGrammar(len(prompt))]),
        )[0, len(prompt) :].tolist()
        finished = theirs[-1] == VOCAB.end_of_turn_id
        assert generation.tokens == (theirs[:-1] if finished else theirs)
        assert finished == (generation.cut_by is None)
    assert sum(VOCAB.begin_image_id in generation.tokens for generation in ours) >= 2


def test_greedy_with_guidance_equals_two_plain_forwards():
    model = make_model()
    prompts, forced = make_prompts(), [IMAGE_START, [], IMAGE_START[:1], [], IMAGE_START]
    found = generate_batch(model, prompts, VOCAB, replace(GREEDY, cfg=4.0), 40, forced)
    with torch.inference_mode():
        expected = [
            plain_generate(model, prompt, start, 4.0, 40) for prompt, start in zip(prompts, forced, strict=True)
        ]
    assert [generation.tokens for generation in found] == expected
    assert found != generate_batch(model, prompts, VOCAB, GREEDY, 40, forced)


@pytest.mark.slow
def test_a_compiled_step_draws_the_same_tokens(monkeypatch):
    plain_compile = torch.compile
    # There may be no C++ compiler.
    monkeypatch.setattr(torch, "compile", lambda function: plain_compile(function, backend="aot_eager"))
    model, prompts = make_model(), make_prompts()
    plain = generate_batch(model, prompts, VOCAB, SamplingOptions(cfg=3.0), 30)
    compiled = LeanForward(model, VOCAB, is_compiled=True)
    assert generate_batch(model, prompts, VOCAB, SamplingOptions(cfg=3.0), 30, forward=compiled) == plain


def test_same_seed_same_tokens_on_any_batch_size():
    options = SamplingOptions(temperature=1.0, image_top_k=20, text_top_k=15, cfg=2.0, seed=5)
    prompts, forced = make_prompts() * 2, [IMAGE_START, []] * 5
    results = [
        generate_batch(make_model(), prompts, VOCAB, options, 60, forced, batch_size=batch_size)
        for batch_size in (1, 3, 64)
    ]
    assert results[0] == results[1] == results[2]
    assert results[0] != generate_batch(make_model(), prompts, VOCAB, replace(options, seed=99), 60, forced)


def test_a_row_at_the_end_of_the_positions_waits_for_shorter_ones():
    model, prompts, options = make_model(max_position_embeddings=64), make_prompts((5, 60, 9)), replace(GREEDY, cfg=2.0)
    found = generate_batch(model, prompts, VOCAB, options, 1000)
    assert found == [generate_batch(model, [prompt], VOCAB, options, 1000)[0] for prompt in prompts]
    assert len(found[1].tokens) == 4 and found[1].cut_by == CUT_BY_POSITIONS and max(len(g.tokens) for g in found) > 4


def test_images_are_always_valid_or_reported_as_cut_off():
    options = SamplingOptions(temperature=2.0, image_top_k=1000, text_top_k=1000)
    forced = [IMAGE_START, [], IMAGE_START[:1]] * 20
    generations = generate_batch(make_model(), make_prompts((4,)) * 60, VOCAB, options, 70, forced)
    num_images = 0
    for start, generation in zip(forced, generations, strict=True):
        tokens = generation.tokens
        assert tokens[: len(start)] == start and len(tokens) <= 70
        assert generation.cut_by is None or len(tokens) == 70
        if tokens.count(VOCAB.begin_image_id) > tokens.count(VOCAB.end_image_id):
            assert generation.cut_by
            continue
        for first, stop in VOCAB.find_images(tokens):
            VOCAB.tokens_to_codes(tokens[first:stop])
            num_images += 1
    assert num_images >= 20
    assert {generation.cut_by for generation in generations} == {None, CUT_BY_LENGTH}


@pytest.mark.parametrize(("temperature", "cfg", "is_sharded"), [(0.0, 1.0, True), (1.0, 3.0, False)])
def test_nan_logits_end_their_answer_alone(temperature, cfg, is_sharded):
    """An embedding that is NaN: of a word of two prompts, and of a code that comes within an image."""
    options = SamplingOptions(temperature, cfg=cfg, text_top_k=3)
    prompts, forced = make_prompts((2, 2, 2, 2)), [IMAGE_START, [], IMAGE_START, []]
    prompts[2][1] = prompts[3][1] = small_vocabulary()["the"]

    def answer(model):
        root = RootForward(model, VOCAB, torch.device("cpu"), torch.float32) if is_sharded else None
        return generate_batch(model, prompts, VOCAB, options, 40, forced, forward=root)

    expected, model = answer(make_model()), make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[small_vocabulary()["the"]] = torch.nan
    found = answer(model)
    assert [g.cut_by for g in found[2:]] == [CUT_BY_NAN] * 2 and [g.tokens for g in found[2:]] == forced[2:]
    assert found[0].tokens[:13] == expected[0].tokens[:13] and found[0].cut_by in (None, CUT_BY_LENGTH, CUT_BY_NAN)

    code, model = expected[0].tokens[6], make_model()
    first = expected[0].tokens.index(code)
    with torch.no_grad():
        model.model.embed_tokens.weight[code] = torch.nan
    found = answer(model)[0]
    assert found.cut_by == CUT_BY_NAN and found.tokens[: first + 1] == expected[0].tokens[: first + 1]
    # A new line may follow, for which nothing is drawn.
    assert len(found.tokens) <= first + 2


def test_options_stay_within_the_range_of_fp32():
    for values in (dict(temperature=1e6), dict(temperature=1e-6), dict(cfg=1e6), dict(cfg=-1e6)):
        options = SamplingOptions(**values)
        found = generate_batch(make_model(), make_prompts((3,)), VOCAB, options, 14, [IMAGE_START])[0]
        assert found.cut_by != CUT_BY_NAN and len(found.tokens) >= 13, values
    for values in (dict(temperature=2e6), dict(temperature=-1), dict(cfg=-2e6), dict(text_top_k=0), dict(seed=-1)):
        with pytest.raises(ValueError, match="must be"):
            SamplingOptions(**values)


def test_progress_counts_all_answers():
    seen = []
    generate_batch(
        make_model(), make_prompts(), VOCAB, GREEDY, 12, batch_size=2, progress=lambda *counts: seen.append(counts)
    )
    assert sum(finished for _, finished in seen) == 5 and sum(tokens for tokens, _ in seen) > 5


def test_limits_and_misfits_are_named():
    model = make_model(max_position_embeddings=12)
    cut = generate_batch(model, make_prompts((9,)), VOCAB, GREEDY, 40, [IMAGE_START[:1]])[0]
    assert len(cut.tokens) == 3 and cut.cut_by == CUT_BY_POSITIONS
    assert generate_batch(model, make_prompts((5,)), VOCAB, GREEDY, 4, [IMAGE_START[:1]])[0].cut_by == CUT_BY_LENGTH
    with pytest.raises(ValueError, match="12 tokens leave no room in the model's 12"):
        generate_batch(model, make_prompts((12,)), VOCAB, GREEDY, 40)
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        generate_batch(model, [[VOCAB.bos_id], []], VOCAB, GREEDY, 40)
    with pytest.raises(ValueError, match="max_gen_len must be at least 4, got 3"):
        generate_batch(model, make_prompts(), VOCAB, GREEDY, 3, [IMAGE_START] * 5)


def test_sampling_follows_the_softmax_of_the_top_k():
    grammar, num = ImageGrammar(VOCAB, VOCAB.vocab_size), 4000
    logits = torch.randn(VOCAB.vocab_size, generator=torch.Generator().manual_seed(1))
    codes = torch.from_numpy(VOCAB.image_token_ids)
    text = grammar.allowed[Kind.TEXT].nonzero()[:, 0]
    noise, options = draw_noise(range(num), 16)[:, 3], SamplingOptions(temperature=0.7, image_top_k=5, text_top_k=3)
    for kind, ids, top_k in ((Kind.CODE, codes, 5), (Kind.TEXT, text, 3)):
        drawn = sample_tokens(logits.expand(num, -1), torch.full((num,), kind), grammar.allowed, options, noise)
        best = logits[ids].topk(top_k)
        frequencies = torch.stack([(drawn == token).float().mean() for token in ids[best.indices]])
        assert torch.isin(drawn, ids[best.indices]).all()
        assert (frequencies - (best.values / 0.7).softmax(0)).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [SamplingOptions(image_top_k=7, text_top_k=70), SamplingOptions(), GREEDY], ids=str)
def test_sampling_is_a_function_of_each_row_alone(dtype, options):
    """Same logits, state and noise, same token: alone, among others, in another place."""
    grammar, num = ImageGrammar(VOCAB, VOCAB.vocab_size), 24
    logits = (4 * torch.randn(num, VOCAB.vocab_size, generator=torch.Generator().manual_seed(1))).to(dtype)
    # Equal ones, as rounding makes them.
    logits[:, 1::3] = logits[:, ::3][:, : logits[:, 1::3].shape[1]]
    kind, noise = torch.arange(num) % len(Kind), draw_noise(range(num), 16)[:, 3]
    codes = torch.tensor(sorted(VOCAB.image_token_ids.tolist()))
    tokens = sample_tokens(logits, kind, grammar.allowed, options, noise)
    in_images = sample_codes(logits[:, codes], options, noise)
    among_all = sample_tokens(logits, torch.full((num,), Kind.CODE), grammar.allowed, options, noise)
    assert codes[in_images].equal(among_all)
    for rows in (torch.arange(num).flip(0), *torch.arange(num).split(5), *torch.arange(num).split(1)):
        found = sample_tokens(logits[rows], kind[rows], grammar.allowed, options, noise[rows])
        assert found.equal(tokens[rows])
        assert sample_codes(logits[rows][:, codes], options, noise[rows]).equal(in_images[rows])
        assert draw_noise(rows.tolist(), 16)[:, 3].equal(noise[rows])


def test_noise_next_to_its_bounds_draws_tokens_that_are_allowed():
    grammar = ImageGrammar(VOCAB, VOCAB.vocab_size)
    logits = torch.randn(len(Kind), VOCAB.vocab_size, generator=torch.Generator().manual_seed(3))
    kind = torch.arange(len(Kind))
    for noise in (0.0, 1 - 2**-24, 1.0):
        drawn = sample_tokens(logits, kind, grammar.allowed, SamplingOptions(), torch.full((len(Kind),), noise))
        assert grammar.allowed[kind, drawn].all()


@pytest.mark.parametrize(
    "overrides",
    [{}, dict(num_key_value_heads=2, model_parallel_size=2, swin_norm=True), dict(attention_bias=True, mlp_bias=True)],
)
def test_a_step_gives_the_numbers_of_the_model(overrides):
    model = make_model(**overrides)
    tokens = random_tokens(3 * 9).view(3, 9)
    with torch.no_grad():
        expected = model(tokens).logits[:, -1]
        cache = KVCache.allocate(model.config, 3, 20, torch.float32, [torch.device("cpu")] * 2)
        model(tokens[:, :8], past_key_values=cache)
        # The slot is not next to the others.
        mask = torch.zeros(3, 13).index_fill_(1, torch.arange(8, 12), -torch.inf)
        codes = torch.tensor(sorted(VOCAB.image_token_ids.tolist()))
        # The second time, the weights are joined already.
        for forward in (LeanForward(model, VOCAB), LeanForward(model, VOCAB)):
            for is_image in (False, True):
                slot, positions = torch.tensor([12]), torch.full((3,), 8)
                logits = forward(tokens[:, 8], positions, cache, slot, mask, is_image)
                assert (logits - (expected[:, codes] if is_image else expected)).abs().max() < 1e-5
            assert (model(tokens).logits[:, -1] - expected).abs().max() < 1e-6


def test_a_model_that_generated_can_be_trained_and_saved(tmp_path):
    model = make_model()
    tokens = random_tokens(12)[None]
    model(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    generate_batch(model, make_prompts((3,)), VOCAB, GREEDY, 5)
    model(tokens, labels=tokens).loss.backward()
    assert all(torch.allclose(parameter.grad, expected[name]) for name, parameter in model.named_parameters())
    export_hf(model, model.config, tmp_path / "moved")
    export_hf(make_model(), model.config, tmp_path / "plain")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("moved", "plain")]
    assert files[0] == files[1]


def test_long_prompts_make_logits_of_their_last_token_only():
    model, shapes = make_model(), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[:-1])))
    generate_batch(model, make_prompts((100, 90, 80)), VOCAB, replace(GREEDY, cfg=2.0), 3)
    assert shapes[:2] == [(3, 1), (3, 1)]


class Replay:
    """In the place of a CUDA graph: the step itself, after it was run and put back as before a capture."""

    num_captured = 0

    def __init__(self, step, changing, other):
        before = [tensor.clone() for tensor in changing]
        step()
        for tensor, old in zip(changing, before, strict=True):
            tensor.copy_(old)
        # As a graph, it sees the tensors that were there when it was captured.
        self.replay = step
        Replay.num_captured += 1


@pytest.fixture
def as_on_cuda(monkeypatch):
    for module in ("batch", "loop"):
        monkeypatch.setattr(f"model.generation.{module}.is_cuda", lambda device: True)
    monkeypatch.setattr("model.generation.batch.CUDA_SLOTS", 16)
    monkeypatch.setattr("model.generation.loop.capture_graph", Replay)
    monkeypatch.setattr(Replay, "num_captured", 0)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_static_shapes_as_on_cuda_draw_the_same_tokens(request, cfg):
    prompts, forced = make_prompts() * 2, [IMAGE_START, []] * 5
    both = replace(GREEDY, cfg=cfg), SamplingOptions(1.0, 20, 15, cfg=cfg, seed=5)
    expected = [generate_batch(make_model(), prompts, VOCAB, options, 60, forced) for options in both]
    request.getfixturevalue("as_on_cuda")
    assert [generate_batch(make_model(), prompts, VOCAB, options, 60, forced) for options in both] == expected
    assert Replay.num_captured >= 8, "one for each number of slots, and for images and all else"


def test_buffers_and_graphs_are_kept_between_calls(request, monkeypatch):
    """A graph serves prompts of any length; fewer rows, another seed and less room need no new buffers."""
    model, options = make_model(), SamplingOptions(1.0, 20, 15, cfg=2.0, seed=5)
    batches = [make_prompts((9, 3, 6, 2)), make_prompts((2, 7, 1, 4)), make_prompts((5, 5))]
    expected = [generate_batch(model, prompts, VOCAB, options, 40, [IMAGE_START] * len(prompts)) for prompts in batches]
    request.getfixturevalue("as_on_cuda")
    # One graph attends to all slots, whatever the length.
    monkeypatch.setattr("model.generation.batch.CUDA_SLOTS", 64)
    forward, counts, addresses = LeanForward(model, VOCAB), [], []
    for prompts, answers in zip([*batches, *batches], [*expected, *expected], strict=True):
        found = generate_batch(model, prompts, VOCAB, options, 40, [IMAGE_START] * len(prompts), forward=forward)
        assert found == answers
        counts.append(Replay.num_captured)
        addresses.append(forward.kept_batch.cache.keys[0].data_ptr())
    assert len(set(addresses)) == 1 and counts[2:] == [counts[2]] * 4
    rows = {key[0] for key in forward.kept_batch.graphs}
    assert counts[-1] == len(forward.kept_batch.graphs) <= 2 * len(rows), "one per number of rows, for images and text"


def test_buffers_are_given_back():
    """When another shape needs them, and when the forward goes."""
    model, prompts = make_model(), make_prompts((4, 4))
    forward, sizes = LeanForward(model, VOCAB), []
    for cfg, max_gen_len in ((2.0, 12), (1.0, 12), (2.0, 40)):
        before = forward.kept_batch and StorageWeakRef(forward.kept_batch.cache.layers[0].untyped_storage())
        generate_batch(model, prompts, VOCAB, replace(GREEDY, cfg=cfg), max_gen_len, forward=forward)
        sizes.append(forward.kept_batch.cache.keys[0].shape[:3:2])
        is_kept = before is not None and not before.expired()
        assert is_kept == (cfg == 1)
    assert sizes == [(4, 16), (4, 16), (4, 44)]
    left = StorageWeakRef(forward.kept_batch.cache.layers[0].untyped_storage())
    del forward
    assert left.expired()


def test_no_two_caches_are_alive_at_once(monkeypatch):
    """Also where a later batch of the same call needs a larger one."""
    plain, storages = KVCache.allocate, []

    def allocate(*arguments):
        assert all(storage.expired() for storage in storages)
        cache = plain(*arguments)
        storages.extend(StorageWeakRef(layer.untyped_storage()) for layer in cache.layers)
        return cache

    monkeypatch.setattr(KVCache, "allocate", allocate)
    model, prompts = make_model(), make_prompts((8, 10))
    for forced in ([IMAGE_START, []], [[], []]):
        storages.clear()
        generate_batch(model, prompts, VOCAB, GREEDY, 20, forced, 1)
        assert len(storages) == len(model.model.layers) * (2 if forced[0] else 1)


def test_a_nan_of_an_earlier_call_does_not_stay():
    model, prompts, forced = make_model(), make_prompts((3, 3)), [IMAGE_START] * 2
    prompts[1][1] = small_vocabulary()["the"]
    with torch.no_grad():
        model.model.embed_tokens.weight[small_vocabulary()["the"]] = torch.nan
    forward = LeanForward(model, VOCAB)
    found = generate_batch(model, prompts, VOCAB, GREEDY, 15, forced, forward=forward)
    assert [generation.cut_by for generation in found] == [CUT_BY_LENGTH, CUT_BY_NAN]
    again = generate_batch(model, prompts[:1] * 2, VOCAB, GREEDY, 15, forced, forward=forward)
    assert again == found[:1] * 2


def plain_speculative(model, prompt, start, options, seed, num_tokens):
    """Gumbel-max sampling of the codes of one image, with whole forwards of both branches for every token."""
    codes, tokens = torch.tensor(sorted(VOCAB.image_token_ids.tolist())), list(start)
    for place in range(num_tokens - len(start)):
        allowed = sorted(plain_allowed(tokens))
        if len(allowed) == 1:
            tokens.append(allowed[0])
            continue
        logits, unconditional = (model(torch.tensor([[*row, *tokens]])).logits[0, -1] for row in (prompt, []))
        logits = (unconditional + options.cfg * (logits - unconditional))[codes] / options.temperature
        noise = gumbel_noise(torch.tensor([seed]), torch.tensor([[place]]), len(codes))[0, 0]
        least = logits.sort(descending=True).values[options.image_top_k - 1]
        tokens.append(int(codes[(logits + noise).masked_fill(logits < least, -torch.inf).argmax()]))
    return tokens


def test_guessing_ahead_draws_the_same_tokens(request):
    """Whatever the number of guesses and the batch; greedy as without guesses; with graphs as on CUDA."""
    model, prompts, forced = make_model(), make_prompts((3, 9, 1, 6)), [IMAGE_START, []] * 2
    sampled = SamplingOptions(0.8, 20, 15, cfg=3.0, seed=5, speculative=1)
    greedy = replace(GREEDY, cfg=3.0)
    expected = generate_batch(model, prompts, VOCAB, sampled, 40, forced, forward=RootForward(model, VOCAB, *CPU_FP32))
    with torch.inference_mode():
        for index in (0, 2):
            plain = plain_speculative(model, prompts[index], IMAGE_START, sampled, 5 + index, 16)
            assert expected[index].tokens[:16] == plain
    plain_greedy = generate_batch(model, prompts, VOCAB, greedy, 40, forced)
    for is_cuda in (False, True):
        if is_cuda:
            request.getfixturevalue("as_on_cuda")
        for num_ahead, batch_size in ((1, 64), (5, 3), (64, 64)):
            options = replace(sampled, speculative=num_ahead)
            assert generate_batch(model, prompts, VOCAB, options, 40, forced, batch_size) == expected
        assert generate_batch(model, prompts, VOCAB, replace(greedy, speculative=4), 40, forced) == plain_greedy


def test_guessing_ahead_takes_fewer_forwards_and_counts_all_tokens(monkeypatch):
    model, forwards, counts, plain = make_model(), [], [], LeanForward.__call__
    monkeypatch.setattr(
        LeanForward, "__call__", lambda *args, **more: forwards.append(args[1].shape) or plain(*args, **more)
    )
    progress, prompts = lambda *new: counts.append(new), make_prompts((4, 4))
    generate_batch(model, prompts, VOCAB, replace(GREEDY, speculative=8), 17, [IMAGE_START] * 2, 64, progress)
    # The new lines and the end of the image are known; plain decoding takes 13 steps.
    assert len(forwards) < 11 and set(forwards) <= {(2, 9), (2,)}
    assert sum(tokens for tokens, _ in counts) == 2 * 14 and sum(finished for _, finished in counts) == 2


def test_gumbel_noise_follows_its_distribution_and_depends_on_every_number():
    noise = gumbel_noise(torch.tensor([0, 1, 2**63 - 1]), torch.arange(50).expand(3, 50), 4000)
    assert noise.isfinite().all() and noise.unique().numel() > 0.9 * noise.numel()
    for part in (*noise, noise[:, 0], noise[:, :, 0]):
        # Mean is Euler's constant, variance pi^2 / 6.
        assert abs(part.mean() - 0.5772) < 0.2 and abs(part.var() - 1.645) < 0.6
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(noise[0]).fill_diagonal_(0).abs().max() < 0.08
    again = gumbel_noise(torch.tensor([1]), torch.tensor([[7, 3]]), 4000)
    assert again[0].equal(noise[1, [7, 3]])


@pytest.mark.gpu
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_cuda_graphs_draw_the_same_tokens(monkeypatch, cfg):
    prompts, forced = make_prompts() * 2, [IMAGE_START, []] * 5
    sampled = SamplingOptions(1.0, 20, 15, cfg=cfg, seed=5)
    for options in (replace(GREEDY, cfg=cfg), sampled, replace(sampled, speculative=4)):
        model = make_model().cuda()
        forward = LeanForward(model, VOCAB)
        # The second call replays the graphs of the first.
        found = [generate_batch(model, prompts, VOCAB, options, 60, forced, forward=forward) for _ in range(2)][1]
        with monkeypatch.context() as patch:
            patch.setattr("model.generation.loop.capture_graph", Replay)
            assert generate_batch(make_model().cuda(), prompts, VOCAB, options, 60, forced) == found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_free_memory_is_that_of_the_device(device):
    held = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    before = free_bytes(torch.device(device))
    del held
    freed = free_bytes(torch.device(device)) - before
    # The memory of the host has other users.
    assert before > 0 and (device == "cpu" or abs(freed - (1 << 28)) < 1 << 24)


def test_the_cache_of_a_batch_that_fits_is_no_larger_than_was_counted():
    """A short prompt, which has more room, lies beside a long one."""
    model, options = make_model(max_position_embeddings=64), replace(GREEDY, cfg=2.0)
    prompts = make_prompts((5, 40, 9))
    for max_gen_len in (3, 1000):
        forward = LeanForward(model, VOCAB)
        generate_batch(model, prompts, VOCAB, options, max_gen_len, forward=forward)
        # CUDA would round up.
        counted = forward.kept_batch.cache.nbytes + 2 * 3 * row_bytes(model.config, 512, torch.float32)
        lens = [len(prompt) for prompt in prompts]
        fit = partial(fit_batch_size, model.config, lens, max_gen_len, options, torch.float32)
        assert [fit(counted, 64), fit(counted - 1, 64), fit(0, 64), fit(1 << 40, 64)] == [3, 2, 1, 64]
