"""The small models of the demo: pictures with captions, and the trainings that make the models from them."""
