"""Muon, an optimizer for matrices; which parameters it trains, and AdamW the rest; the learning rate of both."""

import itertools
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightdiff.runtime.processes import Processes
from lightdiff.settings import LoopSettings

MASKING = ("cuda", "cpu")  # where AdamW is one fused kernel that can be made to change nothing
MUON_MIN_SIDE = 16  # a matrix with fewer rows or columns is left to AdamW
STATE_KEYS = ("exp_avg", "exp_avg_sq")  # what an optimizer keeps of a parameter; Muon only the first
MOMENTUM = 0.95
ROUNDS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
SIDES = 3  # sizes that Gram matrices are padded to: a few per cent more to compute, for half the launches
ADAMW_RMS = 0.2  # root mean square of AdamW's updates, in units of lr
ALONE = Processes()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, so that no direction is learnt much faster than another.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the updates scaled as by Liu et al. 2025
    (arXiv:2502.16982), Eq. 4: lr and weight decay mean what they mean for AdamW. Convolutions (out, in, i, j) count as
    matrices of out rows. Where `found_inf` is not 0, a step changes nothing, without waiting for the device.

    Its defaults are `lr`, `weight_decay` and `tf32`, whether CUDA multiplies in TF32.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Sequence[Tensor], defaults: dict[str, Any], processes: Processes = ALONE) -> None:
        """Train `params`, with the same gradients in all processes, which share most of the products."""
        super().__init__(params, defaults)
        self._processes = processes

    def init_state(self) -> None:
        """Make the momentum of all parameters: one flat tensor, matrices of one shape beside each other."""
        params = self.param_groups[0]["params"]
        self._params = sorted(params, key=lambda p: (min(p.shape[0], p[0].numel()), p.shape[0], p.numel()))
        shapes = [(p.shape[0], p[0].numel()) for p in self._params]
        self._blocks = [(len(list(alike)), *shape) for shape, alike in itertools.groupby(shapes)]
        self._sides = padded_sides([(count, min(shape)) for count, *shape in self._blocks])
        scales = [ADAMW_RMS * max(shape) ** 0.5 for shape in shapes]
        self._sizes = [p.numel() for p in self._params]
        self._momentum = params[0].new_zeros(sum(self._sizes))
        self._scales = torch.tensor(scales, dtype=self._momentum.dtype, device=self._momentum.device)
        for p, momentum in zip(self._params, self._parts(self._momentum), strict=True):
            self.state[p] = {"exp_avg": momentum}

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return like_params(torch.split(flat, self._sizes), self._params)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no loss is computed again
        """Update all parameters."""
        if not self.state:
            self.init_state()
        lr, decay, tf32 = (self.param_groups[0][name] for name in ("lr", "weight_decay", "tf32"))
        gradient = torch.empty_like(self._momentum)
        torch._foreach_copy_(self._parts(gradient), [p.grad for p in self._params if p.grad is not None])
        if self.found_inf is not None:
            finite = self.found_inf == 0
            torch.where(finite, gradient, self._momentum, out=gradient)  # which leaves the momentum as it is
            lr = lr * finite
        self._momentum.lerp_(gradient, 1 - MOMENTUM)
        gradient.lerp_(self._momentum, MOMENTUM)
        with multiplying_in_tf32() if tf32 else nullcontext():
            updates = self._orthogonal(gradient, self._scales * lr)
        torch._foreach_mul_(self._params, 1 - lr * decay)
        torch._foreach_sub_(self._params, like_params(updates, self._params))

    def _orthogonal(self, flat: Tensor, factors: Tensor) -> list[Tensor]:
        """The matrices of a flat tensor made orthogonal, times their factors."""
        parts = torch.split(flat, [math.prod(shape) for shape in self._blocks])
        blocks = [part.view(shape) for part, shape in zip(parts, self._blocks, strict=True)]
        found: list[Tensor] = []
        for _, alike in itertools.groupby(zip(self._sides, blocks, strict=True), key=itemgetter(0)):
            group = [block for _, block in alike]
            own = factors[len(found) :][: sum(map(len, group))]
            found += itertools.chain(*orthogonalize(group, own, self._processes))
        return found


