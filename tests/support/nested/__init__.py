"""What runs inside the outer guest of the passthrough test; nested_gpu.py packs it."""
