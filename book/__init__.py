"""What makes the site, its figures and the slides from docs/; nothing here is part of the package."""
