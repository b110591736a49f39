"""GPUs: what their datasheets say, every figure with its citation.

Every figure is NVIDIA's and cited in ``GPU.sources``; None stands where none could be cited. Rates are dense:
several datasheets print them with 2:4 sparsity, twice as high, and the note of the citation says where we halved.
KiB and MiB are binary (what NVIDIA's CUDA guides write KB and MB); GB, bytes a second and FLOP/s are decimal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True)
class Citation:
    """The source of a figure: the document, its address, and how the printed number was converted, if it was."""

    title: str
    url: str
    note: str = ""


@dataclass(frozen=True)
class GPU:
    """The figures of one GPU that a roofline and a choice of tile sizes need.

    Attributes:
        name: the usual one.
        architecture: NVIDIA's name of the generation.
        compute_capability: (major, minor); decides which kernels run.
        memory_type: of the device memory.
        memory_gb: its size, 10**9 bytes.
        bandwidth: of the device memory, bytes/s.
        l1_kib: SRAM of one SM that L1 cache and shared memory divide between them, KiB.
        shared_kib_per_sm: how much of it can be shared memory, KiB.
        shared_kib_per_block: how much of that one thread block can ask for (opt-in), KiB.
        sms: streaming multiprocessors in use.
        l2_mib: L2 cache, MiB; None where NVIDIA does not print it.
        half_dtype: "bf16", or "fp16" on a GPU whose Tensor Cores have no bf16.
        half_flops: dense Tensor Core rate in half_dtype with fp32 accumulation, FLOP/s.
        fp8_flops: dense FP8 rate with fp32 accumulation, FLOP/s; None without FP8 Tensor Cores.
        device_names: what ``torch.cuda.get_device_name`` says.
        sources: for each figure above, by field name, its Citation.
    """

    name: str
    architecture: str
    compute_capability: tuple[int, int]
    memory_type: str
    memory_gb: int
    bandwidth: float
    l1_kib: int
    shared_kib_per_sm: int
    shared_kib_per_block: int
    sms: int
    l2_mib: int | None
    half_dtype: Literal["bf16", "fp16"]
    half_flops: float
    fp8_flops: float | None
    device_names: tuple[str, ...]
    sources: Mapping[str, Citation] = field(repr=False, compare=False)

    def flops(self, dtype: str | None = None) -> float:
        """The dense Tensor Core rate.

        Args:
            dtype: "bf16", "fp16" or "fp8". None: the GPU's half precision.

        Returns:
            FLOP/s.

        Raises:
            ValueError: the GPU's Tensor Cores do not have that type.
        """
        rates = {"fp16": self.half_flops, self.half_dtype: self.half_flops, "fp8": self.fp8_flops}
        rate = rates.get(dtype or self.half_dtype)
        if rate is None:
            have = ", ".join(name for name, value in rates.items() if value is not None)
            raise ValueError(f"dtype is {dtype!r}; the {self.name}'s Tensor Cores have {have}")
        return rate

    @staticmethod
    def from_device(device: torch.device | int | None = None) -> GPU | None:
        """The entry of ``GPUS`` for a CUDA device, by its exact name.

        Args:
            device: None is the current one.

        Returns:
            The entry; None without CUDA, or for a GPU that is not in the table (an H100 PCIe is not an H100 SXM).
        """
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name(device)
        return next((gpu for gpu in GPUS.values() if name in gpu.device_names), None)


_CAPABILITY = Citation("NVIDIA, CUDA GPU Compute Capability", "https://developer.nvidia.com/cuda-gpus")
_SHARED = Citation(
    'NVIDIA, CUDA Programming Guide, Compute Capabilities, table "Memory Information per Compute Capability"',
    "https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html",
)
_UNIFIED = Citation(
    "NVIDIA, CUDA C++ Programming Guide, Compute Capabilities 7.x, 8.x, 9.0: size of the unified data cache",
    "https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#compute-capabilities",
)
_T4 = Citation(
    "NVIDIA T4 datasheet",
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
)
_A100 = Citation(
    "NVIDIA A100 datasheet, column A100 80GB SXM",
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
)
_A100_CHIP = Citation(
    "NVIDIA, GPU Performance Background User's Guide, GPU Architecture Fundamentals",
    "https://docs.nvidia.com/deeplearning/performance/dl-performance-gpu-background/index.html",
)
_ADA = Citation(
    "NVIDIA Ada GPU Architecture whitepaper, v2.02 or later, appendices",
    "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
)
_L4 = Citation("NVIDIA L4 product page", "https://www.nvidia.com/en-us/data-center/l4/")
_H100 = Citation("NVIDIA H100 product page, column H100 SXM", "https://www.nvidia.com/en-us/data-center/h100/")
_HOPPER = Citation(
    "NVIDIA Hopper Architecture In-Depth", "https://developer.nvidia.com/blog/nvidia-hopper-architecture-in-depth/"
)
_H200 = Citation("NVIDIA H200 product page, column H200 SXM", "https://www.nvidia.com/en-us/data-center/h200/")
_DGX_B200 = Citation("NVIDIA DGX B200 product page", "https://www.nvidia.com/en-us/data-center/dgx-b200/")
_HGX = Citation("NVIDIA HGX platform page, column HGX B200", "https://www.nvidia.com/en-us/data-center/hgx/")
_BLACKWELL = Citation(
    "NVIDIA Blackwell Architecture Technical Brief, v2.1, table 3, per GPU",
    "https://resources.nvidia.com/en-us-blackwell-architecture/blackwell-architecture-technical-brief",
)
_BLACKWELL_TUNING = Citation(
    "NVIDIA Blackwell Tuning Guide", "https://docs.nvidia.com/cuda/blackwell-tuning-guide/index.html"
)
_MPS = Citation(
    "NVIDIA, Boost GPU Memory Performance with No Code Changes Using NVIDIA CUDA MPS",
    "https://developer.nvidia.com/blog/boost-gpu-memory-performance-with-no-code-changes-using-nvidia-cuda-mps/",
)


def _noted(citation: Citation, note: str) -> Citation:
    return Citation(citation.title, citation.url, note)


def _sources(base: Citation, **others: Citation) -> dict[str, Citation]:
    """A citation for each figure: the guides for what a compute capability fixes, base for the rest, unless given."""
    fixed = {"shared_kib_per_sm": _SHARED, "shared_kib_per_block": _SHARED, "l1_kib": _UNIFIED}
    rest = dict.fromkeys(("memory_type", "memory_gb", "bandwidth", "sms", "l2_mib", "half_flops", "fp8_flops"), base)
    return {"compute_capability": _CAPABILITY} | fixed | rest | others


def _without(sources: dict[str, Citation], *names: str) -> dict[str, Citation]:
    return {name: citation for name, citation in sources.items() if name not in names}


GPUS: dict[str, GPU] = {
    "T4": GPU(
        name="T4",
        architecture="Turing",
        compute_capability=(7, 5),
        memory_type="GDDR6",
        memory_gb=16,
        bandwidth=300e9,
        l1_kib=96,
        shared_kib_per_sm=64,
        shared_kib_per_block=64,
        sms=40,
        l2_mib=4,
        half_dtype="fp16",
        half_flops=65e12,
        fp8_flops=None,
        device_names=("Tesla T4", "NVIDIA T4"),
        sources=_without(
            _sources(
                _T4,
                bandwidth=_noted(_T4, "its bus, 256 bits at 10 Gbit/s, would give 320 GB/s"),
                sms=_noted(_T4, "2,560 CUDA cores, 64 to an SM"),
                l2_mib=_noted(_ADA, "4096 KB, in the comparison of L4 and T4; a T4's driver says the same"),
            ),
            "fp8_flops",
        ),
    ),
    "A100": GPU(
        name="A100 SXM 80GB",
        architecture="Ampere",
        compute_capability=(8, 0),
        memory_type="HBM2e",
        memory_gb=80,
        bandwidth=2039e9,
        l1_kib=192,
        shared_kib_per_sm=164,
        shared_kib_per_block=163,
        sms=108,
        l2_mib=40,
        half_dtype="bf16",
        half_flops=312e12,
        fp8_flops=None,
        device_names=("NVIDIA A100-SXM4-80GB",),
        sources=_without(_sources(_A100, sms=_A100_CHIP, l2_mib=_A100_CHIP), "fp8_flops"),
    ),
    "L4": GPU(
        name="L4",
        architecture="Ada Lovelace",
        compute_capability=(8, 9),
        memory_type="GDDR6",
        memory_gb=24,
        bandwidth=300e9,
        l1_kib=128,
        shared_kib_per_sm=100,
        shared_kib_per_block=99,
        sms=58,
        l2_mib=48,
        half_dtype="bf16",
        half_flops=121e12,
        fp8_flops=242.5e12,
        device_names=("NVIDIA L4",),
        sources=_sources(
            _L4,
            half_flops=_noted(_L4, "printed as 242 with sparsity; half of it"),
            fp8_flops=_noted(_L4, "printed as 485 with sparsity; half of it"),
            sms=_noted(_ADA, "an L4's driver says the same"),
            l2_mib=_noted(_ADA, "49152 KB; an L4's driver says the same"),
        ),
    ),
    "RTX 4090": GPU(
        name="GeForce RTX 4090",
        architecture="Ada Lovelace",
        compute_capability=(8, 9),
        memory_type="GDDR6X",
        memory_gb=24,
        bandwidth=1008e9,
        l1_kib=128,
        shared_kib_per_sm=100,
        shared_kib_per_block=99,
        sms=128,
        l2_mib=72,
        half_dtype="bf16",
        half_flops=165.2e12,
        fp8_flops=330.3e12,
        device_names=("NVIDIA GeForce RTX 4090",),
        sources=_sources(
            _ADA,
            half_flops=_noted(_ADA, "dense, fp32 accumulation; with fp16 accumulation fp16 reaches 330.3"),
            fp8_flops=_noted(_ADA, "dense, fp32 accumulation (corrected in v2.02); with fp16 accumulation 660.6"),
            l2_mib=_noted(_ADA, "73728 KB"),
        ),
    ),
    "H100": GPU(
        name="H100 SXM",
        architecture="Hopper",
        compute_capability=(9, 0),
        memory_type="HBM3",
        memory_gb=80,
        bandwidth=3350e9,
        l1_kib=256,
        shared_kib_per_sm=228,
        shared_kib_per_block=227,
        sms=132,
        l2_mib=50,
        half_dtype="bf16",
        half_flops=989e12,
        fp8_flops=1979e12,
        device_names=("NVIDIA H100 80GB HBM3",),
        sources=_sources(
            _H100,
            memory_type=_HOPPER,
            half_flops=_noted(
                _H100, "printed as 1,979 with sparsity; half of it, as the FlashAttention-3 paper has it"
            ),
            fp8_flops=_noted(_H100, "printed as 3,958 with sparsity; half of it"),
            sms=_HOPPER,
            l2_mib=_HOPPER,
        ),
    ),
    "H200": GPU(
        name="H200 SXM",
        architecture="Hopper",
        compute_capability=(9, 0),
        memory_type="HBM3e",
        memory_gb=141,
        bandwidth=4800e9,
        l1_kib=256,
        shared_kib_per_sm=228,
        shared_kib_per_block=227,
        sms=132,
        l2_mib=None,
        half_dtype="bf16",
        half_flops=989e12,
        fp8_flops=1979e12,
        device_names=("NVIDIA H200",),
        sources=_without(
            _sources(
                _H200,
                half_flops=_noted(_H200, "printed as 1,979 with sparsity; half of it"),
                fp8_flops=_noted(_H200, "printed as 3,958 with sparsity; half of it"),
                sms=_noted(_H200, "not printed; derived from the same FP32 rate as an H100 SXM, which has 132"),
            ),
            "l2_mib",
        ),
    ),
    "B200": GPU(
        name="B200",
        architecture="Blackwell",
        compute_capability=(10, 0),
        memory_type="HBM3e",
        memory_gb=180,
        bandwidth=7700e9,
        l1_kib=256,
        shared_kib_per_sm=228,
        shared_kib_per_block=227,
        sms=148,
        l2_mib=126,
        half_dtype="bf16",
        half_flops=2250e12,
        fp8_flops=4500e12,
        device_names=("NVIDIA B200",),
        sources=_sources(
            _BLACKWELL,
            memory_gb=_noted(_DGX_B200, "1,440 GB in eight GPUs"),
            bandwidth=_noted(_BLACKWELL, "the DGX B200 page rounds it to 64 TB/s for eight GPUs, 8 TB/s each"),
            half_flops=_noted(_HGX, "printed as 36 PFLOPS for eight GPUs with sparsity; a sixteenth of it"),
            fp8_flops=_noted(_HGX, "printed as 72 PFLOPS for eight GPUs with sparsity; a sixteenth of it"),
            l1_kib=_BLACKWELL_TUNING,
            l2_mib=_BLACKWELL_TUNING,
            sms=_MPS,
        ),
    ),
}
