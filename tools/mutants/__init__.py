"""A sample of small faults and the record of the tests that notice them: `make mutants`."""
