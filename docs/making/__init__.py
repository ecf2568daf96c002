"""What `docs/make_reference.py` fills pages with."""
