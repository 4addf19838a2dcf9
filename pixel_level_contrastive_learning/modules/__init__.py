"""What has weights, and reading it: propagation module, encoders, hooks, feature info."""
