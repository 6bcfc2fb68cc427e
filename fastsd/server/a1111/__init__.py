"""A1111's API, /sdapi/v1/...: what clients send, and what they expect back."""
