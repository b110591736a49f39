"""Measuring: memory that a call allocates, HBM traffic of code as it runs, the limits of a GPU's datasheet, and
the phases of a generation."""

from minillm.measure.memory import MemoryReport, format_bytes, measure_memory, record_peak
from minillm.measure.profiler import Phase, Profile, Reads, phase, profile
from minillm.measure.roofline import GPU, GPUS, Citation, attainable, attention_flops, ridge, time_bound
from minillm.measure.traffic import Counted, Traffic, count_operators, count_traffic

__all__ = [
    "GPU",
    "GPUS",
    "Citation",
    "Counted",
    "MemoryReport",
    "Phase",
    "Profile",
    "Reads",
    "Traffic",
    "attainable",
    "attention_flops",
    "count_operators",
    "count_traffic",
    "format_bytes",
    "measure_memory",
    "phase",
    "profile",
    "record_peak",
    "ridge",
    "time_bound",
]
