"""Pictures: what a network sees, which cells match, and the report that holds it all."""
