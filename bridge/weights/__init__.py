"""Weights: which arrays of two models correspond, and how they move between models and files."""
