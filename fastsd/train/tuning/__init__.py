"""Training that starts from a loaded checkpoint: adapters, full fine-tuning, textual inversion."""
