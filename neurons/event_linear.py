"""A linear layer for inference that fetches the weights of the inputs that fire, and adds integers."""

import math
from collections.abc import Callable

import torch
from torch import nn

from . import functional
from .backend import EVENT_BACKENDS, check_cupy, check_numba
from .changes import Seen
from .rounding import GROUP, LARGEST_SPIKE, LARGEST_SUM, int4_weights, int8_weights

__all__ = ["LARGEST_BATCH", "EventDrivenLinear"]

LARGEST_BATCH = 8  # rows of spikes that one launch of CUDA's kernel takes
_EXACT = 2**24  # float32 holds all integers up to it, so sums in any order are exact


class EventDrivenLinear(nn.Module):
    """``y = scale * (sum over inputs that fire of s_k * W[k, :]) + bias``, integer weights, for inference.

    Spikes are signed integer counts, of any dtype, from -128 to 127. The sums are exact, so every backend,
    number of threads and order gives the same integers.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bias: whether there is one, float32.
        weights: 'int8', with one scale an output, or 'int4', with one for every 32 inputs of an output too.
        backend: 'torch'; 'numba' on the CPU or 'cupy' on CUDA: rows of inputs that do not fire stay where
            they are. A choice that cannot run raises when the layer is called, never silently runs something
            else.

    Attributes:
        weight: int8 ``[in, out]``; 4-bit weights, plus 8, two outputs a byte: uint8 ``[in, ceil(out / 2)]``.
        group_scale: uint8 ``[ceil(in / 32), out]`` of 4-bit weights; None for int8 ones.
        scale: float32 ``[out]``.
        trusts_spikes: take it for granted that spikes on CUDA are integers of int8. Else every call with
            spikes of another dtype looks, for which the processor has to wait for the GPU, but where a graph
            is captured.

    Raises:
        ValueError: a parameter is out of its range, or so many inputs that a sum could leave 32 bits.
    """

    weight: torch.Tensor
    group_scale: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor | None

    trusts_spikes = False
    supported_backends = possible_backends = EVENT_BACKENDS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weights: str = "int8",
        backend: str = "torch",
    ) -> None:
        super().__init__()
        if weights not in ("int8", "int4"):
            raise ValueError(f"weights must be 'int8' or 'int4', got {weights!r}.")
        if weights == "int8" and in_features * LARGEST_SPIKE**2 > LARGEST_SUM:
            raise ValueError(f"{in_features} inputs are too many: a sum could leave 32 bits.")
        self.in_features, self.out_features, self.weights = in_features, out_features, weights
        self.backend = backend
        if weights == "int8":
            self.register_buffer("weight", torch.zeros(in_features, out_features, dtype=torch.int8))
            self.register_buffer("group_scale", None)
        else:
            width = -(-out_features // 2)
            self.register_buffer("weight", torch.full((in_features, width), 0x88, dtype=torch.uint8))
            groups = -(-in_features // GROUP)
            self.register_buffer("group_scale", torch.zeros(groups, out_features, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self._packed: tuple[Seen, object] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weights: str = "int8",
        backend: str = "torch",
        moments: torch.Tensor | None = None,
    ) -> "EventDrivenLinear":
        """The layer with a linear layer's weights, rounded; on its device.

        Args:
            linear: on any device.
            weights, backend: as of the class.
            moments: of 4-bit weights, the sum of ``x x^T`` over inputs for which they are to be rounded,
                ``[in, in]``; see :func:`neurons.rounding.int4_weights`.
        """
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, weights, backend)
        layer.to(linear.weight.device)
        if weights == "int8":
            layer.weight, layer.scale = int8_weights(linear.weight)
        else:
            integers, layer.group_scale, layer.scale = int4_weights(linear.weight, moments)
            layer.weight = _two_a_byte(integers)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().float().clone()
        return layer

    @property
    def backend(self) -> str:
        """The backend that runs the layer."""
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        if backend not in EVENT_BACKENDS:
            raise ValueError(f"backend must be one of {EVENT_BACKENDS}, got {backend!r}.")
        self._backend = backend

    def extra_repr(self) -> str:
        """What ``repr()`` shows between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weights}, backend={self.backend}"
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None}  # made for this processor, at the next call

    def integer_weight(self) -> torch.Tensor:
        """What the sums are of, ``[in, out]``: int8, or int16 with the groups' scales in them."""
        if self.group_scale is None:
            return self.weight
        each = self.group_scale.repeat_interleave(GROUP, 0)[: self.in_features]
        return self.four_bit_integers().to(torch.int16) * each.to(torch.int16)

    def four_bit_integers(self) -> torch.Tensor:
        """The 4-bit weights as int8 ``[in, out]``, from -8 to 7."""
        both = torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1)
        return both[:, : self.out_features].to(torch.int8) - 8

    def integer_sums(self, spikes: torch.Tensor) -> torch.Tensor:
        """``int32 [..., out]`` for spikes ``[..., in]``.

        Raises:
            TypeError: spikes of a dtype that has no integers.
            ValueError: spikes that are no integers from -128 to 127, or of another width.
            RuntimeError: the backend cannot run here.
        """
        spikes = self._as_int8(spikes)
        if self.backend == "numba":
            return self._numba_sums(spikes)
        if self.backend == "cupy":
            return self._cupy_sums(spikes)
        return self._torch_sums(spikes)

    def forward(self, spikes: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]`` in the dtype of the spikes, float32 for integer ones.

        Errors as in :meth:`integer_sums`, and for spikes that want a gradient.
        """
        if torch.is_grad_enabled() and spikes.requires_grad:
            raise ValueError("EventDrivenLinear has no gradient: call it under torch.no_grad().")
        dtype = spikes.dtype if spikes.is_floating_point() else torch.float32
        if self.backend == "cupy" and dtype in (torch.float32, torch.float16, torch.bfloat16):
            return self._cupy_floats(self._as_int8(spikes), dtype)
        return self._scaled(self.integer_sums(spikes)).to(dtype)

    def _scaled(self, sums: torch.Tensor) -> torch.Tensor:
        y = sums * self.scale
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "EventDrivenLinear":
        """As of any module, but scale and bias stay float32: sums of integers leave float16."""
        before = {name: getattr(self, name) for name in ("scale", "bias")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if tensor is not None and (moved := getattr(self, name)).dtype != torch.float32:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _as_int8(self, spikes: torch.Tensor) -> torch.Tensor:
        if spikes.ndim == 0 or spikes.shape[-1] != self.in_features:
            raise ValueError(f"Spikes of width {self.in_features} are wanted, got {list(spikes.shape)}.")
        if spikes.dtype == torch.int8:
            return spikes
        if spikes.is_complex():
            raise TypeError(f"Spikes are integers, got {spikes.dtype}.")
        integers = spikes.to(torch.int8)
        # a graph that is captured can look at nothing: who captures has called it before
        if spikes.is_cuda and (self.trusts_spikes or torch.cuda.is_current_stream_capturing()):
            return integers
        # a value outside int8 does not come back; NaN equals nothing
        if not bool((integers == spikes).all()):
            whole = spikes.isfinite() & (spikes == spikes.round()) if spikes.is_floating_point() else None
            if whole is not None and not bool(whole.all()):
                raise ValueError("Spikes must be integers, as a signed spiking neuron emits them.")
            raise ValueError(f"Spike counts must lie from -128 to 127, got {spikes.min()} to {spikes.max()}.")
        return integers

    def _torch_sums(self, spikes: torch.Tensor) -> torch.Tensor:
        """In float32 where no sum can leave the integers that it holds, several times as fast."""
        weight = self.integer_weight()
        if spikes.numel() and weight.numel() and torch.get_float32_matmul_precision() == "highest":
            low, high = (int(end) for end in spikes.aminmax())
            largest = 127 if self.group_scale is None else 8 * int(self.group_scale.max())
            if max(-low, high) * largest * self.in_features <= _EXACT:
                return (spikes.float() @ weight.float()).to(torch.int32)
        return functional.event_driven_linear(spikes, weight)

    def _numba_sums(self, spikes: torch.Tensor) -> torch.Tensor:
        check_numba()
        if spikes.device.type != "cpu" or self.weight.device.type != "cpu":
            raise RuntimeError(f"backend='numba' runs on the CPU; these spikes are on {spikes.device}.")
        flat = spikes.reshape(math.prod(spikes.shape[:-1]), self.in_features).contiguous()
        packed = self._pack(flat)
        work = flat.shape[0] * self.in_features * self.out_features
        threads = torch.get_num_threads() if work > 2**23 else 1  # starting them takes a while
        sums = torch.from_numpy(packed.sums(flat.numpy(), threads))  # type: ignore[attr-defined]
        return sums.reshape(*spikes.shape[:-1], self.out_features)

    def _cupy_sums(self, spikes: torch.Tensor) -> torch.Tensor:
        """A few rows of spikes event by event; many, which leave no weight alone, as a dense product."""
        flat = self._for_cupy(spikes)
        if len(flat) > LARGEST_BATCH and self._has_dense_product():
            padded = nn.functional.pad(flat, (0, 0, 0, max(0, 32 - len(flat))))  # it wants more than 16
            sums = torch._int_mm(padded, self.weight)[: len(flat)]
        else:
            from .cupy.event_linear.ops import Call, event_driven_linear

            call = Call(8 if self.group_scale is None else 4, self.out_features)
            parts = [
                event_driven_linear(part, self.weight, self.group_scale, call)
                for part in flat.split(LARGEST_BATCH)
            ]
            parts = parts or [flat.new_zeros((0, self.out_features), dtype=torch.int32)]
            sums = parts[0] if len(parts) == 1 else torch.cat(parts)
        return sums.reshape(*spikes.shape[:-1], self.out_features)

    def _cupy_floats(self, spikes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The layer's output for spikes int8; of a few rows in one launch."""
        flat = self._for_cupy(spikes)
        if not 0 < len(flat) <= LARGEST_BATCH:
            return self._scaled(self._cupy_sums(spikes)).to(dtype)
        from .cupy.event_linear.ops import Scaled, event_driven_linear_scaled

        call = Scaled(8 if self.group_scale is None else 4, self.out_features, dtype)
        y = event_driven_linear_scaled(flat, self.weight, self.group_scale, self.scale, self.bias, None, call)
        return y.reshape(*spikes.shape[:-1], self.out_features)

    def _for_cupy(self, spikes: torch.Tensor) -> torch.Tensor:
        """The spikes as rows, after a look at whether the backend can run."""
        if not torch.compiler.is_compiling():  # a look at what is installed is nothing to trace
            check_cupy()
        from .cupy import launcher

        launcher.check_input(spikes, (torch.int8,))
        if self.weight.device != spikes.device:
            raise RuntimeError(f"The spikes are on {spikes.device}, the weights on {self.weight.device}.")
        return spikes.reshape(math.prod(spikes.shape[:-1]), self.in_features)

    def _has_dense_product(self) -> bool:
        """Whether torch's product of int8 matrices takes these weights: on CUDA, of sizes by eights."""
        sizes = self.in_features, self.out_features
        return self.weight.is_cuda and self.group_scale is None and not any(n % 8 for n in sizes)

    def _pack(self, spikes: torch.Tensor) -> object:
        """The weights as the kernels read them, made anew after a weight has changed."""
        from .cpu.linear import PackedLinear, layout_for

        buffers = [self.weight] if self.group_scale is None else [self.weight, self.group_scale]
        if self._packed is None or not self._packed[0].unchanged(buffers):
            share = spikes.count_nonzero().item() / max(1, spikes.numel())
            layout = layout_for(share, 8 if self.group_scale is None else 4)
            if self.group_scale is None:
                packed = PackedLinear(self.weight.numpy(), None, layout)
            else:
                packed = PackedLinear(self.four_bit_integers().numpy(), self.group_scale.numpy(), layout)
            self._packed = Seen(buffers), packed
        return self._packed[1]


def _two_a_byte(integers: torch.Tensor) -> torch.Tensor:
    """Integers from -8 to 7 ``[in, out]``, plus 8, as uint8 ``[in, ceil(out / 2)]``."""
    shifted = (integers + 8).to(torch.uint8)
    if shifted.shape[1] % 2:
        shifted = torch.cat((shifted, torch.full_like(shifted[:, :1], 8)), 1)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)
