"""YAML as settings are written in: plain data, numbers as people read them, nothing that is said twice."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

__all__ = ["load_yaml", "read_yaml"]

DEEPEST = 50  # mappings and lists within another
MOST = 100_000  # values that aliases expand to
LARGEST = 2**20  # bytes of a file
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
# What YAML 1.1 reads as numbers, and hardly anybody who writes it: 010 is 8, and 1:30 is 90.
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number, as in YAML 1.2; PyYAML reads a string unless a point is in it."""

    # a date is the string that it is in a file's name
    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class's own, which types say is an instance's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.extents: dict[int, tuple[int, int]] = {}  # of whole nodes: values and depth, aliases expanded

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and id(node) not in self.extents and node.end_mark is not None:
            self.extents[id(node)] = self._extent(node)  # an alias within itself has no end yet
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        within = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            within = [each for pair in node.value for each in pair]
        if any(id(each) not in self.extents for each in within):
            raise ValueError("a value contains itself.")
        extents = [self.extents[id(each)] for each in within]
        values = 1 + sum(value for value, _ in extents)
        depth = 1 + max((depth for _, depth in extents), default=0)
        if values > MOST or depth > DEEPEST:
            raise ValueError(f"aliases expand it to more than {MOST:,} values or {DEEPEST} levels.")
        return values, depth

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise ValueError(f"line {key.start_mark.line + 1} says {key.value[:60]!r} again.")
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text, line = str(node.value)[:60], node.start_mark.line + 1
        for kind, pattern in (("an octal", _OCTAL), ("a sexagesimal", _SEXAGESIMAL)):
            if pattern.fullmatch(node.value):
                raise ValueError(
                    f"line {line}: {text} is {kind} number in YAML 1.1: write what is meant, or quote it."
                )
        whole = node.tag.endswith(":int")
        try:
            return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except ValueError:
            raise ValueError(f"line {line}: {text!r} is no number that can be read.") from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_OCTAL.pattern + "$"), list("-+0"))
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def load_yaml(text: str) -> Any:
    """What ``text`` says, plain data only; ``1e-3`` is a number.

    Raises:
        ValueError: it is no YAML, says a key twice, expands beyond reason, or has a number that YAML 1.1
            reads as octal or sexagesimal; one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        context = f"{error.context}, " if error.context else ""
        raise ValueError(_line(f"{where}{context}{error.problem}.")) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_line(str(error) or "it cannot be read.")) from None


def read_yaml(path: Path) -> Any:
    """What a file says, see :func:`load_yaml`.

    Raises:
        ValueError: there is no such file, or it is no text in UTF-8, or no such YAML; the file's name stands
            in the one line.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, no settings file.")
    if not path.is_file():
        raise ValueError(f"There is no settings file {path}.")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes.")
        return load_yaml(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no settings file: it is no text in UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _line(text: str, longest: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest]} ..."
