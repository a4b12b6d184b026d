"""Cross-entropy and z-loss, fused with the matmul of the language-model head.

Logits exist for one chunk of targets at a time: the forward computes the chunk's gradients too, and drops the logits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model.decoder.attention import computes_as_cuda

# As in data/items/vocab.py, which the model does not import.
IGNORE_INDEX = -100
# Logits of one chunk: at a vocabulary of 65,536 they are of 512 targets, on CUDA of 2,048 (512 MiB in fp32). Fewer make
# the matmuls slow, more cost memory.
_CHUNK_LOGITS, _CHUNK_LOGITS_CUDA = 2**25, 2**27
_MIN_CHUNK = 64


class HeadLoss(NamedTuple):
    """What `LossHead` returns with labels: of every valid target fp32 or int64 [num_valid], without gradients."""

    # A scalar with a gradient, `loss_scale * sum(ce + z_loss_weight * lse^2)`.
    loss: torch.Tensor
    ce: torch.Tensor
    # The log-normalizer, whose square is the z-loss.
    lse: torch.Tensor
    targets: torch.Tensor


class LossHead(nn.Linear):
    """A linear head that, given labels, returns the loss instead of logits.

    The loss is computed in the head's own forward, because FSDP gathers the weight only there.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        loss_scale: float | torch.Tensor | None = None,
        z_loss_weight: float = 0.0,
        masked_ids: torch.Tensor | None = None,
        num_valid: int | None = None,
    ) -> torch.Tensor | HeadLoss:
        """`HeadLoss` with labels, logits [..., V] without.

        Args:
            hidden_states: [..., D].
            labels: int64 [...], the target of every position (already shifted), `IGNORE_INDEX` where there is none.
            loss_scale: factor on the sum over valid targets; None divides by their number (a mean).
            masked_ids: int64 [M] token ids whose logits are masked out, or None.
            num_valid: how many labels are targets, as the host knows it; None: the host waits for the device.
        """
        rows, row_ids = self.trained_rows(hidden_states.device)
        if labels is None:
            weight = self.weight if rows is None else self.weight.index_copy(0, row_ids, rows.to(self.weight.dtype))
            return F.linear(hidden_states, weight, self.bias)
        flat_labels = labels.reshape(-1)
        valid = _target_positions(flat_labels, num_valid)
        targets = flat_labels.index_select(0, valid)
        flat_hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, valid)
        scale = 1.0 / max(valid.numel(), 1) if loss_scale is None else loss_scale
        # Inside a Function gradients are always off, so whether they are wanted is an argument.
        is_grad_enabled = torch.is_grad_enabled()
        loss, ce, lse = _FusedLinearLoss.apply(
            flat_hidden, self.weight, rows, row_ids, targets, scale, z_loss_weight, masked_ids, is_grad_enabled
        )
        return HeadLoss(loss, ce, lse, targets)

    def trained_rows(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Rows [M, D] that replace rows of the weight, and their ids int64 [M] on `device`: here none."""
        return None, None


def shift_labels(labels: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The target of every position: the label of the next, `IGNORE_INDEX` at the end of a row or document."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(device=labels.device, dtype=torch.int64) - 1
        targets = targets.index_fill(1, ends, IGNORE_INDEX)
    return targets


def reject_image_targets(targets: torch.Tensor, image_ids: torch.Tensor) -> None:
    """Raises ValueError if a target is one of `image_ids`, whose logits are masked: its loss would be infinite."""
    is_image = torch.isin(targets, image_ids)
    if is_image.any():
        raise ValueError(
            f"{int(is_image.sum())} targets are image tokens (the first is id {int(targets[is_image][0])}), but "
            "mask_image_logits is on, so their loss would be infinite. Train without mask_image_logits, or set the "
            f"labels of images to {IGNORE_INDEX}."
        )


def _target_positions(labels: torch.Tensor, num_valid: int | None) -> torch.Tensor:
    """Positions int64 [num_valid] of the targets among `labels` [N], in order."""
    if num_valid is None:
        return (labels != IGNORE_INDEX).nonzero(as_tuple=True)[0]
    # Not nonzero(): the host would wait for the size of its result. A stable sort puts the targets first, in order.
    return torch.argsort((labels == IGNORE_INDEX).to(torch.uint8), stable=True)[:num_valid]


class _FusedLinearLoss(torch.autograd.Function):
    """
    With l = x W^T, lse = log sum exp l, p = exp(l - lse), s the scale and z the weight of the z-loss:
    loss = s * sum(lse - l[y] + z * lse^2) and d loss / d l = s * (p * (1 + 2 z lse) - onehot(y)).
    `rows` [M, D] replace the rows `row_ids` of W, and get a gradient in the place of W.
    """

    @staticmethod
    def forward(ctx, hidden, weight, rows, row_ids, targets, scale, z_loss_weight, masked_ids, is_grad_enabled):
        num_targets, vocab_size = hidden.shape[0], weight.shape[0]
        # Softmax, sums and the gradient of W in at least fp32: bf16 would lose small terms.
        acc_dtype = torch.promote_types(weight.dtype, torch.float32)
        needs_hidden, needs_weight, needs_rows = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        if rows is not None:
            weight = weight.index_copy(0, row_ids, rows.to(weight.dtype))
        grad_rows = torch.zeros(rows.shape, dtype=acc_dtype, device=rows.device) if needs_rows else None
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=acc_dtype, device=weight.device) if needs_weight else None
        ce = torch.empty(num_targets, dtype=acc_dtype, device=hidden.device)
        lse = torch.empty_like(ce)
        chunk = max(_MIN_CHUNK, (_CHUNK_LOGITS_CUDA if computes_as_cuda(hidden) else _CHUNK_LOGITS) // vocab_size)
        for start in range(0, num_targets, chunk):
            part = slice(start, min(start + chunk, num_targets))
            x, y = hidden[part], targets[part, None]
            logits = (x @ weight.t()).to(acc_dtype)
            if masked_ids is not None:
                logits.index_fill_(1, masked_ids, torch.finfo(acc_dtype).min)
            # Beside the matmuls, the cost is passes over the logits. So everything is in place, and the exponentials
            # are computed once, for the sum and for p.
            target_logits, largest = logits.gather(1, y)[:, 0], logits.amax(-1, keepdim=True)
            # Less the largest logit, no exponential overflows.
            exps = logits.sub_(largest).exp_()
            total = exps.sum(-1, keepdim=True)
            row_lse = total.log() + largest
            lse[part] = row_lse[:, 0]
            ce[part] = lse[part] - target_logits
            if not (needs_hidden or needs_weight or needs_rows):
                continue
            # d loss / d l. All factors of p are [chunk, 1], the scale among them: one pass over the logits.
            grad_logits = exps.mul_(scale * (1 + 2 * z_loss_weight * row_lse) / total)
            grad_logits.scatter_add_(1, y, scale * torch.full_like(total, -1.0))
            grad_logits = grad_logits.to(x.dtype)
            if needs_hidden:
                grad_hidden[part] = grad_logits @ weight
            if needs_weight and grad_logits.dtype == acc_dtype:
                grad_weight.addmm_(grad_logits.t(), x)
            elif needs_weight:
                # addmm_ takes one type only; here the product is in bf16 and the sum in fp32.
                grad_weight += grad_logits.t() @ x
            if needs_rows:
                grad_rows += grad_logits.index_select(1, row_ids).t() @ x
        # From the sums that are reported, so that loss and report agree to the bit.
        loss = (ce.sum() + z_loss_weight * lse.square().sum()) * scale
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype)
        if needs_rows:
            grad_rows = grad_rows.to(rows.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_rows)
        ctx.mark_non_differentiable(ce, lse)
        return loss, ce, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_ce, _grad_lse):
        # The gradients are ready; the loss may have been scaled since.
        grads = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None, None
