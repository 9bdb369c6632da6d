"""The house stands as DESIGN says: imports point down, no circles, three short scripts, nothing written twice."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_lm.py", "finetune_seq2seq.py", "finetune_gsm8k.py")
# From low to high: a package imports itself and lower ones. Those of the lowest level import nothing else of ours.
LEVELS = (
    {"kernels", "schedules", "sandbox"},
    {"runtime"},
    {"model"},
    {"data"},
    {"recipes"},
    {"eval"},
    {"races"},
    {Path(s).stem for s in SCRIPTS},
)
ABOUT = {"README.md", "SECURITY.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml", ".gitignore"}
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


@cache
def files() -> dict[str, ast.Module]:
    """Every file but tests and records, parsed."""
    found = sorted(p for p in ROOT.glob("*.py")) + [p for d in LEVEL for p in sorted((ROOT / d).rglob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for p in found}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def modules() -> dict[str, str]:
    """Module -> file."""
    return {module_of(path): path for path in files()}


def imports(path: str) -> list[tuple[str, bool]]:
    """(module of ours, whether by a relative import) for every import in ``path``, those inside functions included."""
    package = module_of(path).split(".") if path.endswith("__init__.py") else module_of(path).split(".")[:-1]
    out = []
    for node in ast.walk(files()[path]):
        if isinstance(node, ast.Import):
            out += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                out.append((inner if inner in modules() else base, bool(node.level)))
    return [(name, relative) for name, relative in out if name in modules() or name.split(".")[0] in LEVEL]


def test_every_file_has_its_place():
    assert {path.split("/")[0].removesuffix(".py") for path in files()} == set(LEVEL)
    top = {p.name for p in ROOT.glob("*.py")}
    assert top == set(SCRIPTS), "nothing else stands at the top level"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("no git checkout: what else is tracked cannot be told")
    rest = {path for path in tracked if "/" not in path} - top
    assert rest <= ABOUT | {name for name in rest if name.startswith("requirements")}, rest - ABOUT


def test_imports_point_down():
    wrong = []
    for path in files():
        here = path.split("/")[0].removesuffix(".py")
        for name, _ in imports(path):
            there = name.split(".")[0]
            if there != here and (LEVEL[there] >= LEVEL[here]):
                wrong.append(f"{path} imports {name}")
    assert not wrong, wrong


@pytest.mark.parametrize("package", ["kernels", "schedules"])
def test_what_others_take_along_imports_itself_by_relative_imports_alone(package):
    wrong = [
        f"{path} imports {name}"
        for path in files()
        if path.startswith(f"{package}/")
        for name, relative in imports(path)
        if not relative
    ]
    assert not wrong, wrong


def test_there_is_no_circle():
    graph = {path: {modules()[n] for n, _ in imports(path) if n in modules()} - {path} for path in files()}
    done, circles = set(), []

    def visit(path: str, trail: tuple[str, ...]) -> None:
        if path in trail:
            circles.append(" -> ".join([*trail[trail.index(path) :], path]))
        elif path not in done:
            for other in sorted(graph[path]):
                visit(other, (*trail, path))
            done.add(path)

    for path in graph:
        visit(path, ())
    assert not circles, circles


@pytest.mark.parametrize("package", ["kernels", "schedules"])
def test_import_loads_nothing_else_of_ours(package):
    code = (
        f"import sys, os; import {package}; root = os.getcwd()\n"
        "print(*sorted({m.__name__.split('.')[0] for m in list(sys.modules.values()) "
        "if str(getattr(m, '__file__', None) or '').startswith(root) and '/.venv/' not in m.__file__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [package], done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_shows_training(script):
    """Under 450 formatted lines (the gate runs ruff format --check), the loop under 70, at most 40 names of ours."""
    tree, text = files()[script], (ROOT / script).read_text()
    assert len(text.splitlines()) < 450
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.While)]
    assert len(loops) == 1 and loops[0].end_lineno - loops[0].lineno + 1 < 70
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LEVEL
        for alias in node.names
    ]
    assert len(names) <= 40, len(names)


def test_scripts_have_one_order_of_sections():
    """Config, data, model, loss, optimizer, loop, evaluation, as the head of each says."""
    for script in SCRIPTS:
        lines = [
            line.strip(" #-") for line in (ROOT / script).read_text().splitlines() if line.strip().startswith("# ")
        ]
        places = [
            next(i for i, line in enumerate(lines) if line.startswith(name) or f" {name}:" in f" {line}")
            for name in ("config", "data", "model", "loss", "optimizer", "loop", "evaluation: ")
        ]
        assert places == sorted(places), (script, places)


def test_nothing_is_written_twice():
    """No ten equal lines in a row in two files; blank lines, comments and imports aside, and the flags that a script
    names of runtime/flags.py, which says once what they are."""
    named = re.compile(r'\w+: [\w |]+ = flag\("\w+"\)$')
    seen, found, length = {}, [], 10
    for path in files():
        lines = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        lines = [x for x in lines if x and not x.startswith(("#", "import ", "from ")) and not named.match(x)]
        for i in range(len(lines) - length + 1):
            stretch = tuple(lines[i : i + length])
            other = seen.setdefault(stretch, path)
            if other != path:
                found.append(f"{other} and {path}: {stretch[0]}")
    assert not found, found


# Beside schedules/textlines.py, what reads a file or JSON, and why it may.
READERS_OF_THEIR_OWN = {
    "runtime/checkpoint.py": "its own zip files, by their last bytes",
    "runtime/staging.py": "files that it has just written, to sync them; its own lock",
    "sandbox/jailer.py": "stands alone; reads /proc, and the lines of its own parent",
    "sandbox/run.py": "stands alone; reads the lines of its own jailer",
    "kernels/bench/rows.py": "kernels/ imports nothing else of ours; reads /proc and a CSV that the bench wrote",
    "kernels/bench/timing.py": "kernels/ imports nothing else of ours; reads /proc",
    "runtime/folder.py": "copies values and modules that are ours: what others may have touched goes through textlines",
    "model/gguf_tokenizer.py": "json.loads of what the tokenizers package made",
    "data/cache.py": "the binary header of a token cache",
    "data/sources.py": "the bytes of WikiText's files, for their hash",
    "eval/attack/run.py": "the bytes of weights, for their hash; a copy of a value",
    "recipes/smollm2.py": "the bytes of a wheel, for their hash",
    "finetune_gsm8k.py": "the summary that this very run has written before",
    "races/peft_gsm8k.py": "json.loads of what its own child printed",
    "races/ab.py": "json.loads of what its own children printed",
}


def test_text_files_are_read_in_one_place():
    """No open() for reading, read_text, read_bytes, json.load(s), csv.reader or tomllib but in schedules/textlines.py
    and, for a reason, in the files above."""
    found = {}
    for path, tree in files().items():
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if reads(call) and path != "schedules/textlines.py":
                found.setdefault(path, []).append(f"{path}:{call.lineno} {ast.unparse(call.func)}")
    assert not (others := {p: at for p, at in found.items() if p not in READERS_OF_THEIR_OWN}), others
    assert found.keys() == READERS_OF_THEIR_OWN.keys(), "no longer needed"


def test_no_code_comes_out_of_a_file():
    """torch.load reads tensors alone, nothing else is unpickled, and no model or data set brings code of its own."""
    wrong = []
    for path, tree in files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                name = ast.unparse(node.func)
                bad = name.split(".")[-1] in ("Unpickler", "run_path") or name in ("eval", "exec")
                bad |= name.split(".")[0] in ("marshal", "shelve", "dill", "joblib", "cloudpickle")
                bad |= name in ("pickle.load", "pickle.loads", "torch.hub.load", "torch.jit.load")
                bad |= name == "torch.load" and given.get("weights_only") != "True"
                bad |= (
                    given.get("trust_remote_code", "False") != "False" or given.get("allow_pickle", "False") != "False"
                )
                wrong += [f"{path}:{node.lineno} {name}"] * bad
            elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch") and not node.level:
                taken = {"load", "loads", "Unpickler"} & {alias.name for alias in node.names}
                wrong += [f"{path}:{node.lineno} {name}" for name in taken]
    assert not wrong, wrong


def test_command_lines_are_read_in_one_place():
    """By schedules/commandline.py: argparse's own parser stands in the sandbox alone, which imports nothing of ours,
    and kernels/ reaches for its sibling package in the one line that says so."""
    calls = {(p, ast.unparse(n)) for p, tree in files().items() for n in ast.walk(tree) if isinstance(n, ast.Call)}
    own = {path for path, call in calls if call.startswith(("argparse.ArgumentParser(", "ArgumentParser("))}
    assert own == {"sandbox/__main__.py"}
    siblings = {path for path, call in calls if path.startswith("kernels/") and call.startswith("import_module(")}
    assert siblings == {"kernels/bench/timing.py"}


def reads(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name == "open" or (name.endswith(".open") and not name.startswith("os.")):
        place = 1 if name == "open" else 0
        modes = [a for a in call.args[place : place + 1]] + [k.value for k in call.keywords if k.arg == "mode"]
        return not any(isinstance(m, ast.Constant) and str(m.value)[:1] in ("w", "a", "x") for m in modes)
    own = name.startswith(("textlines.", "read_"))
    return not own and (
        name.endswith((".read_text", ".read_bytes", "csv.reader", "csv.DictReader"))
        or name in ("json.loads", "json.load", "tomllib.loads", "tomllib.load", "np.loadtxt", "np.genfromtxt")
    )
