"""From annotations and sound files to batches."""
