"""Digests of a method's code, as it was when it was imported: the heart, its row, its classes.

The code around them (train.py, support/runs/evaluation.py, ...) isn't part of a digest.
"""

import ast
import hashlib
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from methods import METHODS, Method

HEART = ("model", "lora", "bilevel", "federated", "data", "support.kernels")  # for all methods


def read_tree(module: str) -> ast.Module:
    """The syntax tree of an imported module, without docstrings."""
    path = Path(import_module(module).__file__)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


def definitions_in(tree: ast.Module) -> dict[str, ast.AST]:
    """The functions, classes and constants of a module, by name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def classes_of(method: Method) -> list[type]:
    """The classes in a row."""
    values = [getattr(method, field.name) for field in fields(method)]
    return [value for value in values if isinstance(value, type)]


def modules_of_methods() -> set[str]:
    """The modules that define the classes of all rows, and their bases, without the heart's."""
    modules = {"methods", "rivals"}
    for method in METHODS.values():
        for kind in classes_of(method):
            modules |= {base.__module__ for base in kind.__mro__}
    return modules - {"builtins", *HEART}


# Read once, when this module is imported: a file that changes later isn't the code that runs.
HEART_TREES = [read_tree(module) for module in HEART]
DEFINITIONS = {}  # of the methods' own modules, by name
for module in sorted(modules_of_methods()):
    DEFINITIONS |= definitions_in(read_tree(module))


def used_by(names: set[str]) -> dict[str, ast.AST]:
    """The definitions with these names, and all that they use in turn."""
    found = {}
    waiting = sorted(names & DEFINITIONS.keys())
    while waiting:
        name = waiting.pop()
        found[name] = DEFINITIONS[name]
        used = {node.id for node in ast.walk(found[name]) if isinstance(node, ast.Name)}
        waiting += sorted(used & DEFINITIONS.keys() - found.keys() - {"METHODS"})
    return found


def row_values(method: Method) -> dict[str, str]:
    """A row without its summary. A class stands for itself by its name."""
    values = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name != "summary":
            values[field.name] = value.__name__ if isinstance(value, type) else repr(value)
    return values


def code_digest(name: str) -> str:
    """A digest of a method's code, without comments and docstrings."""
    row = row_values(METHODS[name])
    definitions = used_by(set(row.values()))
    digest = hashlib.sha256(repr(sorted(row.items())).encode())
    for tree in (*HEART_TREES, *(definitions[key] for key in sorted(definitions))):
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]
