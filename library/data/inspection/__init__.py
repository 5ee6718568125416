"""What a run will see, found out before it starts: counts, duplicates, captions, costs; as text, JSON and a page of pictures."""
