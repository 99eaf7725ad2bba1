"""Neurons and surrogates by name, so that a configuration can hold them.

A spec is plain data: ``{"class": "neurons.SILIFNode", "args": {"max_spike_count": 8}}``. A class is one
exported name of ``neurons``, ``neurons.surrogate``, ``spikingjelly.activation_based.neuron`` or
``spikingjelly.activation_based.surrogate``, or one that the user has registered in this process. Nothing
is imported because a spec asks for it: specs come from downloaded files.
"""

import difflib
import importlib
import inspect
import json
from typing import Any

from spikingjelly.activation_based.base import MemoryModule
from spikingjelly.activation_based.surrogate import SurrogateFunctionBase
from torch import nn

__all__ = ["build", "register", "spec_of"]

_KINDS = (MemoryModule, SurrogateFunctionBase)
_MODULES = (
    "neurons",
    "neurons.surrogate",
    "spikingjelly.activation_based.neuron",
    "spikingjelly.activation_based.surrogate",
)
_registered: dict[str, type[nn.Module]] = {}


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Allow a node or surrogate class of one's own in configurations; usable as a decorator.

    Its name there is ``module.qualified_name``. A process that loads such a configuration registers the
    class first.

    Raises:
        TypeError: ``cls`` is neither a spikingjelly ``MemoryModule`` nor a ``SurrogateFunctionBase``.
    """
    if not (isinstance(cls, type) and issubclass(cls, _KINDS)):
        raise TypeError(f"register takes a subclass of MemoryModule or SurrogateFunctionBase, got {cls!r}.")
    _registered[_qualified_name(cls)] = cls
    return cls


def _names(module_name: str) -> dict[str, Any]:
    return vars(importlib.import_module(module_name))


def _exported() -> dict[str, type[nn.Module]]:
    classes = dict(_registered)
    for module_name in _MODULES:
        for name, value in _names(module_name).items():
            if isinstance(value, type) and issubclass(value, _KINDS) and not name.startswith("_"):
                classes[f"{module_name}.{name}"] = value
    return classes


def _find(name: object) -> type[nn.Module]:
    classes = _exported()
    if isinstance(name, str) and name in classes:
        return classes[name]
    alone = (n for n in classes if n.rpartition(".")[2] == name)  # a class's name without its module's
    near = next(alone, None) or next(iter(difflib.get_close_matches(str(name), classes, n=1)), None)
    raise ValueError(
        f"Unknown neuron or surrogate class {name!r}"
        + (f"; did you mean {near!r}?" if near else ".")
        + f" Allowed are the exported names of {', '.join(_MODULES)} and classes given to neurons.register()."
    )


def build(spec: dict[str, Any]) -> nn.Module:
    """Make the node or surrogate that ``spec`` describes; a spec among its arguments likewise.

    Raises:
        TypeError: ``spec`` is not of the form ``{"class": str, "args": dict}``, or the class does not
            take these arguments.
        ValueError: the class is not allowed, or refuses a value.
    """
    if not isinstance(spec, dict) or "class" not in spec or not set(spec) <= {"class", "args"}:
        given: Any = spec
        is_class = isinstance(given, type) and issubclass(given, _KINDS)
        hint = f", the class and not a node: {given.__name__}()?" if is_class else "."
        raise TypeError(f'A neuron is described as {{"class": ..., "args": {{...}}}}, got {spec!r}{hint}')
    cls, args = _find(spec["class"]), spec.get("args")
    args = {} if args is None else args  # a YAML key without a value
    if not isinstance(args, dict):
        raise TypeError(f'"args" of {spec["class"]} must be a mapping, got {args!r}.')
    known = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in args:
        if key not in known and not takes_any:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}."
            raise TypeError(f"{spec['class']} has no argument {key!r}{hint}")
    return cls(**{k: build(v) if isinstance(v, dict) and "class" in v else v for k, v in args.items()})


def spec_of(module: nn.Module) -> dict[str, Any]:
    """The spec of an instance, read from the attributes named like its constructor's parameters.

    The class of an instance that somebody made in this process is trusted, so it is registered.

    Raises:
        TypeError: it is neither a ``MemoryModule`` nor a ``SurrogateFunctionBase``; a parameter is not kept
            under its own name, or not as plain data.
    """
    cls = type(module)
    if not isinstance(module, _KINDS):
        raise TypeError(
            f"A {cls.__name__} is no neuron: a spikingjelly MemoryModule is wanted, or of a surrogate a "
            "SurrogateFunctionBase."
        )
    name = next((n for n, c in _exported().items() if c is cls), None)
    if name is None:
        name = _qualified_name(register(cls))
    args: dict[str, Any] = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if key == "grad_window" and module.__dict__.get(key) == getattr(module, "max_spike_count", None):
            continue  # the default, which follows max_spike_count
        if key == "grad_window" and hasattr(module, "grad_min"):  # how MultiLevelSpikeCount keeps it
            args[key] = [module.grad_min, module.grad_max]
            continue
        if not hasattr(module, key):
            raise TypeError(
                f"{name} does not keep its argument {key!r} as an attribute, so a configuration cannot hold "
                f'the instance; pass {{"class": {name!r}, "args": {{...}}}} instead.'
            )
        value = getattr(module, key)
        if isinstance(value, nn.Module):
            value = spec_of(value)
        elif value is not parameter.default:
            try:
                json.dumps(value)
            except TypeError as error:
                raise TypeError(f"{name}.{key} = {value!r} is no plain data.") from error
        if value != parameter.default:
            args[key] = value
    return {"class": name, "args": args}
