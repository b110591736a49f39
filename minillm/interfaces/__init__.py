"""Other projects' signatures, nothing else: arguments are checked here once, and +inf or base 2 converted here.

`flash_attn.py` has flash-attn's calls.
"""
