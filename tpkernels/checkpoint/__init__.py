"""State that does not depend on the TP size."""
