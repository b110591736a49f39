"""What `make` calls: setting up, running the tests, checking and drawing the repository itself."""
