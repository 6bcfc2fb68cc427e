"""Prompts: their syntax, their tokens in chunks, and what the text encoders make of them."""
