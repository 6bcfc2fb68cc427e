"""The choice of a candidate on a GPU: it is compared with the specification, timed, and kept in a table on disk."""
