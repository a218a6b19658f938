"""What runs in a process of its own for `benchmarks.versus`: other programs' quantizers, ours, and a float forward pass."""
