"""The rooms of `plume/`: what may import what, that no imports are circular, what importing plume loads."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import plume
from tests.processes import run

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "plume_kernels": ROOT / "kernels" / "plume_kernels",
    "plume": ROOT / "plume",
    "plume_train": ROOT / "train" / "plume_train",
    "plume_eval": ROOT / "eval" / "plume_eval",
}
MAY_IMPORT = {
    "plume_kernels": {"plume_kernels"},
    "plume": {"plume", "plume_kernels"},
    "plume_train": {"plume", "plume_train"},
    "plume_eval": {"plume", "plume_eval", "plume_kernels"},  # whose bench is in plume_eval.kernels
}
#: Rooms and modules of `plume/`: each imports only from those before it. Rooms of one line do not know each other.
ORDER = [
    {"version", "terminal", "threads"},
    {"configurations"},
    {"tokens"},
    {"config"},
    {"inputs"},
    {"checkpoints"},
    {"model"},
    {"engine", "tracing", "random_models"},
    {"space"},
    {"embedder"},
    {"search"},
    {"serving", "corpus"},
    {"registration"},  # what `plume/__init__.py` uses
    {"cli"},
    {"__main__", "autoload"},
]


@cache
def modules() -> dict[str, Path]:
    """All modules of the four packages, by name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def names(file: Path) -> set[str]:
    """Whatever a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of ours that a module imports; a name of `plume` counts as the module that it comes from."""
    homes = {f"plume.{name}": home for name, home in plume._HOMES.items()}
    found = set()
    for name in names(modules()[module]):
        name = homes.get(name, name)
        home = name if name in modules() else name.rpartition(".")[0]
        if home in modules():
            found.add(home)
    return frozenset(found - {module})


def room(module: str) -> int:
    """Where a module of `plume` stands in the order."""
    name = module.split(".")[1]
    return next(place for place, rooms in enumerate(ORDER) if name in rooms)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package):
    inside = [module for module in modules() if module.split(".")[0] == package]
    assert inside
    for module in inside:
        packages = {name.split(".")[0] for name in names(modules()[module])} & set(PACKAGES)
        assert packages <= MAY_IMPORT[package], f"{module} imports {packages - MAY_IMPORT[package]}"


def test_rooms_import_only_from_the_rooms_before_them():
    inside = [module for module in modules() if module.startswith("plume.")]
    assert {module.split(".")[1] for module in inside} <= set().union(*ORDER)
    for module in inside:
        for other in imports(module):
            is_same_room = other.split(".")[:2] == module.split(".")[:2]
            assert not other.startswith("plume.") or is_same_room or room(other) < room(module), (
                f"{module} imports {other}"
            )


def test_no_imports_are_circular():
    """Also imports in functions and under TYPE_CHECKING count."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(imports(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())
    assert done == set(modules())


@pytest.mark.parametrize("folder", [folder for package in PACKAGES.values() for folder in package.rglob("*/")])
def test_a_room_has_one_sentence_and_imports_nothing(folder):
    if not any(folder.glob("*.py")):
        return
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_only_the_fused_ops_know_the_kernels():
    for module in modules():
        if module.startswith("plume.") and any(other.startswith("plume_kernels") for other in imports(module)):
            # The reference asks how kernels split the residual stream.
            assert module in ("plume.engine.fused.ops", "plume.engine.fused.reference"), module


def test_few_files_name_a_family_of_transformers():
    for module, file in modules().items():
        allowed = ("model.backbone", "random_models", "inputs.processor", "inputs.images")
        if module.startswith("plume.") and module.removeprefix("plume.") not in allowed:
            assert not [name for name in names(file) if "qwen" in name.lower()], module


def test_the_special_tokens_are_written_in_one_file():
    for package in PACKAGES.values():
        for file in package.rglob("*.py"):
            if file.name == "tokens.py":
                continue
            strings = [
                node.value
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            docs = {
                ast.get_docstring(node)
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            }
            for string in strings:
                is_code = string not in docs and len(string) < 40 and "`" not in string
                assert not (is_code and string in ("<bot>", "<eot>", "<ct>", "<disc_emb>")), (file, string)


@pytest.mark.parametrize("folder", ["kernels", "train", "eval", "configs"])
def test_a_root_folder_is_no_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder).is_dir()


def test_no_file_is_a_drawer():
    for file in modules().values():
        assert file.stem not in ("utils", "common", "misc", "helpers"), file


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"]], ids=" ".join)
def test_a_command_answers_without_loading_what_it_does_not_need(arguments):
    code = (
        "import sys; from plume.cli.main import app; sys.argv = ['plume', *sys.argv[1:]]\n"
        "try: app()\n"
        "finally: print('loaded', *sys.modules)"
    )
    loaded = run([sys.executable, "-c", code, *arguments]).stdout.rpartition("loaded")[2].split()
    assert "plume.cli" in loaded
    assert not {"torch", "transformers", "numpy", "PIL"} & set(loaded)


ORDERS = [
    "import transformers, plume",
    "from plume.config import PlumeConfig",
]


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_knows_the_classes_whoever_is_imported_first(order, plume_folder):
    code = f"{order}\nfrom transformers import AutoModel; print(type(AutoModel.from_pretrained({str(plume_folder)!r})))"
    done = run([sys.executable, "-c", code])
    assert "plume.model.model.PlumeModel" in done.stdout, done.stderr


def test_a_clone_named_plume_does_not_hide_the_package_from_its_parent_folder(tmp_path):
    (tmp_path / "plume").symlink_to(ROOT)
    for words in (["-c", "from plume import PlumeConfig"], ["-m", "plume", "--version"]):
        done = run([sys.executable, *words], cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_importing_plume_loads_no_optional_library():
    code = "import plume, sys; print(' '.join(sys.modules))"
    loaded = run([sys.executable, "-c", code]).stdout.split()
    assert "plume" in loaded
    for name in (
        "torchvision",
        "deepspeed",
        "mteb",
        "av",
        "pypdfium2",
        "lancedb",
        "sentence_transformers",
        "matplotlib",
    ):
        assert name not in loaded, name
