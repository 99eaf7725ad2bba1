"""Some definitions of packages, and all that they need of them, as the text of one module.

Whatever a definition mentions comes along, definition by definition; imports of other packages stay imports.
Two that have one name get the names of their modules before it.
"""

import ast
import builtins
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["Entity", "flatten"]


class Entity(NamedTuple):
    """What a name stands for.

    Attributes:
        kind: 'definition'; 'module', one that is passed around as a value; 'absent', a module that is left
            out; 'import', of another package.
        module: the dotted name of a module.
        name: of a definition, or what an import takes from its module.
    """

    kind: str
    module: str
    name: str = ""


@dataclass
class Module:
    """A parsed module: its statements, and what its names stand for."""

    name: str
    body: list[ast.stmt]
    found: dict[str, list[Entity]] = field(default_factory=dict)

    def needed(self) -> list[str]:
        return [entity.module for several in self.found.values() for entity in several]


def _targets(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module defines; ``_`` names nothing."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name] if statement.name != "_" else []
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return []


class Library:
    """The modules of some packages, read as they are asked for.

    Args:
        packages: the folder of each, by its name.
        absent: modules that are left out, with all below them.
    """

    def __init__(self, packages: dict[str, Path], absent: Iterable[str] = ()) -> None:
        self.packages = packages
        self.absent = tuple(absent)
        self.modules: dict[str, Module] = {}

    def path(self, module: str) -> Path | None:
        """The file of a module; None where there is none, or where it is another package's."""
        first, *rest = module.split(".")
        if first not in self.packages:
            return None
        place = self.packages[first].joinpath(*rest)
        files = (place / "__init__.py", place.with_suffix(".py"))
        return next((file for file in files if file.is_file()), None)

    def module(self, name: str) -> Module:
        """Raises ValueError where it imports what cannot be followed."""
        if name not in self.modules:
            path = self.path(name)
            assert path is not None, name
            made = self.modules[name] = Module(name, ast.parse(path.read_text()).body)
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for statement in made.body:
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    for bound, entity in self.imported(statement, package):
                        made.found.setdefault(bound, []).append(entity)
                for target in _targets(statement):
                    made.found[target] = [Entity("definition", name, target)]
        return self.modules[name]

    def imported(self, statement: ast.Import | ast.ImportFrom, package: str) -> list[tuple[str, Entity]]:
        """What an import binds, and what each name stands for."""
        if isinstance(statement, ast.Import):
            return [
                (alias.asname or alias.name.split(".")[0], self._entity(alias.name, "", alias.asname))
                for alias in statement.names
            ]
        home = statement.module or ""
        if statement.level:
            above = package.split(".")[: len(package.split(".")) - statement.level + 1]
            home = ".".join([*above, *filter(None, [statement.module])])
        return [(alias.asname or alias.name, self._entity(home, alias.name)) for alias in statement.names]

    def _entity(self, home: str, name: str, asname: str | None = None) -> Entity:
        whole = f"{home}.{name}" if name else home
        if any(whole == each or whole.startswith(f"{each}.") for each in self.absent):
            return Entity("absent", whole)
        if self.path(whole) is not None:
            return Entity("module", whole if name or asname else whole.split(".")[0])
        return Entity("definition" if self.path(home) is not None else "import", home, name)

    def resolve(self, entity: Entity) -> Entity:
        """Where a name that one module takes from another is defined."""
        while entity.kind == "definition":
            [found] = self.module(entity.module).found[entity.name][:1]
            if found == entity:
                break
            entity = found
        return entity


def _bound(body: Iterable[ast.AST]) -> set[str]:
    """Names that the statements of a function or class bind, without what is within others."""
    names, rest = set(), list(body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            names |= {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        rest += ast.iter_child_nodes(node)
    return names


def _parameters(arguments: ast.arguments) -> set[str]:
    several = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return {a.arg for a in (*several, arguments.vararg, arguments.kwarg) if a is not None}


class Renamer(ast.NodeTransformer):
    """Gives every name of a module that no scope within hides the name that ``named`` says.

    Args:
        named: an entity's name from now on, and whether it was called so, or by its module's name.
        locals: takes up every name that a scope binds.
    """

    def __init__(
        self, library: Library, module: Module, named: Callable[[Entity, str], str], locals: set[str]
    ) -> None:
        self.library, self.module, self.named, self.locals = library, module, named, locals
        self.scopes: list[tuple[bool, set[str]]] = []  # whether it is a class's

    def _entities(self, name: str) -> list[Entity]:
        if any(name in names for _, names in self.scopes):
            return []
        return [self.library.resolve(entity) for entity in self.module.found.get(name, [])]

    def visit_Name(self, node: ast.Name) -> ast.expr:
        new = [self.named(entity, node.id) for entity in self._entities(node.id)]
        return ast.Name(new[0], node.ctx) if new else node

    def _module_of(self, node: ast.expr) -> Entity | None:
        """The module that an expression names."""
        if isinstance(node, ast.Name):
            return next((e for e in self._entities(node.id) if e.kind == "module"), None)
        return None

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        home: ast.expr = node
        names: list[str] = []
        while isinstance(home, ast.Attribute):
            names = [home.attr, *names]
            home = home.value
        entity = self._module_of(home)
        if entity is None:
            return self.generic_visit(node)  # type: ignore[return-value]
        while names and entity.kind == "module":
            below = self.library.module(entity.module).found.get(names[0])
            if below is None:  # a module that its package does not name
                below = [Entity("module", f"{entity.module}.{names[0]}")]
            entity, names = self.library.resolve(below[0]), names[1:]
        made: ast.expr = ast.Name(self.named(entity, ""), ast.Load())
        for name in names:
            made = ast.Attribute(made, name, ast.Load())
        return made

    def _within(self, is_class: bool, names: set[str], nodes: list) -> list:
        before = self.scopes
        self.locals |= names
        # a class's own names are not seen from its methods
        self.scopes = [(c, n) for c, n in before if not c or is_class] + [(is_class, names)]
        made = []
        for node in nodes:
            found = self.visit(node)
            made += found if isinstance(found, list) else [] if found is None else [found]
        self.scopes = before
        return made

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        node.args = self.visit(node.args)
        node.returns = None if node.returns is None else self.visit(node.returns)
        node.body = self._within(False, _parameters(node.args) | _bound(node.body), node.body)
        self._rename(node)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        node.args = self.visit(node.args)
        [node.body] = self._within(False, _parameters(node.args), [node.body])
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        for part in ("decorator_list", "bases", "keywords"):
            setattr(node, part, [self.visit(each) for each in getattr(node, part)])
        node.body = self._within(True, _bound(node.body), node.body)
        self._rename(node)
        return node

    def _rename(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if not self.scopes and (entities := self._entities(node.name)):
            node.name = self.named(entities[0], node.name)

    def _comprehension(self, node: ast.expr) -> ast.expr:
        names = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}  # type: ignore[attr-defined]
        before = self.scopes
        self.locals |= names
        self.scopes = [*before, (False, names)]
        self.generic_visit(node)
        self.scopes = before
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def _without(statement: ast.stmt, methods: set[str]) -> ast.stmt:
    """A copy of a statement, without some of a class's methods."""
    made = copy.deepcopy(statement)
    if isinstance(made, ast.ClassDef):
        made.body = [n for n in made.body if f"{made.name}.{getattr(n, 'name', '')}" not in methods]
    return made


class _Flat:
    """What is taken along, and what it is called."""

    def __init__(self, library: Library, left_out: set[str]) -> None:
        self.library, self.left_out = library, left_out
        self.wanted: dict[Entity, str] = {}  # and how it was called first
        self.elsewhere: set[Entity] = set()  # what is also called by another name than its own
        self.locals: set[str] = set()

    def statements(self, module: Module) -> list[ast.stmt]:
        """Those of a module that are taken along: wanted definitions, and what is done without a name."""
        taken = []
        for statement in module.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue
            targets = _targets(statement)
            if "__all__" in targets:
                continue
            if not targets or any(Entity("definition", module.name, t) in self.wanted for t in targets):
                taken.append(statement)
        return taken

    def want(self, entity: Entity, called: str) -> str:
        self.wanted.setdefault(entity, called)
        if entity.kind == "definition" and called != entity.name:
            self.elsewhere.add(entity)
        if entity.kind == "module":
            for several in list(self.library.module(entity.module).found.values()):
                for found in map(self.library.resolve, several):
                    if found.kind == "definition" and found.module == entity.module != "__all__":
                        self.wanted.setdefault(found, found.name)
        return called or "_"

    def close(self) -> list[Module]:
        """Want all that is needed; the modules, those that others need first."""
        size = -1
        while size != len(self.wanted):
            size = len(self.wanted)
            names = {e.module for e in self.wanted if e.kind in ("definition", "module")}
            for module in map(self.library.module, sorted(names)):
                renamer = Renamer(self.library, module, self.want, self.locals)
                for statement in self.statements(module):
                    renamer.visit(_without(statement, self.left_out))
        ordered: list[Module] = []

        def place(name: str) -> None:
            module = self.library.module(name)
            for needed in dict.fromkeys(module.needed()):
                if needed != name and needed in self.library.modules and module not in ordered:
                    place(needed)
            if module not in ordered:
                ordered.append(module)

        for name in sorted(names):
            place(name)
        return ordered

    def names(self, first: Iterable[Entity]) -> dict[Entity, str]:
        """A name for everything; that of ``first`` is its own."""
        named = {entity: entity.name for entity in first}
        taken = {*named.values(), *dir(builtins)}
        for entity, called in self.wanted.items():
            if entity in named:
                continue
            if entity.kind == "import" and not entity.name:  # import a.b binds a
                named[entity] = called
                continue
            name = (entity.name if entity.kind == "definition" else called) or entity.module.rpartition(".")[
                2
            ]
            if name in taken or (entity in self.elsewhere and name in self.locals):
                name = f"{entity.module.rpartition('.')[2]}_{name.lstrip('_')}"
                while name in taken or name in self.locals:
                    name += "_"
            named[entity] = name
            taken.add(name)
        return named


def _import_of(entity: Entity, name: str) -> str:
    if entity.name:
        renamed = "" if entity.name == name else f" as {name}"
        return f"from {entity.module} import {entity.name}{renamed}"
    plain = entity.module.split(".")[0] == name
    return f"import {entity.module}" + ("" if plain else f" as {name}")


def flatten(
    packages: dict[str, Path],
    roots: Iterable[tuple[str, str]],
    absent: Iterable[str] = (),
    left_out: Iterable[str] = (),
) -> tuple[str, dict[Entity, str]]:
    """The text of a module with these definitions and all that they need.

    Args:
        packages: what is taken from, the folder of each by its name.
        roots: module and name of what is wanted; it keeps its name.
        absent: modules to leave out; where one is mentioned stands ``LeftOut("its.name")``, a class
            of the caller's.
        left_out: methods to leave out, ``"Class.method"``.

    Returns:
        The text, from its imports on, and what everything is called in it.
    """
    flat = _Flat(Library(packages, absent), set(left_out))
    first = [flat.library.resolve(Entity("definition", *root)) for root in roots]
    for entity in first:
        flat.want(entity, entity.name)
    modules = flat.close()
    named = flat.names(first)
    lines = sorted({"import types"} | {_import_of(e, n) for e, n in named.items() if e.kind == "import"})
    parts = ["\n".join(lines)]
    parts += [f'{name} = LeftOut("{e.module}")' for e, name in named.items() if e.kind == "absent"]
    for module in modules:
        renamer = Renamer(flat.library, module, lambda entity, _: named[entity], set())
        for statement in flat.statements(module):
            made = renamer.visit(_without(statement, flat.left_out))
            parts.append(ast.unparse(ast.fix_missing_locations(made)))
        if (whole := Entity("module", module.name)) in named:
            own = [
                (e.name, n) for e, n in named.items() if e.kind == "definition" and e.module == module.name
            ]
            members = ", ".join(f"{name}={new}" for name, new in own if name != "__all__")
            parts.append(f"{named[whole]} = types.SimpleNamespace({members})")
    return "\n\n\n".join(parts) + "\n", named
