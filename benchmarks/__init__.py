"""Our code measured beside other libraries. `make bench-gpu` runs every suite in `suites/` on a GPU."""
