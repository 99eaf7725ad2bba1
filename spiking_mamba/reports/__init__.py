"""What was found, as text, pages and pictures."""
