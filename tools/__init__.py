"""Programs of a checkout; none of them is in the wheel."""
