"""The demo: drawn scenes, and a run on them."""
