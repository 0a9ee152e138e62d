"""What a CPU does faster."""
