"""Optimizers: Muon for what is a matrix, AdamW for the rest, or for all."""

import torch
from torch import Tensor, nn

from lightdiff.settings import LoopSettings

MASKING = ("cuda", "cpu")  # where AdamW is one fused kernel that can be told to leave all as it is
MOMENTUM = 0.95
ROUNDS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
AS_ADAMW = 0.2  # root mean square of AdamW's updates, in units of lr
SMALLEST = 16  # a matrix with fewer rows or columns is left to AdamW
STATE_KEYS = ("exp_avg", "exp_avg_sq")  # what an optimizer keeps of a parameter; Muon the first one alone


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, so that no direction is learnt much faster than another.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the updates scaled as by Liu et al. 2025
    (arXiv:2502.16982), Eq. 4: lr and weight decay mean what they mean for AdamW. Convolutions (out, in, i, j) count as
    matrices of out rows. Where `found_inf` is not 0, a step changes nothing, without waiting for the device.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        """Optimize matrices and convolutions; products of matrices are computed in `dtype`."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        self.found_inf = torch.zeros((), device=params[0].device)
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            alike.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self._stacks = [(group, params[0].new_zeros(len(group), *shape)) for shape, group in alike.items()]
        for group, momentum in self._stacks:
            for p, mine in zip(group, momentum, strict=True):
                self.state[p] = {"exp_avg": mine.view(p.shape)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no loss is computed again
        """Update all parameters, all matrices of one shape at a time."""
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        sound = self.found_inf == 0
        for params, momentum in self._stacks:
            _, rows, columns = momentum.shape
            gradient = torch.stack([p.grad.reshape(rows, columns) for p in params if p.grad is not None])
            gradient = torch.where(sound, gradient, momentum)  # which leaves the momentum as it is
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp_(momentum, MOMENTUM), self.dtype)
            update *= sound * lr * AS_ADAMW * max(rows, columns) ** 0.5
            torch._foreach_mul_(params, 1 - sound * lr * decay)
            torch._foreach_sub_(params, [u.view(p.shape) for u, p in zip(update, params, strict=True)])


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of each matrix U S V^T, nearly: singular values end between 0.7 and 1.2.

    Five rounds of a Newton-Schulz iteration, x -> a x + b (x x^T) x + c (x x^T)^2 x (Jordan et al. 2024).

    Args:
        matrices: (k, m, n).
        dtype: What to compute in; bfloat16 will do.
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


def optimizers_of(model: nn.Module, loop: LoopSettings, precision: str) -> list[torch.optim.Optimizer]:
    """The optimizers of a network's parameters: with muon, of matrices and of the rest; else AdamW alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {id(p): p for p in muon_params(model, loop)}
    found: list[torch.optim.Optimizer] = []
    if matrices:
        dtype = torch.bfloat16 if precision == "bf16" else trained[0].dtype
        found.append(Muon(list(matrices.values()), loop.lr, loop.weight_decay, dtype))
    if rest := [p for p in trained if id(p) not in matrices]:
        fused = trained[0].device.type in MASKING
        found.append(torch.optim.AdamW(rest, loop.lr, (0.9, loop.beta2), weight_decay=loop.weight_decay, fused=fused))
    return found


def optimizer_state_bytes(model: nn.Module, loop: LoopSettings) -> int:
    """What the optimizers keep of a network: two averages of each parameter, one of those that are Muon's."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return len(STATE_KEYS) * trained - sum(p.nbytes for p in muon_params(model, loop))


def muon_params(model: nn.Module, loop: LoopSettings) -> list[Tensor]:
    """What Muon trains, if it is chosen: weights of convolutions and linear layers.

    Those with few rows or columns are left out, as at both ends of a network, and those that are not trained.
    """
    if loop.optimizer != "muon":
        return []
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return [w for w in weights if w.requires_grad and min(w.shape[0], w[0].numel()) >= SMALLEST]
