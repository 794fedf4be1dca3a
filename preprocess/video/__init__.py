"""From a file to frames: probe, aspect, interlace, shots, window, bucket, decode."""
