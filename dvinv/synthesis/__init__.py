"""Images from a teacher alone, in numbered batches, into a pool."""
