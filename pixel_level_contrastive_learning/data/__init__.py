"""From any folder to batches of two views: sources, decoding, cutting, order, the loader."""
