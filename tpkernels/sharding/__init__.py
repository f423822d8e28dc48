"""Which part of a parameter each rank holds, for any size and any number of ranks."""
