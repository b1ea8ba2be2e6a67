"""The package as it is imported: its public names, and what importing it costs."""

import ast
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import optimal_sampling
from optimal_sampling import errors

SRC = Path(optimal_sampling.__file__).parents[1]


def module_name(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SRC.glob("optimal_sampling*/**/*.py"))}


@cache
def tree_of(module):
    return ast.parse(MODULES[module].read_text())


@cache
def exported(module):
    """`__all__` of a module, read without importing it."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            return ast.literal_eval(node.value)
    return []


@pytest.mark.parametrize("module", MODULES)
def test_all_lists_what_other_modules_import(module):
    """Guards: a public name that its own module does not list."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            submodules = {a.name for a in node.names if f"{node.module}.{a.name}" in MODULES}
            names = {alias.name for alias in node.names} - submodules
            assert names <= {*exported(node.module)}, node.module


@pytest.mark.parametrize("module", MODULES)
def test_all_lists_what_is_there(module):
    """Guards: `from module import *` that fails after a name was removed or renamed."""
    bound = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    assert {*exported(module)} <= bound


def test_names_of_the_package_load():
    """Guards: a public name whose module has moved."""
    for name in optimal_sampling.__all__:
        assert getattr(optimal_sampling, name) is not None
    assert callable(optimal_sampling.generate)
    assert dir(optimal_sampling) == sorted(optimal_sampling.__all__)


def test_importing_the_package_loads_no_torch():
    """Guards: seconds of importing torch for a config or an error class."""
    code = (
        "import sys, optimal_sampling\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'vllm'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_tree_of_the_readme_is_the_disk():
    """Guards: a file or folder that the README does not name, or that is gone."""
    text = (SRC.parent / "README.md").read_text()
    tree = text.split("    src/optimal_sampling/\n")[1].split("    src/optimal_sampling_hf/")[0]
    named = {name for line in tree.splitlines() for name in line[6:].split("  ")[0].split()}
    package = SRC / "optimal_sampling"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert named == files | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}


ERRORS = [each for each in vars(errors).values() if getattr(each, "exit_code", None)]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_pickle(error):
    """Guards: an error in a worker process that arrives as another one, or hangs the pool."""
    assert error.__name__ in errors.__all__
    raised = error("what was wrong, and what to do")
    arrived = pickle.loads(pickle.dumps(raised))
    assert type(arrived) is error
    assert (str(arrived), arrived.args) == (str(raised), raised.args)
    assert arrived.exit_code == raised.exit_code
