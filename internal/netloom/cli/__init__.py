"""A person is calling."""
