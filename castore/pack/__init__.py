"""Pack files: written once, read by offset, scanned when damaged."""
