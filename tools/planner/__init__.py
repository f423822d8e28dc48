"""Fit the planner's constants to measured steps and validate its predictions against them."""
