"""OpenAI's images API, /v1/images/...: what its clients send, and what they expect back."""
