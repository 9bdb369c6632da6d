"""What is said of a GPU and set on one, with torch's answers put in its mouth."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from kernels.bench.timing import measure_joules
from runtime.folder import environment
from runtime.machine import EnergyMeter, peak_flops, start_world

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """One GPU, an H100, as far as these functions ask."""
    for name, answer in dict(is_available=True, device_count=1, set_device=None, get_device_name="NVIDIA H100").items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def test_attention_of_changing_shapes_is_not_cudnns(gpu):
    for fixed in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert start_world("cuda", fixed_shapes=fixed).device == CUDA
        assert torch.backends.cuda.cudnn_sdp_enabled() is fixed
        assert environment(CUDA)["cudnn_attention"] is fixed
    torch.backends.cuda.enable_cudnn_sdp(True)
    start_world("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert environment(torch.device("cpu"))["cudnn_attention"] is None


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_of_the_data_sheets(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, torch.bfloat16) == (None if peak is None else pytest.approx(1e12 * peak))
    assert peak_flops(CUDA, torch.float32) is None and peak_flops(torch.device("cpu"), torch.bfloat16) is None


class NVMLError(Exception):
    pass


@pytest.mark.parametrize(
    "fails", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption", None]
)
def test_energy_that_nvml_does_not_tell_is_not_measured(gpu, monkeypatch, caplog, fails):
    def raise_(*_):
        raise NVMLError("Not Supported")

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: 7)
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 3000
    if fails:
        setattr(nvml, fails, raise_)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 0.5, 1.5]).__next__)  # two calls of 0 J each
    assert measure_joules(lambda: None, "cuda") == (None if fails else 0.0)
    with caplog.at_level("WARNING", "scorecast"):
        meter = EnergyMeter(CUDA)
        assert [meter.read(), meter.read()] == ([None] * 2 if fails else [3.0] * 2)
    assert [r.getMessage().startswith("energy is not measured") for r in caplog.records] == [True] * bool(fails)
