"""GPU kernels in Triton and Gluon, and tools that run and compile them without a GPU.

Hugging Face publishes another package under this name, which transformers looks for at versions 0.18 and up to
0.19. A version by date keeps ours clear of that; `make doctor` says which of the two an import finds.
"""

__version__ = "2026.11.0"
