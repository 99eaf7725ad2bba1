"""Whether tensors have changed since something was made of them."""

import weakref
from collections.abc import Iterable

import torch

__all__ = ["Seen"]


class Seen:
    """Which tensors these are, and how often each was written.

    What is written through ``tensor.data``, or into a tensor that was made in inference mode, torch does not
    count, and neither does this.

    Args:
        tensors: of any devices, in an order that stays; they are not kept alive.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        # an address alone may be that of another tensor by now
        self._tensors = [(weakref.ref(tensor), *_state(tensor)) for tensor in tensors]

    def unchanged(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether these are the same tensors, of which none was written since."""
        now = list(tensors)
        return len(now) == len(self._tensors) and all(
            known() is tensor and (address, version) == _state(tensor)
            for tensor, (known, address, version) in zip(now, self._tensors, strict=True)
        )


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
