"""What the kernels cost: the compiler's evidence, timings on a GPU, and bytes of memory, per layer of the network."""
