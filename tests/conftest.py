import torch

from tests.cache.counts import print_counts
from tests.exercises import table

# `make test` runs as many processes as there are cores: threads that wait for each other cost more than they bring.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter) -> None:
    """A hook here is heard with `-n` too; one beside the tests is not."""
    print_counts(terminalreporter)
    table.pytest_terminal_summary(terminalreporter)
