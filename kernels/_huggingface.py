"""Hands through Hugging Face's package of the same name, for who imports it from the root of this checkout.

There ``kernels`` is this folder, and it hides the package `kernels` of PyPI, which transformers, bitsandbytes and
others ask for. Their imports work nevertheless:

- A submodule that is not ours, such as ``kernels.layer``, is found because the folder of that package is appended to
  our ``__path__``.
- A name that is not ours, such as ``kernels.get_kernel``, is looked up in the ``__init__`` of that package, which runs
  at the first such look-up. ``import kernels`` alone runs nothing of it.
- Where that package is not installed, its names raise ImportError, which says so; others raise AttributeError.

Installed, this package is ``scorecast.kernels``: it hides nothing, and nothing is handed through.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HIDES = __package__ == "kernels"
OURS = {path.stem for path in Path(__file__).parent.iterdir()}  # an import asks for a submodule as an attribute first
# What its releases 0.10 to 0.18 offer. For other names nobody is told to install it.
THEIRS = frozenset(
    "Benchmark CUDAProperties Device FuncRepository KernelizeFallback LayerRepository LoadedKernel "
    "LocalFuncRepository LocalLayerRepository LockedFuncRepository LockedLayerRepository Metadata Mode ROCMProperties "
    "RepoInfo VariantAccepted VariantRejected get_kernel get_kernel_dep get_kernel_variants get_loaded_kernels "
    "get_local_kernel get_locked_kernel has_kernel install_kernel kernelize load_kernel register_kernel_mapping "
    "replace_kernel_forward_from_hub use_kernel_forward_from_hub use_kernel_func_from_hub use_kernel_mapping "
    "use_kernelized_func".split()
)


def _installed() -> Path | None:
    """The folder of Hugging Face's package."""
    try:
        folder = Path(importlib.metadata.distribution("kernels").locate_file("kernels"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return folder if (folder / "__init__.py").is_file() else None


_folder = _installed() if HIDES else None
_package: ModuleType | None = None  # Hugging Face's, once it was asked for
if _folder:
    sys.modules[__package__].__path__.append(str(_folder))


def _load() -> ModuleType:
    """Runs the ``__init__`` of Hugging Face's package. Its own imports of ``kernels.x`` find their way through us."""
    global _package
    if _folder is None:
        raise ModuleNotFoundError("Hugging Face's package kernels is not installed", name="kernels")
    if _package is None:
        spec = importlib.util.spec_from_file_location(
            __package__, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
        )
        _package = importlib.util.module_from_spec(spec)  # bound before it runs, as it may import from itself
        try:
            spec.loader.exec_module(_package)
        except BaseException:
            _package = None
            raise
    return _package


def __getattr__(name: str):
    """The attribute ``name`` of Hugging Face's package, for names that ours does not have."""
    if HIDES and (name == "__version__" or not name.startswith("_")) and name not in OURS:
        try:
            return getattr(_load(), name)
        except ImportError:
            if name in THEIRS:
                raise
    raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
