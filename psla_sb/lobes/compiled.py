"""Modules made faster for batches of the shapes that come often: compiled, or recorded as a CUDA graph."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from psla_sb.errors import InputError


class Compiled(nn.Module):
    """Calls a module compiled for training on batches of `n_clips`, and as it is for all others.

    To compile takes minutes, for every other shape again. So a short last batch goes the module's own way, and so does all that is
    not training.

    Arguments
    ---------
    fallback
        What is called with the error if the module cannot be compiled, which then is called as it is. By default an InputError.

    Example
    -------
    >>> linear = nn.Linear(2, 3)
    >>> compiled = Compiled(linear, n_clips=100)
    >>> compiled(torch.zeros(7, 2)).shape, [name for name, _ in compiled.named_parameters()]
    (torch.Size([7, 3]), ['_orig_mod.weight', '_orig_mod.bias'])
    """

    def __init__(self, module: nn.Module, n_clips: int, fallback: Any = None, **options: Any) -> None:
        super().__init__()
        # as the compiler's own wrapper calls it
        self._orig_mod = module
        self.n_clips, self.fallback = n_clips, fallback
        # in a tuple: it is no part of the module, whose weights are to have one name
        self._compiled: Any = (torch.compile(module, **options),)
        self.tried = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_training = self._orig_mod.training and torch.is_grad_enabled()
        if len(x) != self.n_clips or not is_training or self._compiled is None:
            return self._orig_mod(x, *args, **kwargs)
        if self.tried:
            return self._compiled[0](x, *args, **kwargs)
        self.tried = True
        try:
            # with the backward pass, which would be compiled when it is first wanted, out of reach of what catches an error here
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return self._compiled[0](x, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, of other people's modules, of a machine without a C compiler
            self._compiled = None
            reason = f"{type(self._orig_mod).__qualname__} cannot be compiled: {type(error).__name__}: {str(error).strip()[:300]}"
            if self.fallback is None:
                raise InputError(f"{reason}. Set compile_model to False") from error
            self.fallback(reason)
            return self._orig_mod(x, *args, **kwargs)


# More values than a batch of 32 clips of 10 s has keep a GPU busy for longer than it takes to launch its kernels.
LARGEST_RECORDED = 32 * 1056 * 128
MOST_SHAPES = 8


class Recorded(nn.Module):
    """Calls a module on a GPU as a recording of its kernels (a CUDA graph), if the input is small and of a shape that came before.

    One clip's kernels are done before the next ones can be launched, one by one. What the module does must not depend on values,
    and its weights must not move. With gradients, and on another device, it is called as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module
        self._lock = threading.Lock()
        # by shape, dtype and autocast: None for those that came once; else the graph, its input and its answer
        self._recordings: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy makes recordings of its own
        return Recorded, (self._orig_mod,)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        small = isinstance(x, Tensor) and x.is_cuda and x.numel() <= LARGEST_RECORDED
        if not small or self._orig_mod.training or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return self._orig_mod(x, *args, **kwargs)
        kind = x.shape, x.dtype, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with self._lock:
            if kind not in self._recordings:
                # the first time libraries choose their kernels, which cannot be recorded
                if len(self._recordings) < MOST_SHAPES:
                    self._recordings[kind] = None
                return self._orig_mod(x, *args, **kwargs)
            if self._recordings[kind] is None:
                self._recordings[kind] = self._record(x)
            graph, given, answer = self._recordings[kind]
            given.copy_(x)
            graph.replay()
            # the next replay writes there
            return answer.clone()

    def _record(self, x: Tensor) -> tuple[Any, Tensor, Tensor]:
        graph, given = torch.cuda.CUDAGraph(), x.clone()
        # weights that autocast has cast would be freed while the graph still reads them
        before = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                answer = self._orig_mod(given)
        finally:
            torch.set_autocast_cache_enabled(before)
        return graph, given, answer
