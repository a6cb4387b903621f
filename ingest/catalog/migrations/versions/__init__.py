"""Schema steps, oldest first. A released step never changes; schema.py is what they add up to."""
