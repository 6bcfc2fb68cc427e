"""One call of the pipeline: what is asked for, what the networks are given, and the denoising of a batch."""
