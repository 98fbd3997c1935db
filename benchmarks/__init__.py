"""What is measured, and the report at the end of `make demo`."""
