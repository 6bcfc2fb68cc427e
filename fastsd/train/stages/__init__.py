"""The stages that a config can name."""
