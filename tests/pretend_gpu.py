"""A GPU that is not there: tensors on cuda have shapes, dtypes and devices, but no numbers.

torch's FakeTensorMode finds out what each operation would return, and raises where devices are mixed, as CUDA does.
Around it, `PretendGPU` lists what would wait for the device, counts what would be launched there, adds up the memory
that tensors take there, and notes on which GPUs anything was made. Tensors on the CPU stay real; what comes back from
the device is zeros.
"""

import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TESTED_WITH = "2.14"  # of torch: what is used of it is not all public
WAITING = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::is_nonzero")
NO_KERNEL = ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
WHOLE = ("aten::silu_backward",)  # has a kernel of its own on GPUs, and a way to do without
GIB = 1 << 30


class PretendGPU:
    """What a process of this rank does to the GPUs of its machine, from `with` on, in all threads."""

    def __init__(self, rank: int = 0, count: int = 8) -> None:
        self.rank, self.count = rank, count
        self.waits: list[str] = []  # what waited, and the line of lightdiff that asked for it
        self.kernels: Counter[str] = Counter()  # operations that are launched, by name
        self.used: set[int] = set()  # numbers of the GPUs that something was made on
        self.live, self.peak = 0, 0  # bytes of all storages on the GPUs: now, and at most
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._unpacked: list[list[Tensor]] = []  # what autograd's node at work has taken of what the forward pass kept
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._current = threading.local()  # as CUDA has it: each thread begins at device 0
        self._pinned: list[Tensor] = []
        self._patches = ExitStack()

    def __enter__(self) -> "PretendGPU":
        torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing
        cuda = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: self.count,
            "current_device": lambda: getattr(self._current, "index", 0),
            "set_device": self._set_device,
            "synchronize": lambda device=None: self._wait("synchronize"),
            "is_bf16_supported": lambda including_emulation=True: True,
            "is_current_stream_capturing": lambda: False,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (100 * GIB, 140 * GIB),
            "max_memory_allocated": lambda device=None: self.peak,
            "reset_peak_memory_stats": lambda device=None: setattr(self, "peak", self.live),
        }
        for name, value in cuda.items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, value))
        run, submit, generator, tensor, tolist = (
            threading.Thread.run,
            ThreadPoolExecutor.submit,
            torch.Generator,
            torch.tensor,
            Tensor.tolist,
        )

        def run_on_gpu(thread: threading.Thread) -> None:
            with _Operations(self):
                run(thread)

        def submit_and_wait(pool: ThreadPoolExecutor, *work: Any) -> Future[Any]:
            future = submit(pool, *work)
            wait([future])  # FakeTensorMode is for one thread at a time
            return future

        def tensor_on_cpu_first(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
            on_cpu = tensor(data, dtype=dtype, device="cpu")  # torch.tensor goes past the dispatcher
            return on_cpu.to(device or torch.utils._device.CURRENT_DEVICE or "cpu")

        replaced: list[tuple[Any, str, Any]] = [
            (threading.Thread, "run", run_on_gpu),
            (ThreadPoolExecutor, "submit", submit_and_wait),
            (torch, "tensor", tensor_on_cpu_first),
            (torch, "Generator", lambda device="cpu": generator("cpu")),  # there are no others here
            (Tensor, "backward", lambda loss: backward(loss, self._free_unpacked)),
            (Tensor, "pin_memory", lambda x: self._pin(x)),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True),  # but for fakes
            (FakeTensor, "tolist", lambda x: tolist(x.cpu())),  # one copy, not one for each number
            (nn.Module, "_apply", _apply),
        ]
        for owner, name, value in replaced:
            self._patches.enter_context(mock.patch.object(owner, name, value))
        # Each in a list of its own, so that it can be let go once it has been used, as autograd's engine does
        self._patches.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: [x], self._unpack))
        self._patches.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """What is launched inside."""
        before = self.kernels.copy()
        found: Counter[str] = Counter()
        yield found
        found.update(self.kernels - before)

    def _set_device(self, device: int | torch.device) -> None:
        self._current.index = device if isinstance(device, int) else torch.device(device).index

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned.append(x)
        self.used.add(torch.cuda.current_device())  # its context is made, if there is none
        return x

    def is_pinned(self, x: Tensor) -> bool:
        return any(x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in self._pinned)

    def _unpack(self, kept: list[Tensor]) -> Tensor:
        self._unpacked.append(kept)
        return kept[0]

    def _free_unpacked(self) -> None:
        for kept in self._unpacked:
            kept.clear()
        self._unpacked.clear()

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage for as long as it lives."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._release(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size

    def _wait(self, what: str) -> None:
        frames = traceback.extract_stack()
        line = next((f for f in reversed(frames) if "/lightdiff/" in f.filename and "/tests/" not in f.filename), None)
        self.waits.append(f"{what} at {line.filename.rpartition('/')[2]}:{line.lineno}" if line else what)

    def operate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """One operation, some of whose tensors are on the GPU, or whose result is to be."""
        name, tensors = func._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "aten::_local_scalar_dense":
            self._wait("a number")
            return tensors[0].dtype == torch.bool
        if name in ("aten::_to_copy", "aten::copy_"):
            self._check_copy(name, args, kwargs)
            if name == "aten::copy_" and not isinstance(args[0], FakeTensor):
                return args[0]
        elif name in WAITING:
            self._wait(name)
        elif name in ("aten::index", "aten::index_put", "aten::index_put_"):
            indices = [x for x in args[1] if x is not None]
            if any(not isinstance(x, FakeTensor) or x.dtype == torch.bool for x in indices):
                self._wait(f"{name} by a mask or from the CPU")
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in NO_KERNEL:
            self.kernels[name] += 1
        if "_fused_adamw_" in name:
            assert len({x.device for x in tensors}) == 1, f"{name} on {sorted({str(x.device) for x in tensors})}"
            return None
        if "generator" in kwargs:
            kwargs["generator"] = None
        with self.fake:
            result = func(*tree_map(_hollow, args), **tree_map(_hollow, kwargs))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == "cuda":
                self.used.add(x.device.index)
                self._hold(x.untyped_storage())
        return tree_map(_from_device, result)

    def _check_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a copy between the CPU and the GPU that waits."""
        source = args[1] if name == "aten::copy_" else args[0]
        to = args[0].device if name == "aten::copy_" else torch.device(kwargs.get("device") or source.device)
        non_blocking = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
        if (to.type == "cuda") == (source.device.type == "cuda"):
            return
        if not non_blocking or (to.type == "cuda" and not self.is_pinned(source)):
            self._wait(f"a copy to {to.type}")


class _Operations(TorchDispatchMode):
    """Sends to the GPU what belongs there; tensors of the CPU stay what they are."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        kwargs = dict(kwargs or {})
        if not any(map(_is_on_gpu, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func.namespace == "prim":
            return args[0].device
        if func._schema.name not in WHOLE:
            with self:  # under inference_mode, what consists of other operations arrives whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        return self.gpu.operate(func, args, kwargs)


def _is_on_gpu(x: object) -> bool:
    return isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda")


def _hollow(x: object) -> object:
    """A tensor without numbers for one of the CPU; with them, FakeTensorMode would compute."""
    real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if real else x  # type: ignore[union-attr]


def _from_device(x: object) -> object:
    """Zeros, or True, for what has come to the CPU."""
    if not isinstance(x, FakeTensor) or x.device.type != "cpu":
        return x
    return torch.full(x.shape, x.dtype == torch.bool, dtype=x.dtype)


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` with new parameters; torch's swaps the old ones for them, which fakes do not allow."""
    for child in module.children():
        child._apply(change)
    with torch.no_grad():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(change(p), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = change(b)
    return module


def backward(loss: Tensor, after_node: Callable[[], None]) -> None:
    """Autograd's walk from the loss to the parameters; its own engine asks for CUDA's streams."""
    order: list[Any] = []
    seen: set[Any] = {None}
    stack: list[tuple[Any, bool]] = [(loss.grad_fn, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((n, False) for n, _ in node.next_functions)]
    inbox: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    walk = mock.patch.object(torch._C, "_current_graph_task_id", return_value=id(inbox))  # for checkpointing
    with torch.no_grad(), torch.autocast("cuda", enabled=False), walk:
        for node in reversed(order):
            arrived = inbox.pop(node, {})
            if arrived and hasattr(node, "variable"):
                parameter: nn.Parameter = node.variable
                parameter.grad = arrived[0] if parameter.grad is None else parameter.grad.add_(arrived[0])
            elif arrived:
                sent = node(*(arrived.pop(i, None) for i in range(len(node._input_metadata))))
                after_node()
                for (to, i), gradient in zip(
                    node.next_functions, sent if isinstance(sent, tuple) else (sent,), strict=True
                ):
                    if to is not None and gradient is not None:
                        wanted, box = to._input_metadata[i], inbox.setdefault(to, {})
                        assert gradient.device == wanted.device, f"a gradient on {gradient.device}, not {wanted.device}"
                        gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                        box[i] = box[i] + gradient if i in box else gradient
                del sent, gradient  # not alive while the next node is at work
