"""From any folder to batches of two views: sources, decoding, cropping, the loader."""
