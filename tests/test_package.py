"""What others take along: the wheel next to transformers, and the checkout next to Hugging Face's package `kernels`."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HF_KERNELS = Path(os.environ.get("HF_KERNELS", ROOT / ".venv" / "hf-kernels"))
SITE = Path(pytest.__file__).parents[1]  # the site-packages that the tests run with


def run(python, code, cwd, *path, **environment):
    """``code`` in a fresh interpreter that is offline: its output. Its failure fails the test."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    clean |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    } | environment
    done = subprocess.run([python, "-c", code], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout + done.stderr


def hf_kernels():
    if not any(d.name == "kernels" for d in distributions(path=[str(HF_KERNELS)])):
        pytest.skip(f"Hugging Face's kernels is not in {HF_KERNELS}: make test puts it there")
    return HF_KERNELS


def without_theirs():
    if any(d.name == "kernels" for d in distributions()):
        pytest.skip("Hugging Face's kernels is installed here, so that its absence cannot be tested")
    return []


# ----------------------------------------------------------------------------------------------
# the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of this tree, so that the build leaves nothing here."""
    pytest.importorskip("setuptools", reason="building the wheel needs setuptools (requirements-dev.txt)")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("kernels", "schedules", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("scorecast-*.whl")
    return path


def test_the_wheel_holds_both_packages_whole_and_nothing_at_the_top(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [p for name in ("kernels", "schedules") for p in (ROOT / name).rglob("*") if p.is_file()]
    ours = {f"scorecast/{p.relative_to(ROOT)}" for p in files if "__pycache__" not in p.parts}
    assert {name for name in names if ".dist-info/" not in name} == ours
    (meta,) = (name for name in names if name.endswith("/METADATA"))
    says = zipfile.ZipFile(wheel).read(meta).decode().split("\n\n")[0].splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"Name: scorecast", f"Version: {project['version']}", "License-Expression: MIT"} <= set(says)
    assert "Requires-Python: >=3.11" in says
    needed = [line.split(": ")[1] for line in says if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(need.split(">=")[0] for need in needed) == ["numpy", "torch"]
    assert {
        "Provides-Extra: triton",
        "Provides-Extra: plot",
        "Provides-Extra: schedule-free",
        "Provides-Extra: hf",
    } <= set(says)


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """(python, its site-packages): a fresh virtual environment with the wheel, which sees the tests' packages after."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "tests.pth").write_text(f"{SITE}\n")
    return str(folder / "bin" / "python"), site


TRAINS = """
import sys
import torch
import transformers
from scorecast.kernels import ProperScoreLoss
from scorecast.schedules import FoT

torch.manual_seed(0)
config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0,
                                 embd_pdrop=0.0, attn_pdrop=0.0)
model = transformers.GPT2LMHeadModel(config)
data = [{"input_ids": torch.arange(i, i + 12) % 32, "labels": torch.arange(i, i + 12) % 32} for i in range(64)]
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
fot = FoT(optimizer, 40, every=8)
loss_fn = ProperScoreLoss("brier")
seen = []

def compute_loss(*args, **kwargs):
    loss = loss_fn.trainer_loss(*args, **kwargs)
    fot.observe(loss)
    seen.append(loss.item())
    return loss

args = transformers.TrainingArguments("out", max_steps=40, per_device_train_batch_size=8, report_to=[], use_cpu=True,
                                      disable_tqdm=True, save_strategy="no")
transformers.Trainer(model, args, train_dataset=data, compute_loss_func=compute_loss,
                     optimizers=(optimizer, fot)).train()
first, last = sum(seen[:5]) / 5, sum(seen[-5:]) / 5
assert 0 < last < 0.9 * first, (first, last)
assert fot.last_epoch == 40 and fot.counts["decisions"] == 4 and fot.get_last_lr() == [0.0]
assert fot.forecaster.points == 32  # the last window closes with the run
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("scorecast."):
        print("module", module.__file__)
"""


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside Hugging Face's kernels"])
def test_the_installed_wheel_trains_through_the_trainer(beside, elsewhere, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    python, site = elsewhere
    check = "import kernels; print('theirs', kernels.__file__, kernels.get_kernel.__module__)"
    if not beside:
        without_theirs()
        check = """
from importlib.util import find_spec
assert find_spec("kernels") is find_spec("schedules") is None
"""
    said = run(python, TRAINS + check, tmp_path, *([hf_kernels()] if beside else [])).splitlines()
    modules = [Path(line.split()[1]) for line in said if line.startswith("module ")]
    assert len(modules) > 8 and all(site in path.parents for path in modules)
    if beside:
        (theirs,) = (line.split()[1:] for line in said if line.startswith("theirs "))
        assert HF_KERNELS in Path(theirs[0]).parents


ALONE = """
import sys, scorecast.{name}
assert not {{"matplotlib", "schedulefree", "transformers", "scorecast.{other}"}} & set(sys.modules)
"""


def test_importing_kernels_loads_nothing_optional(elsewhere, tmp_path):
    """Neither schedules, nor what only extras bring."""
    run(elsewhere[0], ALONE.format(name="kernels", other="schedules"), tmp_path)


def test_schedules_load_nothing_optional_and_their_doors_open(elsewhere, tmp_path):
    pytest.importorskip("matplotlib")
    opens = "import runpy; sys.argv = ['schedules', 'plot', '--steps', '20', '--out', 'lr.png']\n"
    opens += "runpy.run_module('scorecast.schedules', run_name='__main__')"
    run(elsewhere[0], ALONE.format(name="schedules", other="kernels") + opens, tmp_path)
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------
# the checkout, where the name kernels is ours

# The names that transformers 5.23 asks for, in a package with its submodules, absolute imports and version.
STAND_IN = {
    "__init__.py": "__version__ = '0.18.2'\n"
    "from kernels.layer import (CUDAProperties, Device, FuncRepository, KernelizeFallback, LayerRepository,\n"
    "    LocalLayerRepository, Mode, ROCMProperties, kernelize, register_kernel_mapping,\n"
    "    replace_kernel_forward_from_hub, use_kernel_forward_from_hub, use_kernel_mapping, use_kernelized_func)\n"
    "from .load import get_kernel\n",
    "load.py": "import kernels\n\ndef get_kernel(*args, **kwargs):\n    raise ValueError('this has no kernels')\n",
    "layer/__init__.py": "from kernels.layer.mode import Mode\n"
    "class Device:\n    def __init__(self, *args, **kwargs): pass\n"
    "CUDAProperties = FuncRepository = KernelizeFallback = LayerRepository = LocalLayerRepository = Device\n"
    "ROCMProperties = Device\n"
    "def use_kernel_forward_from_hub(*args): return lambda cls: cls\n"
    "kernelize = register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_forward_from_hub\n"
    "use_kernel_mapping = use_kernelized_func = use_kernel_forward_from_hub\n",
    "layer/mode.py": "import enum\n\nclass Mode(enum.Flag):\n    TRAINING = 1\n    INFERENCE = 2\n",
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-in")
    for name, text in STAND_IN.items():
        path = folder / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "kernels-0.18.2.dist-info").mkdir()
    (folder / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    return folder


@pytest.fixture(params=["without", "with", "stand-in"])
def beside(request, stand_in):
    """Folders for PYTHONPATH: no package of Hugging Face's, the installed one, or one that transformers takes."""
    return {"without": without_theirs, "with": lambda: [hf_kernels()], "stand-in": lambda: [stand_in]}[request.param]()


@pytest.mark.parametrize("beside", ["with", "stand-in"], indirect=True)  # without theirs: in all tests against peft
def test_other_packages_import_from_the_checkout(beside):
    """transformers, what it loads lazily, peft and bitsandbytes, before our own."""
    for name in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(name)
    said = run(
        sys.executable,
        """
import transformers
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer
import bitsandbytes, peft
from transformers.utils import is_kernels_available
import kernels
print("viable", is_kernels_available(), kernels.__file__)
""",
        ROOT,
        *beside,
    )
    assert f"viable {'stand-in' in str(beside)} {ROOT / 'kernels' / '__init__.py'}" in said
    # bitsandbytes asks for a kernel on CPUs with AVX512-BF16 and reports why there is none; the package is not why.
    wrong = [line for line in said.splitlines() if "cannot import" in line or "No module named" in line]
    assert not wrong and "is not installed" not in said


def test_ours_work_in_the_checkout_and_theirs_are_handed_through(beside):
    """Importing ours runs nothing of theirs; what theirs offers is found beside it, or said to be not installed."""
    code = f"""
import sys, kernels
from kernels import torch_impl
folder = {str(beside[0] if beside else ROOT / "nowhere")!r}
assert not [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith(folder)]
assert not hasattr(kernels, "of_neither") and not hasattr(kernels, "_private") and not hasattr(kernels, "__wrapped__")
"""
    code += """
import torch
from kernels import ProperScoreLoss, linear_score
from kernels.losses import ce, spherical
from schedules import Forecaster
hidden, weight, targets = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.arange(6)
loss, moments = linear_score(hidden, weight, targets, lambda m: ce(m) + spherical(m))
loss.backward()
ProperScoreLoss("dpsm", warmup=0.1)(torch.randn(6, 9), targets)
Forecaster().update(1, 3.0, 0.1)
"""
    theirs = """
from importlib.metadata import version
import kernels.layer.mode
from kernels import Mode, get_kernel, linear_score
from kernels.layer import Device
assert kernels.layer.mode.Mode is Mode is kernels.Mode and get_kernel.__module__ == "kernels.load"
assert linear_score.__module__ == "kernels.head" and kernels.__version__ == version("kernels")
import pickle
assert pickle.loads(pickle.dumps(Mode.TRAINING)) is Mode.TRAINING
assert pickle.loads(pickle.dumps(linear_score)) is linear_score
"""
    nothing = """
import importlib.metadata, importlib.util, kernels
assert importlib.util.find_spec("kernels").origin == kernels.__file__
for ask, error, says in [
    (lambda: importlib.metadata.version("kernels"), importlib.metadata.PackageNotFoundError, "kernels"),
    (lambda: exec("from kernels import get_kernel"), ImportError, "Hugging Face's package kernels is not installed"),
    (lambda: exec("import kernels.layer"), ModuleNotFoundError, "No module named 'kernels.layer'"),
    (lambda: exec("from kernels import linear_scor"), ImportError, "cannot import name 'linear_scor' from 'kernels'"),
    (lambda: kernels.linear_scor, AttributeError, "module 'kernels' has no attribute 'linear_scor'"),
    (lambda: kernels.__version__, AttributeError, "__version__"),
]:
    try:
        ask()
    except error as e:
        assert says in str(e), e
    else:
        raise AssertionError(says)
"""
    run(sys.executable, code + (theirs if beside else nothing), ROOT, *beside)


def test_no_submodule_of_theirs_is_hidden_by_one_of_ours():
    def modules(folder):
        return {p.stem for p in folder.iterdir() if p.suffix in (".py", ".so") or p.is_dir()} - {
            "__init__",
            "__pycache__",
        }

    assert not modules(ROOT / "kernels") & modules(hf_kernels() / "kernels")


def test_theirs_broken_is_said_in_its_own_words(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "kernels-0.1.dist-info").mkdir()
    (tmp_path / "kernels-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    run(
        sys.executable,
        """
import kernels
assert not hasattr(kernels, "linear_scor")
for _ in range(2):
    try:
        from kernels import get_kernel
    except ImportError as e:
        assert "a_package_that_is_missing" in str(e)
    else:
        raise AssertionError
""",
        ROOT,
        tmp_path,
    )
