"""Training state in and out."""
