"""LoRA: inject, save, load, merge, export, convert."""