def like_params(parts: Iterable[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Views of contiguous tensors as the parameters lie in memory: the order of a matrix's columns does not matter."""
    return [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, params, strict=True)]


def orthogonalize(blocks: Sequence[Tensor], factors: Tensor, processes: Processes = ALONE) -> list[Tensor]:
    """U V^T of each matrix U S V^T, nearly, times its factor: singular values end between 0.7 and 1.2 of that.

    Five rounds of a Newton-Schulz iteration, x -> P x with P = a + b A + c A^2 and A = x x^T (Jordan et al. 2024). Each
    P is a polynomial of the first A, so that rounds need no x: A -> P A P and Q -> P Q, of the shorter side's size, and
    x -> Q x once at the end. Rounding errors of A grow a^2-fold in a round: float32 and TF32 bear that, bfloat16 does
    not. Each process computes Q for its share of the matrices.

    Args:
        blocks: Matrices of one shape each, (k, m, n). Where the shorter side differs, A is padded with zeros.
        factors: Of all matrices.
        processes: All of them; they have the same matrices.
    """
    sides, counts = [min(x.shape[1:]) for x in blocks], [len(x) for x in blocks]
    side = max(sides)
    costs = [m * m * max(x.shape[1:]) + 17 * side**3 for m, x in zip(sides, blocks, strict=True) for _ in x]
    own = deal(costs, processes)
    padded = blocks[0].new_zeros(len(costs), side, side)
    grams = [part[:, :m, :m] for part, m in zip(torch.split(padded, counts), sides, strict=True)]
    first = 0
    for x, gram in zip(blocks, grams, strict=True):
        here = slice(max(0, own.start - first), max(0, own.stop - first))
        first += len(x)
        if len(x[here]):
            torch.bmm(*((x[here], x[here].mT) if is_wide(x) else (x[here].mT, x[here])), out=gram[here])
    mine = padded[own]
    norm = mine.diagonal(dim1=1, dim2=2).sum(1).sqrt() + 1e-7  # of x: A's trace is its square
    mine /= norm.square()[:, None, None]
    torch.mul(newton_schulz(mine), (factors[own] / norm)[:, None, None], out=mine)
    processes.all_reduce_sum(padded)  # the others' are zero
    return [torch.bmm(*((q, x) if is_wide(x) else (x, q))) for x, q in zip(blocks, grams, strict=True)]


def is_wide(matrices: Tensor) -> bool:
    """Whether matrices have at most as many rows as columns."""
    return matrices.shape[1] <= matrices.shape[2]


def newton_schulz(gram: Tensor) -> Tensor:
    """Q, where Q x is what all rounds make of x; from A = x x^T, (k, m, m)."""
    a, b, c = QUINTIC
    q = gram
    for number in range(ROUNDS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a
        if number < ROUNDS - 1:
            gram = torch.baddbmm(gram, p, gram, beta=a)  # P A
            gram = torch.baddbmm(gram, gram, p, beta=a)  # P A P
        if number == 0:
            q = p
            q.diagonal(dim1=1, dim2=2).add_(a)
        else:
            q = torch.baddbmm(q, p, q, beta=a)
    return q


def padded_sides(blocks: Sequence[tuple[int, int]]) -> list[int]:
    """The size to which Gram matrices are padded: few sizes, with the least to compute.

    Args:
        blocks: Of each block of matrices, how many they are and their shorter side.
    """

    def padded(side: int, sizes: tuple[int, ...]) -> int:
        return min(size for size in sizes if size >= side)

    *smaller, largest = sorted({side for _, side in blocks})
    choices = [(*some, largest) for some in itertools.combinations(smaller, min(SIDES - 1, len(smaller)))]
    best = min(choices, key=lambda sizes: sum(count * padded(side, sizes) ** 3 for count, side in blocks))
    return [padded(side, best) for _, side in blocks]


def deal(costs: Sequence[int], processes: Processes) -> slice:
    """Which of some pieces of work are this process's: all have about the same to do, to within one piece."""
    owners, total, before = [], sum(costs), 0
    for cost in costs:
        owners.append((2 * before + cost) * processes.world_size // (2 * total))  # in whose part its middle is
        before += cost
    return slice(bisect_left(owners, processes.rank), bisect_right(owners, processes.rank))


@contextmanager
def multiplying_in_tf32() -> Iterator[None]:
    """Let CUDA multiply float32 in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- which parameters each trains ---------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, loop: LoopSettings, processes: Processes = ALONE) -> list[torch.optim.Optimizer]:
    """The optimizers of a network's parameters: with muon, one of matrices and one of the rest; else AdamW alone."""
    matrices = muon_params(model, loop)
    rest = [p for p in model.parameters() if p.requires_grad and not any(p is matrix for matrix in matrices)]
    lr, decay, fused = loop.lr, loop.weight_decay, next(model.parameters()).device.type in MASKING
    tf32 = loop.precision == "bf16" and next(model.parameters()).device.type == "cuda"
    muon = [Muon(matrices, {"lr": lr, "weight_decay": decay, "tf32": tf32}, processes)] if matrices else []
    betas = (0.9, loop.beta2)
    return muon + ([torch.optim.AdamW(rest, lr, betas, weight_decay=decay, fused=fused)] if rest else [])


def muon_params(model: nn.Module, loop: LoopSettings) -> list[Tensor]:
    """What Muon trains, if it is chosen: weights of convolutions and linear layers on feature maps.

    Those with few rows or columns are left out, as at both ends of a network, those that are frozen, and those of the
    time embedding: square and wide, they would take two thirds of the products of a small U-Net.
    """
    if loop.optimizer != "muon":
        return []
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    weights = [m.weight for name, m in layers.items() if not re.search(r"\btime", name)]
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
    warmup = loop.warmup_steps or 0
    if step < warmup:
        return loop.lr * (step + 1) / warmup
    if loop.lr_schedule == "constant":
        return loop.lr
    after = (step - warmup) / max(1, total_steps - warmup)
    return loop.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
