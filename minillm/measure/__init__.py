"""Measuring: the error of a result, bytes that a call allocates, HBM traffic of code as it runs, the limits of a
GPU's datasheet, and the phases of a generation."""

from minillm.measure.budget import Budget, assert_within_budget, error_budget
from minillm.measure.gpus import GPU, GPUS, Citation
from minillm.measure.memory import AllocatedBytes, format_bytes, measure_memory, record_peak
from minillm.measure.profiler import Phase, Profile, Reads, phase, profile
from minillm.measure.roofline import attainable, attention_flops, ridge, time_bound
from minillm.measure.traffic import Counted, Traffic, count_operators, count_traffic

__all__ = [
    "GPU",
    "GPUS",
    "AllocatedBytes",
    "Budget",
    "Citation",
    "Counted",
    "Phase",
    "Profile",
    "Reads",
    "Traffic",
    "assert_within_budget",
    "attainable",
    "attention_flops",
    "count_operators",
    "count_traffic",
    "error_budget",
    "format_bytes",
    "measure_memory",
    "phase",
    "profile",
    "record_peak",
    "ridge",
    "time_bound",
]
