"""Bytes on disk: encode and decode side by side, without input or output and without torch."""
