"""What knows nothing of ranking: errors, files, progress, flags, logging, launch."""
