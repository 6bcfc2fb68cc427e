"""The heavy operations, one file each: `<op>_ref` is the specification, `<op>` is what the models call."""
