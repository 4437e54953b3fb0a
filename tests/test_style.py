"""The shape of the code base: who imports whom, which packages, one home for each constant."""
import ast
import importlib
import inspect
import re
import sys

import pytest
from conftest import ROOT

ORDER = ("diffusion", "fusion", "data", "model", "sample", "evaluate", "train")      # imports point back
PACKAGES = {"torch", "numpy", "PIL", "tqdm", "ftfy", "regex"}


def imports(name: str) -> set[str]:
    """What a file imports, and nothing inside a function."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(node in tree.body for node in nodes), f"{name}.py imports within a function"
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {full.split(".")[0] for full in names}


def test_files_import_only_those_before_them_and_the_fixed_packages() -> None:
    for i, name in enumerate(ORDER):
        foreign = imports(name) - set(ORDER[:i]) - PACKAGES - set(sys.stdlib_module_names)
        assert not foreign, f"{name}.py imports {foreign}"


def test_constants_have_one_home() -> None:
    text = "\n".join((ROOT / f"{name}.py").read_text() for name in ORDER)
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert len(re.findall(r"\b0\.18215\b", code)) == 1, "the latent scale must stand once"
    assert len(re.findall(r"timesteps: int = 1000\b", code)) == 1


def test_the_house_grows_no_larger(capsys) -> None:
    """Few lines and few flags are what the code is for: whoever adds takes something away."""
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in ORDER}
    assert sum(lines.values()) <= 3900 and max(lines.values()) <= 900, lines
    for name, most in (("sample", 15), ("evaluate", 27), ("train", 37), ("model", 1)):  # with --help
        with pytest.raises(SystemExit, match="^0$"):
            importlib.import_module(name).main(["--help"])
        flags = set(re.findall(r"^  (?:-\w[ ,].*)?(--?[\w-]+)", capsys.readouterr().out, re.MULTILINE))
        assert 0 < len(flags) <= most, f"{name}.py has {sorted(flags)}"


def test_lines_and_functions_stay_short() -> None:
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        assert max(map(len, path.read_text().splitlines())) <= 110, path.name
    for name in ORDER:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{name}.{node.name} is too long to read at once"


def test_the_readme_is_short_and_its_table_leads_to_the_code() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 16 * 1024 and len(text.splitlines()) <= 250, "details belong into .readme/"
    row = r"^\| ((?:Eq\.|Algorithm|Table|section) [\d.]+)[^|]*\| (`\w+\.py: .*)\|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) >= 10
    for mark, code in rows:
        for file, name in re.findall(r"`(\w+)\.py: ([\w.]+)`", code):
            value = importlib.import_module(file)
            for part in name.split("."):
                value = getattr(value, part)
            assert mark.split()[0] in ("Table", "section") or mark in inspect.getsource(value), \
                f"{file}.{name} does not say that it is {mark}"
