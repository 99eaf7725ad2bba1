"""Kernels as ``torch.library`` operators whose parameters are stated once, by the function that launches.

An operator has a fake kernel and, where one is given, an autograd formula, so it passes through
``torch.compile(fullgraph=True)``. Declaring one needs neither CuPy nor a GPU; running one does.
"""

import functools
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Operator", "operator"]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    list[int]: "SymInt[]",
}


def _dispatches() -> bool:
    """Whether anything but the kernel itself has to see the call: a tracer, a dispatch mode, functorch."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class Operator:
    """``torch.ops.neurons.<name>`` of a function of tensors and constants; called as that function is.

    Args:
        name: within the namespace ``neurons``.
        function: allocates and launches. Its parameters are tensors (``Tensor`` or ``Tensor | None``) and
            then, if there are any, the ``constants`` of the call: a ``NamedTuple``, whose fields are the rest
            of the operator's parameters.
        fake: takes what ``function`` takes; allocates only.
    """

    def __init__(self, name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = self._plain = function
        hints = typing.get_type_hints(function)
        result = hints.pop("return")
        self.constants: Any = None
        if hasattr(list(hints.values())[-1], "_fields"):
            _, self.constants = hints.popitem()
        self.tensors = len(hints)
        fields = hints | (typing.get_type_hints(self.constants) if self.constants else {})
        parameters = ", ".join(f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in fields.items())
        results = ", ".join(_SCHEMA_TYPES[kind] for kind in typing.get_args(result) or (result,))
        schema = f"({parameters}) -> {f'({results})' if typing.get_args(result) else results}"
        self.definition = torch.library.custom_op(
            f"neurons::{name}", lambda *flat: function(*self._nested(flat)), mutates_args=(), schema=schema
        )
        self.definition.register_fake(lambda *flat: fake(*self._nested(flat)))

    def _nested(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """The function's arguments of the operator's."""
        if self.constants is None:
            return flat
        return *flat[: self.tensors], self.constants(*flat[self.tensors :])

    def __call__(self, *arguments: Any) -> Any:
        """Run the operator, as one that torch knows where something dispatches on it."""
        if _dispatches():
            constants = () if self.constants is None else arguments[-1]
            return self.definition(*arguments[: self.tensors], *constants)
        return self._plain(*arguments)  # a custom operator costs the processor 30 us a call

    def differentiable(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Give the operator an autograd formula.

        Args:
            setup_context: ``(ctx, inputs, output)`` as torch has it, ``inputs`` being the function's.
            backward: ``(ctx, *gradients)`` to the gradients to the tensors.
        """
        function = self.function
        nothing = (None,) * (0 if self.constants is None else len(self.constants._fields))

        def forward(ctx: Any, *inputs: Any) -> Any:  # a setup_context of its own would cost 20 us more
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def flat_backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            return backward(ctx, *gradients) + nothing  # more of None than there are inputs is allowed

        self.definition.register_autograd(
            flat_backward,
            setup_context=lambda ctx, inputs, output: setup_context(ctx, self._nested(inputs), output),
        )
        members = {
            "forward": staticmethod(forward),
            "backward": staticmethod(once_differentiable(flat_backward)),
        }
        plain: Any = type(self.definition._name, (torch.autograd.Function,), members)
        self._plain = plain.apply


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Declare the decorated function as ``torch.ops.neurons.<name>``; arguments as for :class:`Operator`."""
    return lambda function: Operator(name, function, fake)
