"""The table of GPUs: every figure cited, every sparse rate halved."""

from dataclasses import fields, replace

import pytest
import torch

from minillm.measure import GPU, GPUS

FIGURES = ["compute_capability", "memory_type", "memory_gb", "bandwidth", "l1_kib", "shared_kib_per_sm"]
FIGURES += ["shared_kib_per_block", "sms", "l2_mib", "half_flops", "fp8_flops"]
EACH_GPU = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)


def test_the_table_has_the_seven_gpus_of_lesson_00_in_order():
    assert list(GPUS) == ["T4", "A100", "L4", "RTX 4090", "H100", "H200", "B200"]


@EACH_GPU
def test_every_figure_is_cited_and_what_is_missing_is_not(gpu):
    known = {name for name in FIGURES if getattr(gpu, name) is not None}
    assert set(gpu.sources) == known
    assert all(citation.title and citation.url.startswith("https://") for citation in gpu.sources.values())


def test_the_list_of_figures_is_all_of_them():
    described = {"name", "architecture", "half_dtype", "device_names", "sources"}
    assert {field.name for field in fields(GPU)} - described == set(FIGURES)


@EACH_GPU
def test_primary_sources_are_nvidias_own(gpu):
    assert all(".nvidia.com/" in citation.url for citation in gpu.sources.values())


@EACH_GPU
def test_the_sram_figures_nest(gpu):
    assert gpu.shared_kib_per_block <= gpu.shared_kib_per_sm <= gpu.l1_kib


@EACH_GPU
def test_fp8_doubles_the_half_precision_rate_where_there_is_fp8(gpu):
    assert (gpu.fp8_flops is not None) == (gpu.compute_capability >= (8, 9))
    if gpu.fp8_flops is not None:
        assert gpu.fp8_flops / gpu.half_flops == pytest.approx(2, rel=0.005)


@EACH_GPU
def test_rates_are_dense(gpu):
    # FLOPs of one SM in one clock: a power of two on the dense rate, and clocks between 1.3 and 2.6 GHz. A sparse rate
    # that slipped in would need a clock of twice that.
    per_clock = {"T4": 1024, "A100": 2048, "L4": 1024, "RTX 4090": 512, "H100": 4096, "H200": 4096, "B200": 8192}
    short_name = next(name for name, entry in GPUS.items() if entry is gpu)
    assert 1.3e9 < gpu.half_flops / gpu.sms / per_clock[short_name] < 2.6e9


@pytest.mark.parametrize(
    ("device_name", "entry"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_device_is_found_by_its_exact_name(monkeypatch, device_name, entry):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: device_name)
    assert GPU.from_device() is (None if entry is None else GPUS[entry])


def test_without_cuda_there_is_no_entry(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert GPU.from_device() is None


def test_entries_cannot_be_changed_by_mistake():
    with pytest.raises(AttributeError):
        GPUS["H100"].bandwidth = 1.0
    assert replace(GPUS["H100"], bandwidth=1.0).bandwidth == 1.0


@pytest.mark.skipif(GPU.from_device() is None, reason="not verified here: no GPU of the table to compare with")
def test_the_table_agrees_with_the_driver():
    gpu, device = GPU.from_device(), torch.cuda.get_device_properties()
    assert (device.major, device.minor) == gpu.compute_capability
    assert device.multi_processor_count == gpu.sms
    assert device.shared_memory_per_multiprocessor == gpu.shared_kib_per_sm * 1024
    assert device.shared_memory_per_block_optin == gpu.shared_kib_per_block * 1024
    if gpu.l2_mib is not None:
        assert device.L2_cache_size / 2**20 == pytest.approx(gpu.l2_mib, rel=0.01)
