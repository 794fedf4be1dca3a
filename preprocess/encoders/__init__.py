"""The frozen VAE and text encoder: load, check, run, download."""
