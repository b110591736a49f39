"""Other projects' signatures, and nothing else: arguments are checked here once, +inf and base 2 converted here.

`flash_attn.py` has flash-attn's calls, `transformers.py` the attention function that transformers' models call.
"""
