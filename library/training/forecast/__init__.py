"""What a run will take, from its options alone: what is trained, what its file weighs, how much memory it needs."""
