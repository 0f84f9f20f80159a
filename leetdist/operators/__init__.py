"""What a tile does, by which method, and which kernels compute it."""
