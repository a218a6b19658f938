"""The house rules as functions of a module's syntax tree; each yields (line, what is wrong)."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

Finding = tuple[int, str]
Rule = Callable[[PurePosixPath, ast.Module], Iterator[Finding]]

# Rooms from the ground up; a module imports from its own room and from floors below. Rooms of one floor in one set do not know
# each other, except on the floors that are all one room, below.
FLOORS: list[set[str]] = [
    {"errors", "version", "dist", "registry", "numerics"},
    {"arch", "io"},
    {"plan"},
    {"formats"},
    {"model"},  # loads checkpoints, so it knows formats, which must never know it
    {"tune", "evaluation", "autoscheme"},
    {"recipe", "mixes", "turns", "planning", "plan_file", "prepare", "starting", "searching", "result", "report", "pipeline"},
    {"__init__", "__main__", "cli", "options", "tables", "grid", "plot", "plotting", "progress", "demo", "hf"}
    | {"converting", "verifying", "readers"},
]
OPEN_FLOORS = {0, 6, 7}

_ROUNDING = {
    *("round", "round_", "floor", "floor_", "ceil", "ceil_", "trunc", "trunc_", "fix", "rint", "floor_divide"),
    *("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_max", "clamp_min_", "clamp_max_"),
    *("char", "byte", "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "quantize_per_tensor"),
}
# Bounds of what is learned, not of codes.
_BOUNDS = {("tune/signround.py", "clamp_")}
# transformers' table of loaders: what `import bitlathe.hf` is for, and its decorator cannot replace one.
_FOREIGN = {("hf.py", "AUTO_QUANTIZER_MAPPING")}
_CODES = ("int8", "uint8", "int4", "uint4", "float8", "float4", "int16", "uint16")
_MUTABLE = {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict", "bytearray"}
_MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}


def room_of(path: PurePosixPath) -> str:
    """The room of a module: its folder, or its own name at the top. path: relative to the package."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def rounding(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """Only numerics rounds, clamps, or casts to codes."""
    if room_of(path) == "numerics":
        return
    for call in _calls(tree):
        if not isinstance(call.func, ast.Attribute) or _is_name(call.func.value, "math"):
            continue
        if call.func.attr in _ROUNDING and (path.as_posix(), call.func.attr) not in _BOUNDS:
            yield call.lineno, f"{call.func.attr} rounds or clamps: that is done in numerics"
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        names = [value.attr for value in values if isinstance(value, ast.Attribute)]
        if call.func.attr in ("to", "type", "astype") and any(name.startswith(_CODES) for name in names):
            yield call.lineno, "casts to codes: that is done in numerics"


def walking(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """Only model/walk.py loops over blocks."""
    if path == PurePosixPath("model/walk.py"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and _over_blocks(node.iter):
            yield node.iter.lineno, "loops over a model's layers: iterate over walk()"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "block":
            yield node.lineno, "brings a block to life: iterate over walk()"


def _over_blocks(iterated: ast.expr) -> bool:
    if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name):  # enumerate(...), zip(...), reversed(...)
        return any(_over_blocks(argument) for argument in iterated.args)
    if isinstance(iterated, ast.Subscript):
        return _over_blocks(iterated.value)
    if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Attribute) and iterated.func.attr == "get_submodule":
        return any(isinstance(node, ast.Attribute) and node.attr == "blocks" for node in ast.walk(iterated))
    return isinstance(iterated, ast.Attribute) and iterated.attr in ("layers", "_layers")


def importing(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """Imports stand at the top of the module and point down."""
    own = room_of(path)
    floor = _floor(own)
    if floor is None:
        yield 1, f"the room {own!r} has no floor in tests/rules.py"
        return
    for line, room in _imported_rooms(tree):
        other = _floor(room)
        if other is None:
            yield line, f"imports {room!r}, which has no floor in tests/rules.py"
        elif other > floor:
            yield line, f"{own} imports {room}, which is above it"
        elif other == floor and room != own and floor not in OPEN_FLOORS:
            yield line, f"{own} imports {room}, and the two must not know each other"
    for function in _functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node.lineno, "imports inside a function"


def _floor(room: str) -> int | None:
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), None)


def _imported_rooms(tree: ast.Module) -> Iterator[tuple[int, str]]:
    known = set().union(*FLOORS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, rest = alias.name.partition(".")
                if package == "bitlathe":
                    yield node.lineno, rest.partition(".")[0] or "__init__"
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "a relative name"
        elif isinstance(node, ast.ImportFrom) and node.module == "bitlathe":
            for alias in node.names:
                yield node.lineno, alias.name if alias.name in known else "__init__"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitlathe."):
            yield node.lineno, (node.module or "").split(".")[1]


def probing(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """No hasattr, no defaulted getattr, no assignment to somebody's forward."""
    for call in _calls(tree):
        if _is_name(call.func, "hasattr"):
            yield call.lineno, "hasattr"
        if _is_name(call.func, "getattr") and len(call.args) > 2:
            yield call.lineno, "getattr with a default"
        if _is_name(call.func, "setattr") and any(isinstance(a, ast.Constant) and a.value == "forward" for a in call.args):
            yield call.lineno, "assigns to a module's forward"
    for node, target in _assignments(tree):
        if isinstance(target, ast.Attribute) and target.attr == "forward":
            yield node.lineno, "assigns to a module's forward"


