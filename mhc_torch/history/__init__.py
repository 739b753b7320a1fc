"""History: a window of earlier states, mixed into one residual stream."""
