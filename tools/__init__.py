"""What `make` calls: set-up, tests, badges, and the check of what may be stored in the repository."""