def state(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """No global, no module-level mutable state but literal registries in capitals, which nothing changes; no caches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, "global"
    for node in tree.body:
        for name in _mutable_names(node):
            if name != "__all__" and not name.isupper():
                yield node.lineno, f"{name} is mutable state of the module"
    for function in _functions(tree):
        for decorator in function.decorator_list:
            if {"cache", "lru_cache"} & {name.id for name in ast.walk(decorator) if isinstance(name, ast.Name)}:
                yield function.lineno, f"{function.name} keeps a cache, which is state of the module"
    for node, target in _assignments(tree):
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id.isupper():
            if (str(path), target.value.id) in _FOREIGN:
                continue
            yield node.lineno, f"changes the registry {target.value.id}"
    for call in _calls(tree):
        of = call.func.value if isinstance(call.func, ast.Attribute) and call.func.attr in _MUTATORS else None
        if isinstance(of, ast.Name) and of.id.isupper():
            yield call.lineno, f"changes the registry {of.id}"


def _mutable_names(node: ast.stmt) -> list[str]:
    """Names that a statement binds to something mutable."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return []
    value = node.value
    built = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _MUTABLE
    literal = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)] if built or literal else []


def environment(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """Nothing depends on environment variables."""
    for node in ast.walk(tree):
        named = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in ("environ", "getenv") for alias in node.names)
        if named or imported:
            yield node.lineno, "reads or writes the environment"


def catching(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """No except for everything, unless it passes everything on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and not _raises_again(node):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or _is_name(kind, "Exception") or _is_name(kind, "BaseException") for kind in caught):
                yield node.lineno, "catches everything"


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def exiting(path: PurePosixPath, tree: ast.Module) -> Iterator[Finding]:
    """Only the command line ends the process."""
    if room_of(path) in ("cli", "__main__"):
        return
    for call in _calls(tree):
        of = call.func.value if isinstance(call.func, ast.Attribute) and call.func.attr in ("exit", "_exit", "abort") else None
        if isinstance(of, ast.Name) and of.id in ("sys", "os"):
            yield call.lineno, "ends the process"
        if _is_name(call.func, "exit") or _is_name(call.func, "quit"):
            yield call.lineno, "ends the process"
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if _is_name(raised, "SystemExit"):
                yield node.lineno, "ends the process"


RULES: list[Rule] = [rounding, walking, importing, probing, state, environment, catching, exiting]


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _assignments(tree: ast.AST) -> Iterator[tuple[ast.stmt, ast.expr]]:
    """Every assignment with each of its targets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                for part in parts:
                    yield node, part
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            yield node, node.target
