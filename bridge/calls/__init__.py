"""Functions and models of one framework inside programs of the other."""
