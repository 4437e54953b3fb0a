"""The shape of the code base: who imports whom, which packages, one home for each constant."""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EDGES = {"fusion": set(), "data": set(), "diffusion": set(), "model": {"fusion", "data"},
         "sample": {"model", "data", "diffusion"}, "evaluate": {"model", "data", "diffusion", "sample"},
         "train": {"model", "data", "diffusion", "sample", "evaluate"}}
# Inside a function, where the file at the other end imports this one: the command that needs it runs alone.
LATE_EDGES = {"data": {"data", "model", "sample"}, "evaluate": {"train"}}
PACKAGES = {"torch", "numpy", "PIL", "tqdm", "ftfy", "regex"}


def imports(name: str, late: bool = True) -> set[str]:
    """What a file imports; late=False: at its top."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    nodes = list(ast.walk(tree)) if late else tree.body
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {full.split(".")[0] for full in names}


def test_files_import_only_what_the_picture_allows() -> None:
    for name, allowed in EDGES.items():
        for late, edges in ((False, allowed), (True, allowed | LATE_EDGES.get(name, set()))):
            ours = imports(name, late) & set(EDGES)
            assert ours <= edges, f"{name}.py imports {ours - edges}: the README's picture has no such edge"


def test_only_the_fixed_packages() -> None:
    for name in EDGES:
        foreign = imports(name) - set(EDGES) - PACKAGES - set(sys.stdlib_module_names)
        assert not foreign, f"{name}.py imports {foreign}"


def test_constants_have_one_home() -> None:
    text = "\n".join((ROOT / f"{name}.py").read_text() for name in EDGES)
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert len(re.findall(r"\b0\.18215\b", code)) == 1, "the latent scale must stand once"
    assert len(re.findall(r"timesteps: int = 1000\b", code)) == 1


def test_lines_and_functions_stay_short() -> None:
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        assert max(map(len, path.read_text().splitlines())) <= 110, path.name
    for name in EDGES:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} is too long to read at once"
