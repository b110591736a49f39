"""Measurements beside other people's code. `make bench-gpu` runs every suite in `suites/` on a GPU."""
