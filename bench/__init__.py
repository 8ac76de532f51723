"""Measures fastlora against its peers and against the machine's limits: `python -m bench`."""
