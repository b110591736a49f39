import torch

from tests.exercises.table import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]  # a hook here is heard with `-n` too; one beside the tests is not

# `make test` runs as many processes as there are cores: threads that wait for each other cost more than they bring.
torch.set_num_threads(1)
