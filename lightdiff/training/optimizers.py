"""Muon, an optimizer for matrices; which parameters it trains, and AdamW the rest; the learning rate of both."""

import math

import torch
from torch import Tensor, nn

from lightdiff.settings import LoopSettings

MASKING = ("cuda", "cpu")  # where AdamW is one fused kernel that can be made to change nothing
MUON_MIN_SIDE = 16  # a matrix with fewer rows or columns is left to AdamW
STATE_KEYS = ("exp_avg", "exp_avg_sq")  # what an optimizer keeps of a parameter; Muon only the first
MOMENTUM = 0.95
ROUNDS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
ADAMW_RMS = 0.2  # root mean square of AdamW's updates, in units of lr


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, so that no direction is learnt much faster than another.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the updates scaled as by Liu et al. 2025
    (arXiv:2502.16982), Eq. 4: lr and weight decay mean what they mean for AdamW. Convolutions (out, in, i, j) count as
    matrices of out rows. Where `found_inf` is not 0, a step changes nothing, without waiting for the device.

    Its defaults are `lr`, `weight_decay` and `dtype`, in which products of matrices are computed.
    """

    found_inf: Tensor | None = None
    _stacks: list[tuple[list[Tensor], Tensor]]

    def init_state(self) -> None:
        """Make the momentum of all parameters: one tensor for all matrices of one shape, (k, rows, columns)."""
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for p in self.param_groups[0]["params"]:
            alike.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self._stacks = [(group, group[0].new_zeros(len(group), *shape)) for shape, group in alike.items()]
        for group, momentum in self._stacks:
            for p, own in zip(group, momentum, strict=True):
                self.state[p] = {"exp_avg": own.view(p.shape)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no loss is computed again
        """Update all parameters, all matrices of one shape at a time."""
        if not self.state:
            self.init_state()
        lr, decay, dtype = (self.param_groups[0][name] for name in ("lr", "weight_decay", "dtype"))
        for params, momentum in self._stacks:
            _, rows, columns = momentum.shape
            finite = momentum.new_ones((), dtype=torch.bool) if self.found_inf is None else self.found_inf == 0
            gradient = torch.stack([p.grad.reshape(rows, columns) for p in params if p.grad is not None])
            gradient = torch.where(finite, gradient, momentum)  # which leaves the momentum as it is
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalize(gradient.lerp_(momentum, MOMENTUM), dtype)
            update *= finite * lr * ADAMW_RMS * max(rows, columns) ** 0.5
            torch._foreach_mul_(params, 1 - finite * lr * decay)
            torch._foreach_sub_(params, [u.view(p.shape) for u, p in zip(update, params, strict=True)])


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of each matrix U S V^T, nearly: singular values end between 0.7 and 1.2.

    Five rounds of a Newton-Schulz iteration, x -> a x + b (x x^T) x + c (x x^T)^2 x (Jordan et al. 2024).

    Args:
        matrices: (k, m, n).
        dtype: What to compute in; bfloat16 is enough.
    """
    a, b, c = QUINTIC
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.shape[1] <= x.shape[2]
    x = (x if wide else x.mT).to(dtype)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    found: Tensor = x if wide else x.mT
    return found.to(matrices.dtype).contiguous()


# --- which parameters each trains ---------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, loop: LoopSettings) -> list[torch.optim.Optimizer]:
    """The optimizers of a network's parameters: with muon, one of matrices and one of the rest; else AdamW alone."""
    matrices = muon_params(model, loop)
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is matrix for matrix in matrices)]
    lr, decay, fused = loop.lr, loop.weight_decay, next(model.parameters()).device.type in MASKING
    dtype = torch.bfloat16 if loop.precision == "bf16" else next(model.parameters()).dtype
    muon = [Muon(matrices, {"lr": lr, "weight_decay": decay, "dtype": dtype})] if matrices else []
    betas = (0.9, loop.beta2)
    return muon + ([torch.optim.AdamW(rest, lr, betas, weight_decay=decay, fused=fused)] if rest else [])


def muon_params(model: nn.Module, loop: LoopSettings) -> list[Tensor]:
    """What Muon trains, if it is chosen: weights of convolutions and linear layers.

    Those with few rows or columns are left out, as at both ends of a network, and those that are frozen.
    """
    if loop.optimizer != "muon":
        return []
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return [w for w in weights if w.requires_grad and min(w.shape[0], w[0].numel()) >= MUON_MIN_SIDE]


def optimizer_state_bytes(model: nn.Module, loop: LoopSettings) -> int:
    """What the optimizers keep of a network: two averages of each parameter, one of those that are Muon's."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return len(STATE_KEYS) * trained - sum(p.nbytes for p in muon_params(model, loop))


def learning_rate(loop: LoopSettings, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear from lr / warmup_steps to lr, then constant, or a half cosine that reaches 0 at the end
    (Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5, without restarts).
    """
    if step < loop.warmup_steps:
        return loop.lr * (step + 1) / loop.warmup_steps
    if loop.lr_schedule == "constant":
        return loop.lr
    after = (step - loop.warmup_steps) / max(1, total_steps - loop.warmup_steps)
    return loop.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
