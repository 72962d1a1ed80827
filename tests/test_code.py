"""Digests of code: what is part of them, and when it is read."""

import ast
import importlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from methods import METHODS
from support.runs import code


def module(tmp_path: Path, source: str) -> ast.Module:
    """The tree of a module with this source."""
    (tmp_path / "some_module.py").write_text(source)
    sys.modules.pop("some_module", None)
    importlib.invalidate_caches()
    return code.read_tree("some_module")


def test_a_tree_ignores_comments_and_docstrings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    one = module(tmp_path, '"""One."""\ndef f():\n    """One."""\n    return 1  # one\n')
    two = module(tmp_path, '"""Two."""\n\ndef f():\n    """Two."""\n    return 1\n')
    three = module(tmp_path, '"""One."""\ndef f():\n    """One."""\n    return 2  # one\n')
    assert ast.dump(one) == ast.dump(two) != ast.dump(three)


def test_a_digest_is_of_the_heart_the_methods_own_row_and_all_that_its_classes_use(monkeypatch):
    before = {name: code.code_digest(name) for name in METHODS}

    def changed() -> set[str]:
        return {name for name in METHODS if code.code_digest(name) != before[name]}

    with monkeypatch.context() as context:
        row = replace(METHODS["pfedmoe"], hyper={"balance": 0.9})
        context.setitem(METHODS, "pfedmoe", row)
        assert changed() == {"pfedmoe"}
    other = code.definitions_in(ast.parse("def gates_by_kind(): return 1\ndef fit(): return 2"))
    with monkeypatch.context() as context:
        context.setitem(code.DEFINITIONS, "gates_by_kind", other["gates_by_kind"])
        assert changed() == {"fdlora", "comigs-apart"}
    with monkeypatch.context() as context:
        context.setitem(code.DEFINITIONS, "fit", other["fit"])
        assert changed() == {"hetlora", "flexlora"}
    with monkeypatch.context() as context:
        context.setattr(code, "HEART_TREES", code.HEART_TREES[1:])
        assert changed() == METHODS.keys()
    summary = replace(METHODS["comigs"], summary="other words")
    monkeypatch.setitem(METHODS, "comigs", summary)
    assert changed() == set()


def test_a_digest_is_of_the_code_that_was_imported_not_of_a_file_that_changed_since(
    tmp_path, monkeypatch
):
    """A copy of the project, whose file changes while a program runs."""
    root = Path(code.__file__).parents[2]
    for name in ("support", *(f"{path.stem}.py" for path in root.glob("*.py"))):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    program = (
        "from pathlib import Path\n"
        "from support.runs.code import code_digest\n"
        "before = code_digest('fdlora')\n"
        "for name in ('rivals.py', 'bilevel.py'):\n"
        "    Path(name).write_text(Path(name).read_text().replace('0.9', '0.8') + 'x = 1\\n')\n"
        "print(before == code_digest('fdlora'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
