"""``spiking-mamba COMMAND``; beside the package, whose import takes seconds: help comes at once."""

import ast
import difflib
import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["COMMANDS", "main"]

# modules of spiking_mamba.commands, in the order in which one needs them
COMMANDS = ("quickstart", "generate", "pretrain", "distill", "align", "evaluate", "report", "bench", "export")


def main() -> None:
    """Run the command that the command line names."""
    name, rest = (sys.argv[1], sys.argv[2:]) if sys.argv[1:] else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "--version":
        print(_version())
    elif name in COMMANDS:
        sys.argv = [f"spiking-mamba {name}", *rest]
        try:
            command = importlib.import_module(f"spiking_mamba.commands.{name}")
        except KeyboardInterrupt:  # it takes seconds
            print("\nInterrupted before anything was done.", file=sys.stderr)
            sys.exit(130)
        command.main()
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COMMANDS)}."
        print(f"spiking-mamba: error: Unknown command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def _help() -> str:
    lines = [f"  {name:<12}{_sentence(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: spiking-mamba COMMAND [CONFIGURATION] [key=value | --key value ...]",
            "",
            "Spiking Mamba2 language models: distil, align, evaluate and run them.",
            "",
            "commands:",
            *lines,
            "",
            "CONFIGURATION is a YAML file, or the name of one that comes with the package.",
            "spiking-mamba COMMAND --help explains every key.",
        ]
    )


def _sentence(name: str) -> str:
    """What a command's module says of itself first, read without importing it."""
    package = importlib.util.find_spec("spiking_mamba")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "commands" / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text is not None
    return text.splitlines()[0]


def _version() -> str:
    try:
        return version("spiking-mamba")
    except PackageNotFoundError:  # a bare source tree
        return "unknown: it is not installed"


if __name__ == "__main__":
    main()
