"""Image files and what is made of them: sizes, buckets, crops, pixels, masks."""
