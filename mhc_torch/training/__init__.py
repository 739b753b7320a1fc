"""Small helpers around a training loop of one's own."""
