"""Measures the memory that tensors take, on the meta device as well: no values are computed.

`LiveMemory` sees every tensor that an operation makes and every one that is freed, in the forward
and in the backward pass. `GpuKernels` makes the meta device compute what a GPU would compute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

_LOWER = {F.linear, F.conv2d}
_FLOAT32 = {F.layer_norm, F.group_norm, F.mse_loss}
"""What CUDA's autocast does to the operations of these networks; the rest keeps its dtypes.

https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
"""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside the ``with`` block, as long as they live.

    Memory that a kernel takes for itself (a library's workspace) and what an allocator loses to
    fragmentation are not seen.

    Attributes:
        now: bytes that live at present.
        peak: the most that ever lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count the tensors it returns; views count nothing."""
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                # What comes from outside the block is known, but not counted.
                self._storages.setdefault(value.untyped_storage()._cdata, 0)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._storages.pop(key)


class GpuKernels(TorchFunctionMode):
    """Attention without the matrix of all pairs, and optionally autocast, on the meta device.

    The meta device itself has neither: its attention would keep softmax's (B, heads, N, N), where
    every kernel of a GPU keeps its inputs, its output and one number per query.

    A backward pass is a torch function itself, for whose duration torch leaves the mode: a model
    that checkpoints must do it with `checkpoint`, which enters the mode again to recompute.

    Args:
        autocast: dtype of matrix products and convolutions; None leaves dtypes alone.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self._casts: dict[int, Tensor] = {}

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """For ``enable_gradient_checkpointing``: torch's, computed again as a GPU would."""
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), self._recomputing()),
        )

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        try:
            with self:
                yield
        finally:  # torch leaves by an exception as soon as it has what it needs
            self.end_forward()

    def end_forward(self) -> None:
        """Forget the weights' casts, as autocast does when its block ends."""
        self._casts.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation as a GPU would."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.autocast is not None and func in _LOWER:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif self.autocast is not None and func in _FLOAT32:
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        # Autocast casts a trained weight once per forward pass.
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(self.autocast)
        return self._casts[id(value)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        assert attn_mask is None, "SD3 masks nothing"
        query, key, value = (self._lower_input(x) for x in (query, key, value))
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return output

    def _lower_input(self, value: Tensor) -> Tensor:
        return value if self.autocast is None else value.to(self.autocast)


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return value
