"""TensorRT: engines for NVIDIA GPUs, through the Python API that 10.3, 10.16 and 11.4 have in common."""
