"""Adapters in training: LoRA, LoKr and DoRA on the layers of a loaded checkpoint."""
