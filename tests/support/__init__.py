"""What tests share. Every module here is a pytest plugin that `tests/conftest.py` loads."""
