"""The book's figures, drawn by `make figures` into docs/book/images/. Each function returns a matplotlib figure."""
