"""The trainer: from a folder of images to a backbone."""
