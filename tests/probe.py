"""What stays in memory between the forward and the backward pass."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

Sizes = dict[int, int]
"""Elements of each block of memory, by its address."""


def live_tensors() -> Sizes:
    """Every tensor that Python can reach: what closures and contexts hold on to."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return dict(measure(tensor) for tensor in tensors if not left_by_compiler(tensor))


def left_by_compiler(tensor: Tensor) -> bool:
    """Whether a tensor stands for another and has no memory."""
    return isinstance(tensor, FakeTensor | FunctionalTensor) or torch._is_functional_tensor(tensor)


def measure(tensor: Tensor) -> tuple[int, int]:
    """Address and elements of the memory behind a tensor, of which it may show a part."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes() // tensor.element_size()


def kept_elements(forward: Callable[[], Tensor]) -> int:
    """How many numbers ``forward`` leaves behind for backward, its result among them."""
    kept: Sizes = {}

    def note(tensor: Tensor) -> Tensor:
        kept.update([measure(tensor)])
        return tensor

    before = live_tensors()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    kept.update({at: size for at, size in live_tensors().items() if at not in before})
    return sum(kept.values())
