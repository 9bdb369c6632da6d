"""Time, memory and error of the losses beside their peers: ``python -m kernels.bench``."""
