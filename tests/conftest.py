import torch
from hypothesis import settings

from tests.cache.counts import print_counts
from tests.exercises import table

# `make test` runs as many processes as there are cores: threads that wait for each other cost more than they bring.
torch.set_num_threads(1)

# An example that takes long on a busy machine is no fault.
settings.register_profile("course", deadline=None)
settings.load_profile("course")


def pytest_terminal_summary(terminalreporter) -> None:
    """A hook here is heard with `-n` too; one beside the tests is not."""
    print_counts(terminalreporter)
    table.pytest_terminal_summary(terminalreporter)
