"""Dataset files, images, buckets, captions, caches and the order of batches."""
