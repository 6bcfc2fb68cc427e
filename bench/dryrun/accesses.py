"""What a Triton kernel's source says of it: which pointers it reads and writes, and whether it multiplies matrices."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import triton

Access = frozenset[str]  # of "load" and "store"
ATOMICS = ("atomic_add", "atomic_max", "atomic_min", "atomic_cas", "atomic_xchg")
DESCRIPTORS = ("make_tensor_descriptor", "make_block_ptr", "advance")


@functools.cache
def accesses(kernel: Any) -> dict[str, Access]:
    """For each parameter of a jitted function: whether something is loaded or stored through it, in any branch."""
    tree = _source(kernel)
    names = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]
    roots = {name: {name} for name in names}  # variable: the parameters that it is computed from
    found: dict[str, set[str]] = {name: set() for name in names}
    for _ in range(3):  # a loop may use above what it assigns below
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                _derive(node, roots)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for access, pointer in _calls(node, kernel):
                for name in _roots_of(pointer, roots):
                    found[name] |= access
    return {name: frozenset(access) for name, access in found.items()}


def _derive(node: ast.Assign | ast.AugAssign, roots: dict[str, set[str]]) -> None:
    """Pointers computed from pointers. What is loaded through one is a value, and no pointer."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
        pairs = zip(target.elts, node.value.elts) if several else [(target, node.value)]
        for name, value in pairs:
            if isinstance(name, ast.Name):
                roots.setdefault(name.id, set()).update(_roots_of(value, roots))


def _roots_of(value: ast.expr, roots: dict[str, set[str]]) -> set[str]:
    """The parameters that address arithmetic in `value` starts from."""
    if isinstance(value, ast.Name):
        return roots.get(value.id, set())
    if isinstance(value, ast.BinOp):
        return _roots_of(value.left, roots) | _roots_of(value.right, roots)
    if isinstance(value, ast.IfExp):
        return _roots_of(value.body, roots) | _roots_of(value.orelse, roots)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr in DESCRIPTORS and value.args:
            return _roots_of(value.args[0], roots)
        if value.func.attr == "where":
            return _roots_of(value.args[1], roots) | _roots_of(value.args[2], roots)
        if value.func.attr == "to":
            return _roots_of(value.func.value, roots)
    return set()


def _calls(node: ast.Call, kernel: Any) -> list[tuple[Access, ast.expr]]:
    """What a call loads and stores, and through which of its arguments."""
    function = node.func
    if isinstance(function, ast.Attribute):
        base = function.value
        library = isinstance(base, ast.Name) and base.id in ("tl", "gl", "tle")
        if library and function.attr.startswith(("load", "store")) and node.args:
            return [(frozenset({function.attr.split("_")[0]}), node.args[0])]
        if library and function.attr in ATOMICS and node.args:
            return [(frozenset({"load", "store"}), node.args[0])]
        if not library and function.attr in ("load", "store"):  # of a descriptor
            return [(frozenset({function.attr}), base)]
        return []
    callee = _callee(node, kernel)
    if callee is None:
        return []
    inner = accesses(callee)
    names = list(inner)
    given = [*zip(names, _unpacked(node.args)), *((word.arg, word.value) for word in node.keywords if word.arg)]
    return [(inner[name], value) for name, value in given if inner.get(name)]


@functools.cache
def multiplies(kernel: Any) -> bool:
    """Whether a jitted function, or one that it calls, has a product of matrices."""
    for node in ast.walk(_source(kernel)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr.startswith("dot"):
            return True
        callee = _callee(node, kernel)
        if callee is not None and multiplies(callee):
            return True
    return False


@functools.cache
def _source(kernel: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def _callee(node: ast.Call, kernel: Any) -> Any:
    """The jitted function that is called, or None."""
    found = kernel.fn.__globals__.get(node.func.id) if isinstance(node.func, ast.Name) else None
    return found if isinstance(found, triton.JITFunction) else None


def _unpacked(arguments: list[ast.expr]) -> list[ast.expr]:
    """Positional arguments, those of a starred tuple one by one.

    Raises:
        ValueError: something else is starred, whose length the source does not tell.
    """
    flat = []
    for argument in arguments:
        if not isinstance(argument, ast.Starred):
            flat.append(argument)
        elif isinstance(argument.value, ast.Tuple):
            flat += argument.value.elts
        else:
            raise ValueError(f"line {argument.lineno}: * of what is not a tuple")
    return flat
