"""The fused loss against a plain one."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from model.decoder import loss as loss_module
from model.decoder.attention import as_on_cuda
from model.decoder.loss import IGNORE_INDEX, LossHead


def plain_loss(hidden, weight, labels, scale, z_loss_weight, masked_ids=None):
    """Logits of everything at once, cross-entropy and squared log-normalizer by the book."""
    valid = labels != IGNORE_INDEX
    logits = (hidden @ weight.t())[valid]
    if masked_ids is not None:
        logits = logits.index_fill(1, masked_ids, torch.finfo(logits.dtype).min)
    ce = F.cross_entropy(logits, labels[valid], reduction="sum")
    return scale * (ce + z_loss_weight * torch.logsumexp(logits, -1).square().sum())


def make_case(dtype, num=50, width=16, vocab_size=40):
    generator = torch.Generator().manual_seed(0)
    head = LossHead(width, vocab_size, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocab_size, width, generator=generator) * 0.3)
    hidden = torch.randn(num, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (num,), generator=generator)
    labels[torch.rand(num, generator=generator) < 0.3] = IGNORE_INDEX
    return head, hidden, labels


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("chunk", "is_masked"), [(1, False), (7, True), (1000, True)])
def test_equals_the_plain_loss(monkeypatch, dtype, bound, chunk, is_masked):
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 40 * chunk)
    monkeypatch.setattr(loss_module, "_MIN_CHUNK", 1)
    head, hidden, labels = make_case(dtype)
    masked_ids = torch.tensor([3, 8, 9]) if is_masked else None
    if is_masked:
        labels[torch.isin(labels, masked_ids)] = 5
    result = head(hidden, labels, 0.37, 1e-2, masked_ids)
    (3 * result.loss).backward()
    plain_hidden = hidden.detach().to(torch.float64).requires_grad_()
    plain_weight = head.weight.detach().to(torch.float64).requires_grad_()
    expected = plain_loss(plain_hidden, plain_weight, labels, 0.37, 1e-2, masked_ids)
    (3 * expected).backward()
    assert abs(result.loss.item() / expected.item() - 1) < bound
    assert relative_error(hidden.grad.double(), plain_hidden.grad) < bound
    assert relative_error(head.weight.grad.double(), plain_weight.grad) < bound
    valid = labels != IGNORE_INDEX
    assert torch.equal(result.targets, labels[valid]) and len(result.ce) == len(result.lse) == valid.sum()
    assert torch.isclose(result.ce.sum() * 0.37 + 0.37e-2 * result.lse.square().sum(), result.loss)


def test_the_scale_is_a_number_a_tensor_or_gives_the_mean():
    head, hidden, labels = make_case(torch.float64)
    mean = plain_loss(hidden, head.weight, labels, 1 / (labels != IGNORE_INDEX).sum(), 1e-5)
    assert torch.isclose(head(hidden, labels, z_loss_weight=1e-5).loss, mean)
    assert torch.equal(head(hidden, labels, torch.tensor(0.25)).loss, head(hidden, labels, 0.25).loss)


def test_no_gradients_are_made_when_none_are_wanted():
    head, hidden, labels = make_case(torch.float32)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))
    with torch.no_grad():
        evaluated = head(hidden, labels).loss
    assert not evaluated.requires_grad and torch.equal(evaluated, head(hidden, labels).loss)
    head.requires_grad_(False)
    head(hidden, labels).loss.backward()
    assert head.weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("is_blank", [False, True])
def test_a_known_number_of_targets_changes_nothing(is_blank):
    head, hidden, labels = make_case(torch.float32)
    if is_blank:
        labels.fill_(IGNORE_INDEX)
    results = []
    for num_valid in (None, int((labels != IGNORE_INDEX).sum())):
        head.weight.grad = hidden.grad = None
        result = head(hidden, labels, num_valid=num_valid)
        result.loss.backward()
        results.append((result.loss, result.ce, result.targets, hidden.grad, head.weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_chunks_are_of_2048_targets_on_cuda(monkeypatch):
    """Where a plan counts as CUDA does, too."""
    sizes, exp = [], torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda logits: sizes.append(len(logits)) or exp(logits))
    head, hidden, labels = make_case(torch.float32, num=4000, width=2, vocab_size=65536)
    labels[:] = 5
    for place in (contextlib.nullcontext(), as_on_cuda()):
        with place, torch.no_grad():
            head(hidden[:2500], labels[:2500])
    assert sizes == [512] * 4 + [452] + [2048, 452]
