"""What has weights: the heads, the propagation module, the taps, and the two encoders."""
