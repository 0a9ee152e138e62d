"""What a CUDA GPU does faster."""
