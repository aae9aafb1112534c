"""The rooms of the house: what may import what, what a file may weigh, what importing plume loads."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

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
SHOP_WINDOW = ["plume/rollout.py", "plume/transition.py", "train/plume_train/curriculum.py"]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        ours = {name.split(".")[0] for name in imports(file)} & set(PACKAGES)
        assert ours <= MAY_IMPORT[package], f"{file} imports {ours - MAY_IMPORT[package]}"


def test_only_the_ops_know_the_kernels():
    for file in PACKAGES["plume"].rglob("*.py"):
        known = {name for name in imports(file) if name.startswith("plume_kernels")}
        assert not known or file.name in ("ops.py", "definitions.py"), file  # the latter asks how the stream is split


def test_only_the_seam_and_the_tiny_model_know_the_backbones_classes():
    for file in PACKAGES["plume"].rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name not in ("backbone.py", "tiny.py", "processor.py", "images.py"):
            assert not [name for name in imports(file) if "qwen" in name.lower()], file
            assert "import Qwen" not in text, file


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


@pytest.mark.parametrize("room", ["kernels", "train", "eval", "configs"])
def test_a_root_folder_is_no_package(room):
    assert not (ROOT / room / "__init__.py").exists()
    assert (ROOT / room).is_dir()


def test_no_file_hides_a_second_subject():
    for package in PACKAGES.values():
        for file in package.rglob("*.py"):
            assert file.stem not in ("utils", "common", "misc"), file
    for name in SHOP_WINDOW:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 150, name


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
