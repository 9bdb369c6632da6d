"""kernels/ stands on its own: relative imports only, no circle, nothing of this tree outside of it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in (ROOT / "kernels").rglob("*.py")}
FILES = {name.removesuffix(".__init__"): file for name, file in FILES.items()}
OURS = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}


def imports_of(name: str) -> set[str]:
    """Modules of kernels that ``name`` imports, inside functions too."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & OURS, f"{name} imports {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] not in OURS, f"{name} imports {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
    return found


def test_imports_are_relative_and_have_no_circle():
    left = {name: imports_of(name) for name in FILES}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"circle among {sorted(left)}"


def test_no_module_of_this_tree_is_loaded_beside():
    """But the two commands' reader of command lines, which its sibling package schedules/ has."""
    says = f"print(*sorted(m for m in sys.modules if m.split('.')[0] in {sorted(OURS)!r}))"
    code = "import sys\n" + "".join(
        f"import {module}\n{says}\n" for module in ("kernels", "kernels.audit", "kernels.bench.__main__")
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    package, *commands = (set(line.split()) for line in done.stdout.splitlines())
    assert "kernels.losses" in package and {m.split(".")[0] for m in package} == {"kernels"} and len(commands) == 2
    for loaded in commands:
        assert "schedules.commandline" in loaded and {m.split(".")[0] for m in loaded} == {"kernels", "schedules"}


def test_public_names_are_there():
    import kernels

    for name in (*kernels.LOSSES[:3], "dpsm", "focal", "smoothing", "make_score", "alpha_at", "ALPHA_SCHEDULES"):
        assert hasattr(kernels, name)
